"""Steps of Adam on losses of several models at a time, kept as they go and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.jobs.journal import CheckpointSlot
from calib.jobs.training_loop import Group, OptimizerConfig, Parts, optimize, steps_done
from calib.runtime.progress import stage
from unlearn.methods.quantization_robust import Through, unchanged
from unlearn.model.ensemble import Ensemble, StackedParams

# losses(run, step): for rows that pass through the models one after another, parts of each model's own loss (M,);
# `run` gives the parameters to run with.
StepLosses = Callable[[Callable[[], StackedParams], int], Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class StepContext:
    """Context of training steps, whatever they descend on.

    slot: where they are kept; None: nowhere.
    through: from the weights that are trained to those that the models run with.
    most: only so many first steps are taken; None: all.
    """

    slot: CheckpointSlot | None = None
    through: Through = unchanged
    most: int | None = None


def descend(
    ensemble: Ensemble,
    losses: StepLosses,
    steps: int,
    lr: float,
    context: StepContext,
    *,
    after_step: Callable[[int, Parts], None] = lambda step, parts: None,
    keep: Mapping[str, Tensor] | None = None,
    eight_bit: bool = False,
) -> Ensemble:
    """Descend on the sum of losses, for all models, with Adam and a rate that falls along a cosine.

    Args:
        ensemble: M models.
        losses: parts of each step's losses; gradients are taken as they come, and losses of one name add up.
        steps: how many.
        lr: the rate that the first step has.
        context: where steps are kept, and what the models run with.
        after_step: called with a step's number and its mean losses by name.
        keep: further tensors that change as steps go, kept in the slot with the weights.
        eight_bit: moments in 8 bits (bitsandbytes).

    Returns:
        The models that were run: what `context.through` makes of the weights that were trained.

    Raises:
        Diverged: a loss or a gradient is not finite.
    """
    moving, through = ensemble.trained, context.through
    params = {name: p.clone().requires_grad_() if name in moving else p for name, p in ensemble.params.items()}

    def gradients(step: int) -> dict[str, float]:
        total = dict[str, float]()
        for parts in losses(lambda: through(params), step):
            torch.stack([part.sum() for part in parts.values()]).sum().backward()
            for name, part in parts.items():
                total[name] = total.get(name, 0.0) + float(part.detach().mean())
            del parts
        return total

    with stage("unlearn", steps, "steps", steps_done(context.slot)) as done:

        def after(step: int, parts: Parts) -> None:
            after_step(step, parts)
            done(", ".join(f"{name} {value:.4g}" for name, value in parts.items()))

        group = Group([p for p in params.values() if p.requires_grad], lr)
        config = OptimizerConfig(steps=steps, eight_bit=eight_bit)
        optimize([group], gradients, config, after_step=after, keep=keep, page=context.slot)
    for p in params.values():
        p.grad = None
    with torch.no_grad():
        return ensemble.with_params(through(params)).checked()
