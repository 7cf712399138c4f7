"""The one descent loop.  Methods hand it parameters and a closure; nobody subclasses a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib import Failed
from calib.journal import Page, asked_to_stop
from calib.parallel import add_up


class Diverged(Failed):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    params: Sequence[Tensor]
    lr: float


def fit(
    groups: Sequence[Group],
    gradients: Callable[[int], float],
    *,
    steps: int,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    keep: Mapping[str, Tensor] | None = None,
    page: Page | None = None,
) -> list[float]:
    """Adam with a cosine schedule to zero.  -> the loss of every step.

    gradients(step) adds this process's share of the gradients to .grad and gives its share of the loss;
    after_step(step, loss) runs without a graph. Where there is a `page`, everything is written there as the steps go
    by, `keep` (tensors that are changed in place) included, and taken up from there. Raises Diverged, and
    KeyboardInterrupt where a stop was asked for and the page is written.
    """
    params = [p for group in groups for p in group.params]
    optimizer = torch.optim.Adam([{"params": list(g.params), "lr": g.lr} for g in groups], betas=(0.9, 0.95))
    kept = {f"param.{i}": p for i, p in enumerate(params)} | {f"keep.{n}": t for n, t in (keep or {}).items()}
    curve: list[float] = []
    if page is not None and (found := page.read()) is not None:
        tensors, notes = found
        curve = notes["curve"]
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(tensors[name])
        for i, p in enumerate(params):
            if f"adam.{i}.step" in tensors:
                optimizer.state[p] = {
                    "step": tensors[f"adam.{i}.step"],
                    **{n: tensors[f"adam.{i}.{n}"].to(p.device) for n in ("exp_avg", "exp_avg_sq")},
                }
    for step in range(len(curve), steps):
        for setting, group in zip(optimizer.param_groups, groups, strict=True):
            setting["lr"] = group.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        value, stop = _everywhere(params, gradients(step))
        curve.append(value)
        if not math.isfinite(value) or any(p.grad is not None and not p.grad.isfinite().all() for p in params):
            raise Diverged(f"step {step}: the loss is {value} or a gradient is not finite; lower the learning rate")
        optimizer.step()
        with torch.no_grad():
            after_step(step, value)
        if page is not None and (page.due or stop or step == steps - 1):
            adam = {f"adam.{i}.{n}": t for i, p in enumerate(params) for n, t in optimizer.state.get(p, {}).items()}
            page.write(kept | adam, {"curve": curve})
            if stop:
                raise KeyboardInterrupt
    return curve


def _everywhere(params: Sequence[Tensor], loss: float) -> tuple[float, bool]:
    """Sum gradients over processes.  -> the sum of their losses, and whether any was asked to stop."""
    said = torch.tensor([loss, float(asked_to_stop())], dtype=torch.float64, device=params[0].device)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    add_up([said])
    add_up([p.grad for p in params if p.grad is not None])
    return float(said[0]), bool(said[1] > 0)
