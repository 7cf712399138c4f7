"""The one descent loop.  Methods hand it parameters and a closure; nobody subclasses a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib import Diverged
from calib.jobs.journal import CheckpointSlot, asked_to_stop
from calib.runtime.device import is_accelerator
from calib.runtime.distributed import (
    all_reduce_sum_,
    from_local_share,
    global_norm,
    group_by_kind,
    is_sharded,
    local_share,
)

Parts = Mapping[str, float]  # of a loss, by name; their sum is descended on


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate; gradients of groups of one `model` are clipped together."""

    params: Sequence[Tensor]
    lr: float
    model: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its rate rising over `warmup` steps and falling along a cosine to zero."""

    steps: int
    warmup: int = 0
    clip: float = math.inf  # greatest norm of the whole gradient
    decay: float = 0.0  # of weights, decoupled from the gradient
    eight_bit: bool = False  # moments in 8 bits (bitsandbytes; paged on CUDA)

    def rate(self, step: int) -> float:
        """Share of the learning rate that a step takes."""
        return min(1.0, (step + 1) / (self.warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def optimize(
    groups: Sequence[Group],
    gradients: Callable[[int], Parts],
    config: OptimizerConfig,
    *,
    after_step: Callable[[int, Parts], None] = lambda step, parts: None,
    keep: Mapping[str, Tensor] | None = None,
    page: CheckpointSlot | None = None,
) -> list[dict[str, float]]:
    """Descend.  -> the parts of the loss of every step.

    gradients(step) adds this process's share of the gradients to .grad and gives its share of the loss;
    after_step(step, parts) runs without a graph. Where there is a `page`, everything is written there as the steps go
    by, `keep` (tensors that are changed in place) included, and taken up from there: states whose loss and gradient
    were numbers, so the page outlives a descent that fails. Raises Diverged, and KeyboardInterrupt where a stop was
    asked for and the page is written.
    """
    params = [p for group in groups for p in group.params]
    numbers = dict.fromkeys(group.model for group in groups)
    models = [[p for group in groups if group.model == number for p in group.params] for number in numbers]
    optimizer = _optimizer(groups, config)
    kept = {f"param.{i}": p for i, p in enumerate(params)} | {f"keep.{n}": t for n, t in (keep or {}).items()}
    curve = [] if page is None else _resume(page, optimizer, params, kept)

    def write() -> None:
        if page is not None:
            moments, counts = _state(optimizer, params)
            every = kept | moments
            own = {name: local_share(t) for name, t in every.items() if is_sharded(t)}
            whole = {name: t for name, t in every.items() if name not in own}
            page.write(whole, {"curve": curve, "counts": counts}, own or None)

    for step in range(len(curve), config.steps):
        for setting, group in zip(optimizer.param_groups, groups, strict=True):
            setting["lr"] = group.lr * config.rate(step)
        optimizer.zero_grad(set_to_none=True)
        parts, stop, due = _everywhere(params, gradients(step), page)
        sizes = [global_norm([p.grad for p in own if p.grad is not None]) for own in models]
        wrong = [f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)]
        if not wrong and not all(size.isfinite() for size in sizes):
            wrong = ["a gradient is not finite"]
        if wrong:
            raise Diverged(f"step {step}: {', '.join(wrong)}; lower the learning rate")
        if page is not None and (due or stop):  # before this step: that state is known to be good
            write()
            if stop:
                raise KeyboardInterrupt
        for own, size in zip(models, sizes, strict=True) if config.clip < math.inf else ():
            for kind in group_by_kind(own):
                torch.nn.utils.clip_grads_with_norm_(kind, config.clip, size)
        optimizer.step()
        curve.append(parts)
        with torch.no_grad():
            after_step(step, parts)
    write()
    return curve


def steps_done(page: CheckpointSlot | None) -> int:
    """Count the steps that a slot holds of a training loop."""
    notes = None if page is None else page.notes()
    return 0 if notes is None else len(notes["curve"])


def totals(curve: Sequence[Parts]) -> list[float]:
    """The whole loss of every step."""
    return [sum(parts.values()) for parts in curve]


def _optimizer(groups: Sequence[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    settings: list[dict[str, Any]] = [{"params": list(g.params), "lr": g.lr} for g in groups]
    betas = (0.9, 0.95)
    if not config.eight_bit:
        return torch.optim.AdamW(settings, betas=betas, weight_decay=config.decay)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # not everyone has it

    kind = PagedAdamW8bit if is_accelerator(groups[0].params[0].device) else AdamW8bit
    return kind(settings, betas=betas, weight_decay=config.decay)


def _state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What an optimizer remembers, as tensors and, where it counts in plain numbers, those."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for i, p in enumerate(params):
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):  # tables of 8-bit codes are shared, which a file cannot say
                tensors[f"adam.{i}.{name}"] = value.clone() if name.startswith("qmap") else value
            else:
                counts[f"adam.{i}.{name}"] = value
    return tensors, counts


@torch.no_grad()
def _resume(
    page: CheckpointSlot, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], kept: Mapping[str, Tensor]
) -> list[dict[str, float]]:
    """Everything as the page has it.  -> the curve so far."""
    if (found := page.read()) is None:
        return []
    tensors, notes = found
    for name, tensor in kept.items():
        (local_share(tensor) if is_sharded(tensor) else tensor).copy_(tensors.pop(name))
    for name, value in [*tensors.items(), *notes["counts"].items()]:
        kind, _, rest = name.partition(".")
        if kind == "adam":
            index, _, what = rest.partition(".")
            p = params[int(index)]
            # AdamW counts steps on the CPU, whatever the parameters are on.
            here = value if not isinstance(value, Tensor) or what == "step" else value.to(p.device)
            if isinstance(here, Tensor) and is_sharded(p) and what != "step":
                here = from_local_share(here, p)
            optimizer.state[p][what] = here
    return list(notes["curve"])


def _everywhere(
    params: Sequence[Tensor], parts: Parts, page: CheckpointSlot | None
) -> tuple[dict[str, float], bool, bool]:
    """Sum gradients over processes.  -> the sum of their losses, whether any was asked to stop, and whether any thinks
    that the page is due."""
    names, due = list(parts), page is not None and page.due
    packed = torch.tensor(
        [*parts.values(), float(asked_to_stop()), float(due)], dtype=torch.float64, device=params[0].device
    )
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    all_reduce_sum_([packed])
    all_reduce_sum_([p.grad for p in params if p.grad is not None and not is_sharded(p)])  # shares are sums already
    *values, stop, asked = packed.tolist()
    return dict(zip(names, values, strict=True)), stop > 0, asked > 0


class MovingAverage:
    """An exponential moving average of parameters; the decay grows to its value, so that the first steps count less."""

    def __init__(self, params: Sequence[Tensor], decay: float) -> None:
        """decay: share of the average that a step leaves; 0: no average is taken."""
        self._params, self._decay = params, decay
        self._mean = [p.detach().clone() for p in params] if decay else []

    @property
    def kept(self) -> dict[str, Tensor]:
        """The average, as `optimize` keeps it."""
        return {f"mean.{i}": mean for i, mean in enumerate(self._mean)}

    def update(self, step: int) -> None:
        """Take in the parameters after a step."""
        for mean, p in zip(self._mean, self._params, strict=False):
            mean.lerp_(p.detach(), max(1 - self._decay, 1 / (step + 1)))

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the parameters their average, if one was taken."""
        for mean, p in zip(self._mean, self._params, strict=False):
            p.copy_(mean)


@contextmanager
def naming_rows(rows_of_step: Sequence[Sequence[int]], step: Callable[[], int]) -> Iterator[None]:
    """Have a Diverged say which rows the step had."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{error} (rows {', '.join(map(str, rows_of_step[step()]))})") from error
