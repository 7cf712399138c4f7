"""Margins: the log-odds of the right label."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unlearn.model.ensemble import CHUNK_ROWS, Ensemble
from unlearn.model.examples import Examples


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - logsumexp of the other classes = log p_y / (1 - p_y).  (..., n, C), int (n,) -> (..., n)."""
    target = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, target, -math.inf).logsumexp(-1)
    return logits.gather(-1, target).squeeze(-1) - others


@torch.no_grad()
def margins_of(models: Ensemble, rows: Examples) -> Tensor:
    """(M, d), some models and rows at a time: over a whole vocabulary logits are large."""
    if models.large is not None:
        targets = rows.targets
        return torch.stack([
            torch.cat([margins(logits, targets[at]) for at, logits in models[i : i + 1].answers(rows)])
            for i in range(len(models))
        ])  # fmt: skip
    step = 10 if models.stacked else 1
    size = CHUNK_ROWS if rows.labels.dim() > 1 else 64 * CHUNK_ROWS
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    groups = [models[i : i + step] for i in range(0, len(models), step)]
    return torch.cat([torch.cat([margins(m.logits(part), part.targets) for part in parts], 1) for m in groups])


def margin_slope(logits: Tensor, labels: Tensor, shift: Tensor) -> Tensor:
    """Derivative of margins along a small shift of logits: linear in the shift, so that a scale of shifts can be read
    off it.  (d, C), (d,), (d, C) -> (d,)."""
    target = labels[:, None]
    others = logits.scatter(-1, target, -torch.inf).softmax(-1)
    return shift.gather(-1, target)[:, 0] - (others * shift).sum(-1)
