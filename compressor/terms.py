"""What a student is asked for: a weighted sum of losses, written like `0.5*ce + forward-kl + 0.1*sinkhorn(0.05)`.

A teacher speaks through logits, through its most likely tokens, or through tokens drawn from it; each loss says which
of these it can hear. Pointwise losses are taken position by position, so vocabulary-sized tensors exist for some
positions at a time. Sinkhorn compares sets: it sees some rows of a step together, and does not see which row is which.
Hidden states are compared layer by layer, each with what the teacher has where the student's next block begins; there
too a student may be asked for an answer already.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calib import BadInput
from calib.divergence import DIVERGENCES, Divergence, cross_entropy, dense, k2, k3
from calib.precision import at_least_single
from calib.sinkhorn import debiased, l1, sharp, sinkd, transport
from calib.sparse import Drawn, Top, bucketed, drawn_cross_entropy
from calib.targets import MULTI, REGRESSION, SINGLE, label_logits
from compressor.dac import dac_learned, dac_nucleus, span_correlation
from compressor.losses import POINTWISE, Pointwise, bd_kd, ofa
from compressor.representation import gram_cauchy_schwarz, linear_cka, match_attention, match_hidden

Signal = Tensor | Top | Drawn  # what a teacher says at some positions: logits (t, V), or less
Compared = tuple[Tensor, Tensor]  # of sets: a loss (sets,), and the marginal error of its worst plan


def _ce(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(target, q_logits)


def _mse(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
    return (at_least_single(p_logits) - at_least_single(q_logits)).square().sum(-1)


def _sampled(estimator: Callable[[Tensor, Tensor], Tensor]) -> Pointwise:
    """Of tokens that the student drew, which are the targets."""

    def loss(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
        return estimator(-cross_entropy(target, p_logits), -cross_entropy(target, q_logits))

    return loss


def _debiased(p: Tensor, q: Tensor, eps: float = 0.1, tau: float = 1.0, sweeps: int = 100) -> Compared:
    return debiased(_softened(q, tau), _softened(p, tau), l1, eps, sweeps=int(sweeps))


def _sharp(p: Tensor, q: Tensor, eps: float = 0.1, tau: float = 1.0, sweeps: int = 20) -> Compared:
    cost = l1(_softened(q, tau), _softened(p, tau))
    plan = transport(cost, eps, sweeps=int(sweeps), anneal=False)
    return sharp(cost, plan), plan.error


def _hidden(p: Tensor, q: Tensor, eps: float = 0.1, sweeps: int = 100) -> Compared:
    return debiased(q, p, l1, eps, sweeps=int(sweeps))


def _sinkd(p: Tensor, q: Tensor, eps: float = 0.1, tau: float = 2.0, sweeps: int = 20) -> Compared:
    each = [sinkd(a, b, tau=tau, eps=eps, sweeps=int(sweeps)) for a, b in zip(p, q, strict=True)]
    return torch.stack(each), torch.zeros(len(each))


def _softened(logits: Tensor, tau: float) -> Tensor:
    return (at_least_single(logits) / tau).softmax(-1)


FAITHFUL: dict[str, Divergence] = DIVERGENCES | {"bd-kd": bd_kd, "dac-nucleus": dac_nucleus}  # of log-probabilities
LEARNED: dict[str, Callable[..., Tensor]] = {"dac": dac_learned}  # the same, after a net that is trained beside it
LABELLED: dict[str, Pointwise] = {"ce": _ce} | POINTWISE  # of logits and the token that came
ON_POLICY: dict[str, Pointwise] = {"k2": _sampled(k2), "k3": _sampled(k3)}
# Of rows of logits, drawn from the whole batch or each sequence for itself; or of hidden states.
SETS: dict[str, Callable[..., Compared]] = {
    "sinkhorn": _debiased,
    "sinkhorn-sharp": _sharp,
    "sinkhorn-sequence": _debiased,
    "sinkhorn-sequence-sharp": _sharp,
    "sinkhorn-hidden": _hidden,
    "sinkd": _sinkd,
}
SPANS: dict[str, Callable[..., Tensor]] = {"spans": span_correlation}  # of rows of one sequence, and spans in it
# Of hidden states (n, d) of some layers, the teacher's first; "attention" of distributions (B, H, T, T).
STATES: dict[str, Callable[..., Tensor]] = {
    "hidden": lambda t, s: match_hidden(t, s).mean(),
    "cka": linear_cka,
    "gram": gram_cauchy_schwarz,
    "attention": match_attention,
}
TEMPERED = ("ofa", "ofa-exits")  # of what looks at the token that came; others have constants of their own
EXITS: dict[str, Pointwise] = {"ofa-exits": ofa}  # of answers given after some of the student's blocks
OF_NUMBERS: dict[str, Pointwise] = {"mse": _mse}  # of what a regressor answers
LOSSES = FAITHFUL | LEARNED | LABELLED | ON_POLICY | SETS | SPANS | STATES | EXITS | OF_NUMBERS
NAMES = ("ce", *sorted(LOSSES.keys() - {"ce"}))
# Of a classifier: a row is one answer, a batch is a set.
CLASSIFYING = {*FAITHFUL, *LEARNED, *LABELLED, *OF_NUMBERS, "sinkhorn", "sinkhorn-sharp", "sinkd"}
# By problem_type: each label of several is a distribution over two; a number is no distribution.
BY_PROBLEM = {
    SINGLE: CLASSIFYING - OF_NUMBERS.keys(),
    MULTI: {"ce", "bd-kd", *DIVERGENCES},
    REGRESSION: {"ce", *OF_NUMBERS},
}

# Where an argument means something, and single precision is enough for it. JS and skew KL are exact at 0 and 1 too.
WITHIN: dict[str, tuple[float, float]] = {
    "eps": (1e-3, 1e3), "tau": (1e-2, 1e2), "sweeps": (1, 1e4), "heavier": (1, 1e2), "mass": (1e-2, 1),
    "bandwidth": (1e-2, 1e2), "gamma": (0, 1e2), "lam": (1e-1, 1e2), "e": (1e-1, 10), "alpha": (1e-2, 1 - 1e-2),
    "beta": (1e-2, 1 - 1e-2),
}  # fmt: skip

_TERM = re.compile(r"(?:(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*\*\s*)?([a-z][a-z0-9-]*)(?:\(([^()]*)\))?")


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
        if not 0 < weight < math.inf:
            raise BadInput(f"loss {part}: its weight is {weight:g}; it must be positive and finite")
        label = f"{name}({match[3]})" if match[3] else name
        terms.append(Term(label, name, weight, _bound(LOSSES[name], match[3], part)))
    if len({term.label for term in terms}) < len(terms):
        raise BadInput(f"loss '{text}': names one loss twice; add up its weights")
    return terms


def _bound(loss: Callable[..., Tensor], arguments: str | None, part: str) -> Callable[..., Tensor]:
    """With what stands in parentheses as the arguments after the first that have a default."""
    if not arguments:
        return loss
    free = [p.name for p in inspect.signature(loss).parameters.values() if p.name in WITHIN]
    try:
        values = [float(value) for value in arguments.split(",")]
    except ValueError as error:
        raise BadInput(f"loss {part}: '{arguments}' should be numbers, separated by commas") from error
    if len(values) > len(free):
        raise BadInput(f"loss {part}: takes {', '.join(free) or 'no numbers'}; {len(values)} were given")
    bound = dict(zip(free, values, strict=False))
    for name, value in bound.items():
        low, high = WITHIN[name]
        exact = (0, 1) if name in ("alpha", "beta") else ()
        if not (low <= value <= high or value in exact):
            also = "0, 1 or " if exact else ""
            raise BadInput(f"loss {part}: {name} is {value:g}; it must be {also}from {low:g} to {high:g}")
    return partial(loss, **bound)


def check(
    terms: Sequence[Term], *, teacher: str, temperature: float, on_policy: float, force: bool, classify: bool = False
) -> None:
    """Raises BadInput where a loss cannot be had from what the teacher says: "online", "top-k" or "drawn"."""
    names = {term.name for term in terms}
    if classify and (beyond := sorted(names - CLASSIFYING)):
        raise BadInput(f"loss {beyond[0]}: is for language models; choose from {', '.join(sorted(CLASSIFYING))}")
    if not classify and "uskd" in names:
        raise BadInput("loss uskd: measures itself by its batch, as classifiers do; it is for sequence-classification")
    if not classify and "mse" in names:
        raise BadInput("loss mse: compares the numbers of regressors; it is for sequence-classification")
    by_row = FAITHFUL.keys() | LEARNED.keys() | LABELLED.keys() | ON_POLICY.keys() | {"hidden"}
    if names & SETS.keys() and not names & by_row and not force:
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


def check_problem(terms: Sequence[Term], problem: str, temperature: float) -> None:
    """Raises BadInput where a loss, or a temperature, means nothing for a classifier's `problem` (calib.targets)."""
    allowed = BY_PROBLEM[problem]
    if beyond := sorted({term.name for term in terms} - allowed):
        why = {
            SINGLE: "compares numbers, and the model chooses among classes",
            MULTI: "compares classes that exclude each other, and the model gives each row several labels",
            REGRESSION: "compares distributions, and the model gives one number",
        }[problem]
        instead = "such as mse, or ce+mse" if problem == REGRESSION else f"of {', '.join(sorted(allowed))}"
        raise BadInput(f"loss {beyond[0]}: {why} ({problem}); give --loss {instead}")
    if problem == REGRESSION and temperature != 1:
        raise BadInput(f"temperature: divides logits, and the model gives one number ({problem}); leave it out")


def of_problem(term: Term, problem: str, p: Tensor, q: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`pointwise` for a classifier: logits (n, C) and targets as `calib.targets` has them -> (n,).

    Of several labels, the sum over labels of the loss between Bernoulli distributions: `ce` is binary cross-entropy
    with logits, summed where the transformers library takes the mean. Of a number, `ce` is the squared error to the
    label and `mse` that to the teacher.
    """
    if problem == REGRESSION:
        return (at_least_single(q)[:, 0] - target).square() if term.name == "ce" else term.loss(p, q, target)
    if problem == MULTI:
        return pointwise(term, label_logits(p), label_logits(q), target.long(), temperature).sum(-1)
    return pointwise(term, p, q, target, temperature)


def pointwise(term: Term, signal: Signal, q_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(t, V) student's logits, (t,) tokens that came -> (t,).  At a temperature T, times T^2."""
    if term.name in FAITHFUL | LEARNED:
        if isinstance(signal, Top):
            return bucketed(term.loss, signal, q_logits)
        if isinstance(signal, Drawn):
            return drawn_cross_entropy(signal, q_logits)
        return temperature**2 * dense(term.loss, signal, q_logits, temperature)
    if term.name in TEMPERED:
        return temperature**2 * term.loss(signal, q_logits, target, temperature=temperature)
    return term.loss(signal, q_logits, target)


def of_sets(term: Term, p: Tensor, q: Tensor, temperature: float) -> Compared:
    """p, q (sets, rows, V) logits, or hidden states (sets, rows, d) -> (sets,), and the plans' worst marginal error."""
    if term.name != "sinkhorn-hidden":
        p, q = p / temperature, q / temperature
    value, error = term.loss(p, q)
    return value, error.detach().max()
