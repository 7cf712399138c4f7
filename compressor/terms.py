"""What a student is asked for: a weighted sum of losses, written like `0.5*ce + forward-kl + 0.1*sinkhorn(0.05)`.

A teacher speaks through logits, through its most likely tokens, or through tokens drawn from it; each loss says which
of these it can hear. Pointwise losses are taken position by position, so vocabulary-sized tensors exist for some
positions at a time. Sinkhorn compares sets: it sees some rows of a step together, and does not see which row is which.
Hidden states are compared layer by layer, each with what the teacher has where the student's next block begins; there
too a student may be asked for an answer already.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from calib import BadInput
from calib.divergence import DIVERGENCES, Divergence, cross_entropy, dense, k2, k3
from calib.precision import at_least_single
from calib.sinkhorn import debiased, l1, sharp, transport
from calib.sparse import Drawn, Top, bucketed, drawn_cross_entropy
from compressor.dac import dac_learned, dac_nucleus, span_correlation
from compressor.losses import POINTWISE, Pointwise, bd_kd, ofa
from compressor.representation import gram_cauchy_schwarz, linear_cka, match_attention, match_hidden

Signal = Tensor | Top | Drawn  # what a teacher says at some positions: logits (t, V), or less


def _ce(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(target, q_logits)


def _sampled(estimator: Callable[[Tensor, Tensor], Tensor]) -> Pointwise:
    """Of tokens that the student drew, which are the targets."""

    def loss(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
        return estimator(-cross_entropy(target, p_logits), -cross_entropy(target, q_logits))

    return loss


def _debiased(p: Tensor, q: Tensor, eps: float = 0.1) -> Tensor:
    return debiased(q, p, l1, eps)[0]


def _sharp(p: Tensor, q: Tensor, eps: float = 0.1, sweeps: int = 20) -> Tensor:
    cost = l1(q, p)
    return sharp(cost, transport(cost, eps, sweeps=int(sweeps), anneal=False))


FAITHFUL: dict[str, Divergence] = DIVERGENCES | {"bd-kd": bd_kd, "dac-nucleus": dac_nucleus}  # of log-probabilities
LEARNED: dict[str, Callable[..., Tensor]] = {"dac": dac_learned}  # the same, after a net that is trained beside it
LABELLED: dict[str, Pointwise] = {"ce": _ce} | POINTWISE  # of logits and the token that came
ON_POLICY: dict[str, Pointwise] = {"k2": _sampled(k2), "k3": _sampled(k3)}
# Of rows of distributions, softened, drawn from the whole batch or each sequence for itself.
SETS: dict[str, Callable[..., Tensor]] = {
    "sinkhorn": _debiased,
    "sinkhorn-sharp": _sharp,
    "sinkhorn-sequence": _debiased,
    "sinkhorn-sequence-sharp": _sharp,
    "sinkhorn-hidden": _debiased,
}
SPANS: dict[str, Callable[..., Tensor]] = {"spans": span_correlation}  # of rows of one sequence, and spans in it
# Of hidden states (n, d) of some layers, the teacher's first; "attention" of distributions (B, H, T, T).
STATES: dict[str, Callable[..., Tensor]] = {
    "hidden": lambda t, s: match_hidden(t, s).mean(),
    "cka": linear_cka,
    "gram": gram_cauchy_schwarz,
    "attention": match_attention,
}
EXITS: dict[str, Pointwise] = {"ofa-exits": ofa}  # of answers given after some of the student's blocks
LOSSES = FAITHFUL | LEARNED | LABELLED | ON_POLICY | SETS | SPANS | STATES | EXITS
NAMES = ("ce", *sorted(LOSSES.keys() - {"ce"}))
# Of a classifier: a row is one answer, a batch is a set.
CLASSIFYING = {*FAITHFUL, *LEARNED, *LABELLED, "sinkhorn", "sinkhorn-sharp"}

_TERM = re.compile(r"(?:([\d.]+(?:e-?\d+)?)\s*\*\s*)?([a-z][a-z0-9-]*)(?:\(([^()]*)\))?")


@dataclass(frozen=True)
class Term:
    """One loss and what it counts."""

    label: str  # as it was written
    name: str
    weight: float
    loss: Callable[..., Tensor]


def parse(text: str) -> list[Term]:
    """Raises BadInput where a name is unknown, a weight is not positive or an argument is no number."""
    terms: list[Term] = []
    for part in re.split(r"\s*\+\s*", text.strip()):
        match = _TERM.fullmatch(part)
        name = match[2] if match else part
        if match is None or name not in NAMES:
            raise BadInput(f"loss '{name}' is unknown; choose from {', '.join(NAMES)}, as in 0.5*ce+0.5*forward-kl")
        weight = float(match[1] or 1)
        if not weight > 0:
            raise BadInput(f"loss {part}: its weight is {weight:g}; it must be positive")
        label = f"{name}({match[3]})" if match[3] else name
        terms.append(Term(label, name, weight, _bound(LOSSES[name], match[3], part)))
    if len({term.label for term in terms}) < len(terms):
        raise BadInput(f"loss '{text}': names one loss twice; add up its weights")
    return terms


def _bound(loss: Callable[..., Tensor], arguments: str | None, part: str) -> Callable[..., Tensor]:
    """With what stands in parentheses as the arguments after the first that have a default."""
    if not arguments:
        return loss
    free = [p.name for p in inspect.signature(loss).parameters.values() if isinstance(p.default, int | float)]
    try:
        values = [float(value) for value in arguments.split(",")]
    except ValueError as error:
        raise BadInput(f"loss {part}: '{arguments}' should be numbers, separated by commas") from error
    if len(values) > len(free):
        raise BadInput(f"loss {part}: takes {', '.join(free) or 'no numbers'}; {len(values)} were given")
    return partial(loss, **dict(zip(free, values, strict=False)))


def check(
    terms: Sequence[Term], *, teacher: str, temperature: float, on_policy: float, force: bool, classify: bool = False
) -> None:
    """Raises BadInput where a loss cannot be had from what the teacher says: "online", "top-k" or "drawn"."""
    names = {term.name for term in terms}
    if classify and (beyond := sorted(names - CLASSIFYING)):
        raise BadInput(f"loss {beyond[0]}: is for language models; choose from {', '.join(sorted(CLASSIFYING))}")
    if not classify and "uskd" in names:
        raise BadInput("loss uskd: measures itself by its batch, as classifiers do; it is for sequence-classification")
    if names <= SETS.keys() and not force:
        raise BadInput(
            "loss: sinkhorn is blind to which row got which answer; add a loss of each row, such as "
            "forward-kl+0.1*sinkhorn, or --force it"
        )
    if teacher != "online":
        hears = {"ce"} | (FAITHFUL.keys() | LEARNED.keys() if teacher == "top-k" else {"forward-kl"})
        for name in sorted(names - hears):
            raise BadInput(f"loss {name}: cannot be had from a teacher kept as {teacher}; use --teacher online")
        if temperature != 1:
            raise BadInput("temperature: what is kept of a teacher was said at 1; use --teacher online")
        if on_policy:
            raise BadInput("on-policy: the teacher must answer what the student says; use --teacher online")
    if (own := sorted(names & ON_POLICY.keys())) and on_policy != 1:
        raise BadInput(f"loss {own[0]}: is for the student's own tokens; add --on-policy 1")


def pointwise(term: Term, signal: Signal, q_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(t, V) student's logits, (t,) tokens that came -> (t,).  Divergences at a temperature T are multiplied by T^2."""
    if term.name in FAITHFUL | LEARNED:
        if isinstance(signal, Top):
            return bucketed(term.loss, signal, q_logits)
        if isinstance(signal, Drawn):
            return drawn_cross_entropy(signal, q_logits)
        return temperature**2 * dense(term.loss, signal, q_logits, temperature)
    return term.loss(signal, q_logits, target)


def of_sets(term: Term, p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """p, q (sets, rows, V) logits, or hidden states (sets, rows, d) -> (sets,)."""
    if term.name != "sinkhorn-hidden":
        p, q = ((at_least_single(z) / temperature).softmax(-1) for z in (p, q))
    return term.loss(p, q)
