"""Losses that make a model forget or retain, and what they are given.

All are means over target positions (tokens of answers; prompts and padding have none), unless they say over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calib import BadInput
from calib.losses.chunked_head import Head
from unlearn.methods.matching import Targets, kl
from unlearn.model.examples import Examples
from unlearn.options.methods import RETAIN_LOSS_NAMES

LOG_RATIO_BOUND = 20.0  # of log-ratios that are put into an exponential


@dataclass(frozen=True)
class LossInputs:
    """Some rows of one model.

    now: its answers at their target positions (d, C); of methods on hidden states, those (d, width); with a `head`,
        last states, of which that makes logits (so a loss on logits asks for them with `each`).
    before: answers of the model as it was, a constant: no reference model is in memory.
    nats_before: of each label, of the model as it was (d,).
    of: the rows.
    size: of methods on hidden states, the mean norm that states had before, over all rows of the step.
    seed: of what a loss draws.
    """

    now: Tensor
    before: Targets
    nats_before: Tensor
    of: Examples
    head: Head | None = None
    size: Tensor | None = None
    seed: int = 0

    @property
    def nats(self) -> Tensor:
        """Cross-entropy of each label, (d,)."""
        targets = self.of.targets
        return self.each(lambda at, logits: cross_entropy(logits, targets[at], reduction="none"))

    @property
    def kl(self) -> Tensor:
        """KL(before || now), (d,)."""
        return self.each(lambda at, logits: kl(self.before[at], logits))

    def each(self, values: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """values(positions, their logits (t, C)) -> (t, ...), of all positions, some at a time.  -> (d, ...)."""
        return values(slice(None), self.now) if self.head is None else self.head.each(self.now, values)

    @property
    def log_ratio(self) -> Tensor:
        """Log of each row's probability now over before, (b,)."""
        return self.of.sums(self.nats_before - self.nats)


Loss = Callable[[LossInputs], Tensor]


@dataclass(frozen=True)
class LossPair:
    """A method's losses on the forget set and on retained rows; None: no such rows are trained on.

    apart: the two are not taken in one step; the forget set comes in the first half of the epochs only.
    on_states: they are of hidden states, not of logits.
    by_row: the loss on the forget set is a mean over rows.
    unbounded: the loss on the forget set falls for ever.
    """

    forget: Loss | None
    retain: Loss | None
    apart: bool = False
    on_states: bool = False
    by_row: bool = False
    unbounded: bool = False


def label_cross_entropy(rows: LossInputs) -> Tensor:
    """Mean nats of the labels."""
    return rows.nats.mean()


def kl_to_reference(rows: LossInputs) -> Tensor:
    """Mean KL(before || now)."""
    return rows.kl.mean()


def rehearsed(rows: LossInputs, form: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of a form of each label's log-ratio to the model before (DPH-RL, arXiv:2509.07430)."""
    return form((rows.nats_before - rows.nats).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).mean()


REHEARSALS: dict[str, Callable[[Tensor], Tensor]] = {  # of log u; never negative, zero at u = 1
    "forward-kl": lambda r: torch.expm1(r) - r,
    "js": lambda r: r.exp() * r - (r.exp() + 1) * (torch.nn.functional.softplus(r) - math.log(2)),
    "alpha": lambda r: ((0.8 * r).exp() - 0.8 * r.exp() - 0.2) / (0.2 * -0.8),  # a = 0.2
}
RETAIN_LOSSES: dict[str, Loss] = dict(
    zip(
        RETAIN_LOSS_NAMES,
        (label_cross_entropy, kl_to_reference, *(partial(rehearsed, form=form) for form in REHEARSALS.values())),
        strict=True,
    )
)


def retain_loss_of(losses: LossPair, asked: str) -> Loss | None:
    """A method's loss on retained rows.  Raises BadInput where the method leaves no choice."""
    if asked != "ce" and (losses.retain is not label_cross_entropy or losses.forget is None):
        raise BadInput(f"retain-loss {asked}: the method has a loss of its own on retained rows, or none; leave it out")
    return RETAIN_LOSSES[asked] if losses.retain is label_cross_entropy else losses.retain
