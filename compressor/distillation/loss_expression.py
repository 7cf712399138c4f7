"""What a student is asked for: a weighted sum of losses, as `compressor.distillation.loss_syntax` reads it.

A teacher speaks through logits, through its most likely tokens, or through tokens drawn from it; each loss says which
of these it can hear. Pointwise losses are taken position by position, so vocabulary-sized tensors exist for some
positions at a time. Sinkhorn compares sets: it sees some rows of a step together, and does not see which row is which.
Hidden states are compared layer by layer, each with what the teacher has where the student's next block begins; there
too a student may be asked for an answer already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.targets import MULTI, REGRESSION, SINGLE, label_logits
from calib.losses.divergences import DIVERGENCES, Divergence, cross_entropy, dense, k2, k3
from calib.losses.sinkhorn import debiased, l1, sharp, sinkd, transport
from calib.losses.top_k import SampledTargets, TopK, sampled_cross_entropy, with_tail_bucket
from calib.model.bidirectional import bico_loss
from calib.runtime.precision import upcast
from compressor.distillation.loss_syntax import CLASSIFYING, FEATURES, WrittenTerm, read_terms
from compressor.distillation.losses.dac import dac_learned, dac_nucleus, span_correlation
from compressor.distillation.losses.decoupled import POINTWISE, Pointwise, bd_kd, ofa
from compressor.distillation.losses.matched import sorted_distance
from compressor.distillation.losses.relations import attention_relations
from compressor.distillation.losses.representation import gram_cauchy_schwarz, linear_cka, match_attention, match_hidden
from compressor.on_policy.policy import policy_loss

Signal = Tensor | TopK | SampledTargets  # what a teacher says at some positions: logits (t, V), or less
Compared = tuple[Tensor, Tensor]  # of sets: a loss (sets,), and the marginal error of its worst plan


def _ce(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(target, q_logits)


def _mse(p_logits: Tensor, q_logits: Tensor, target: Tensor) -> Tensor:
    return (upcast(p_logits) - upcast(q_logits)).square().sum(-1)


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
    return (upcast(logits) / tau).softmax(-1)


FAITHFUL_LOSSES: dict[str, Divergence] = DIVERGENCES | {
    "bd-kd": bd_kd,
    "dac-nucleus": dac_nucleus,
}  # of log-probabilities
LEARNED_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dac": dac_learned
}  # the same, after a net that is trained beside it
UNTAUGHT = {"ce", "grpo", "f-dpg", "bico"}  # losses that need no teacher in a backward pass
LABELED_LOSSES: dict[str, Pointwise] = {"ce": _ce} | POINTWISE  # of logits and the token that came
ON_POLICY_LOSSES: dict[str, Pointwise] = {"k2": _sampled(k2), "k3": _sampled(k3)}
REWARDED_LOSSES: dict[str, Callable[..., Tensor]] = dict.fromkeys(("grpo", "kdrl", "f-dpg"), policy_loss)  # of tokens
# Of rows of logits, drawn from the whole batch or each sequence for itself; or of hidden states.
SETS_LOSSES: dict[str, Callable[..., Compared]] = {
    "sinkhorn": _debiased,
    "sinkhorn-sharp": _sharp,
    "sinkhorn-sequence": _debiased,
    "sinkhorn-sequence-sharp": _sharp,
    "sinkhorn-hidden": _hidden,
    "sinkd": _sinkd,
}
SPANS_LOSSES: dict[str, Callable[..., Tensor]] = {"spans": span_correlation}  # of rows of one sequence, and spans in it
# Of hidden states (n, d) of some layers, the teacher's first; "attention" of distributions (B, H, T, T).
STATES_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hidden": lambda t, s: match_hidden(t, s).mean(),
    "cka": linear_cka,
    "gram": gram_cauchy_schwarz,
    "attention": match_attention,
    "align": lambda t, s, aligned: aligned(t, s).mean(),
}
TEMPERED = ("ofa", "ofa-exits")  # of what looks at the token that came; others have constants of their own
EXITS_LOSSES: dict[str, Pointwise] = {"ofa-exits": ofa}  # of answers given after some of the student's blocks
# Of rows of tokens (n, T), real and hidden ones, read in both directions.
BIDIRECTIONAL_LOSSES: dict[str, Callable[..., Tensor]] = {"bico": bico_loss}
# Of queries, keys and values of a teacher's layer and a student's, and a mask (B, T) of real tokens.
RELATIONS_LOSSES: dict[str, Callable[..., Tensor]] = {"attention-relations": attention_relations}
UNMATCHED_LOSSES: dict[str, Callable[..., Tensor]] = {"uld": sorted_distance}  # of tokens that one vocabulary has
OF_NUMBERS_LOSSES: dict[str, Pointwise] = {"mse": _mse}  # of what a regressor answers
LOSS_FUNCTIONS = (
    FAITHFUL_LOSSES
    | LEARNED_LOSSES
    | LABELED_LOSSES
    | ON_POLICY_LOSSES
    | REWARDED_LOSSES
    | SETS_LOSSES
    | SPANS_LOSSES
    | STATES_LOSSES
    | EXITS_LOSSES
    | BIDIRECTIONAL_LOSSES
    | RELATIONS_LOSSES
    | UNMATCHED_LOSSES
    | OF_NUMBERS_LOSSES
)
# By problem_type: each label of several is a distribution over two; a number is no distribution.
BY_PROBLEM = {
    SINGLE: CLASSIFYING - OF_NUMBERS_LOSSES.keys(),
    MULTI: {"ce", "bd-kd", *DIVERGENCES, *FEATURES},
    REGRESSION: {"ce", *OF_NUMBERS_LOSSES, *FEATURES},
}


@dataclass(frozen=True)
class LossTerm:
    """A loss of a sum, with its weight."""

    label: str  # as it was written
    name: str
    weight: float
    loss: Callable[..., Tensor]
    arguments: Mapping[str, float | str] = field(default_factory=dict)  # as they were written


def parse_loss(text: str) -> list[LossTerm]:
    """Parse a sum of losses such as 0.5*ce+js(0.9) into terms with their functions.  Raises BadInput."""
    return [
        LossTerm(
            one.label, one.name, one.weight, partial(LOSS_FUNCTIONS[one.name], **_arguments_of(one)), one.arguments
        )
        for one in read_terms(text)
    ]


def _arguments_of(one: WrittenTerm) -> dict[str, Any]:
    """Numbers of the loss itself: how answers are rewarded, what states are aligned with and which tokens are hidden is
    decided elsewhere."""
    return {} if one.name in (*REWARDED_LOSSES, *RELATIONS_LOSSES, "align", "bico") else dict(one.arguments)


def check_problem(terms: Sequence[LossTerm], problem: str, temperature: float) -> None:
    """Raises BadInput where a loss, or a temperature, means nothing for a classifier's `problem`
    (calib.data.targets)."""
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


def of_problem(term: LossTerm, problem: str, p: Tensor, q: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`pointwise` for a classifier: logits (n, C) and targets as `calib.data.targets` has them -> (n,).

    Of several labels, the sum over labels of the loss between Bernoulli distributions: `ce` is binary cross-entropy
    with logits, summed where the transformers library takes the mean. Of a number, `ce` is the squared error to the
    label and `mse` that to the teacher.
    """
    if problem == REGRESSION:
        return (upcast(q)[:, 0] - target).square() if term.name == "ce" else term.loss(p, q, target)
    if problem == MULTI:
        return pointwise(term, label_logits(p), label_logits(q), target.long(), temperature).sum(-1)
    return pointwise(term, p, q, target, temperature)


def pointwise(term: LossTerm, signal: Signal, q_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(t, V) student's logits, (t,) tokens that came -> (t,).  At a temperature T, times T^2."""
    if term.name in FAITHFUL_LOSSES | LEARNED_LOSSES:
        if isinstance(signal, TopK):
            return with_tail_bucket(term.loss, signal, q_logits)
        if isinstance(signal, SampledTargets):
            return sampled_cross_entropy(signal, q_logits)
        return temperature**2 * dense(term.loss, signal, q_logits, temperature)
    if term.name in UNMATCHED_LOSSES:
        return term.loss(signal, q_logits)
    if term.name in TEMPERED:
        return temperature**2 * term.loss(signal, q_logits, target, temperature=temperature)
    return term.loss(signal, q_logits, target)


def of_rewards(
    term: LossTerm, signal: Signal, q_logits: Tensor, target: Tensor, credit: tuple[Tensor, Tensor]
) -> Tensor:
    """(t, V) student's logits, (t,) tokens that it drew, and the credit of their answers (t,), (t,) -> (t,).  Without a
    teacher's logits nothing is pulled to it."""
    log_pi = -cross_entropy(target, q_logits)
    log_base = -cross_entropy(target, signal) if isinstance(signal, Tensor) and len(signal) else log_pi.detach()
    return term.loss(log_pi, log_base, *credit)


def of_sets(term: LossTerm, p: Tensor, q: Tensor, temperature: float) -> Compared:
    """p, q (sets, rows, V) logits, or hidden states (sets, rows, d) -> (sets,), and the plans' worst marginal error."""
    if term.name != "sinkhorn-hidden":
        p, q = p / temperature, q / temperature
    value, error = term.loss(p, q)
    return value, error.detach().max()
