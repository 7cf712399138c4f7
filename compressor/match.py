"""The objective that learning and tuning share: say what the float model says, on the calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.corpus import Corpus
from calib.divergence import KL_TOP, Top, cross_entropy, masked_mean
from calib.fit import Group, fit


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is descended on, and for how long."""

    steps: int
    batch: int  # rows a step
    loss: str  # a key of KL_TOP
    cross_entropy: float  # weight of the data's own next tokens beside the teacher's
    seed: int


def match(
    forward: Callable[[Tensor], Tensor],
    head: Tensor,
    corpus: Corpus,
    top: Top,
    groups: Sequence[Group],
    how: Objective,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Descend on the mean KL-Top to `top` over all rows, each as often as any other.  -> the loss of every step.

    forward(ids (B, T)) gives final hidden states (B, T, d); logits are those @ head^T, head (V, d).
    """
    generator = torch.Generator().manual_seed(how.seed)
    order: list[int] = []

    def row_loss(hidden: Tensor, row: int) -> Tensor:
        logits = hidden @ head.mT
        ids, mask = corpus.ids[row].to(hidden.device), corpus.mask[row].to(hidden.device)
        value = masked_mean(KL_TOP[how.loss](top[row], logits), mask)
        if how.cross_entropy:
            value = value + how.cross_entropy * masked_mean(cross_entropy(ids[1:], logits[:-1]), mask[1:])
        return value

    def loss(step: int) -> Tensor:
        before_step(step)
        while len(order) < how.batch:
            order.extend(torch.randperm(len(corpus.ids), generator=generator).tolist())
        rows, order[:] = order[: how.batch], order[how.batch :]
        hidden = forward(corpus.ids[rows].to(head.device))
        return torch.stack([row_loss(h, row) for h, row in zip(hidden, rows, strict=True)]).mean()

    return fit(groups, loss, steps=how.steps, after_step=after_step)
