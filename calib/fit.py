"""The one descent loop.  Methods hand it parameters and a closure; nobody subclasses a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    params: Sequence[Tensor]
    lr: float


def fit(
    groups: Sequence[Group],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Adam with a cosine schedule to zero.  -> the loss of every step.

    `loss(step)` is a scalar with a graph to the parameters; `after_step(step, loss)` runs without one. Raises Diverged.
    """
    optimizer = torch.optim.Adam([{"params": list(g.params), "lr": g.lr} for g in groups], betas=(0.9, 0.95))

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        curve.append(value.item())
        if not math.isfinite(curve[-1]) or any(
            p.grad is not None and not p.grad.isfinite().all() for g in groups for p in g.params
        ):
            raise Diverged(f"step {step}: the loss is {curve[-1]} or a gradient is not finite; lower the learning rate")
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            after_step(step, curve[-1])
    return curve
