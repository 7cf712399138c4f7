"""Matching: move models to target answers, those that they would give without the forget set.

Oracle matching takes the answers of oracles, models that were retrained without the forget set; datamodel matching
(DMM, arXiv:2410.23232) those that a datamodel predicts. Nothing else differs, and labels are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.jobs.options import check_options, option
from calib.losses.divergences import forward_kl
from calib.losses.top_k import TopK, with_tail_bucket
from unlearn.methods.descent import StepContext, descend
from unlearn.model.ensemble import Ensemble, StackedParams
from unlearn.model.examples import Examples
from unlearn.options.methods import DISTANCE_NAMES

Targets = Tensor | TopK  # of d target positions: logits (d, C), or of a language model the most likely tokens
DistanceFunction = Callable[[Targets, Tensor], Tensor]  # targets and a model's logits (d, C) -> (d,)


def squares(target: Targets, outputs: Tensor) -> Tensor:
    """Mean over all logits of squared differences."""
    assert isinstance(target, Tensor)
    return (outputs - target).square().mean(-1)


def kl(target: Targets, outputs: Tensor) -> Tensor:
    """KL(target || model) of the distributions; of the k most likely tokens and all others together, where only those
    are kept."""
    if isinstance(target, TopK):
        return with_tail_bucket(forward_kl, target, outputs)
    return forward_kl(target.log_softmax(-1), outputs.log_softmax(-1))  # `dense` has a step that vmap cannot take


DISTANCES: dict[str, DistanceFunction] = {"squares": squares, "kl": kl}


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Settings of matching.  Many small steps move a model further than few large ones, at the same cost."""

    epochs: int = option(10, "over the forget set", ge=1)
    batch: int = option(8, "rows per step", ge=1)
    lr: float = option(1e-2, "learning rate", gt=0)
    forget_multiplier: int = option(1, "how often the forget set comes in an epoch", ge=1)
    retain_multiplier: float = option(5.0, "retained rows in an epoch for each that is forgotten", ge=0, lt=math.inf)
    fresh: bool = True  # other retained rows in every epoch; published code draws them once
    distance: str = option("squares", "from targets", DISTANCE_NAMES)
    eight_bit: bool = False  # moments in 8 bits (bitsandbytes)
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


def schedule(forget: Tensor, retain: Tensor, config: MatchingConfig) -> list[Tensor]:
    """Rows of every step, from the numbers of those to forget (f,) and to retain (r,), mixed."""
    generator = torch.Generator().manual_seed(config.seed)
    count = min(len(retain), round(config.retain_multiplier * len(forget)))
    steps, chosen = list[Tensor](), retain[:0]
    for epoch in range(config.epochs):
        if epoch == 0 or config.fresh:
            chosen = retain[torch.randperm(len(retain), generator=generator)[:count]]
        rows = torch.cat([forget.repeat(config.forget_multiplier), chosen])
        steps += rows[torch.randperm(len(rows), generator=generator)].split(config.batch)
    return steps


def match(
    ensemble: Ensemble,
    rows: Examples,
    targets: Tensor | Sequence[Targets],
    forget: Tensor,
    retain: Tensor,
    config: MatchingConfig,
    context: StepContext | None = None,
) -> Ensemble:
    """Move each model to its own targets.

    Args:
        ensemble: M models.
        rows: of the forget set and of retained rows.
        targets: for each model at the target positions of `rows`, (M, d, C) or M of `TopK`; those of rows neither in
            `forget` nor in `retain` do not matter.
        forget: numbers of rows (f,) of the forget set.
        retain: numbers of retained rows (r,).
        config: how fast, how long, by which distance.
        context: where steps are kept, what the models run with.

    Returns:
        The models, moved; the same ones where `forget` is empty.

    Raises:
        Diverged: a loss or a gradient is not finite.
    """
    context = context or StepContext()
    if not len(forget):
        return ensemble
    distance, steps = DISTANCES[config.distance], schedule(forget, retain, config)[: context.most]

    def losses(run: Callable[[], StackedParams], step: int) -> Iterator[dict[str, Tensor]]:
        parts = ensemble.parts(rows, steps[step])
        count = len(rows.target_positions(steps[step]))
        for part in parts:
            some, where = rows[part], rows.target_positions(part)

            def loss(params: StackedParams, target: Targets) -> Tensor:
                own = target[where]  # noqa: B023
                apart = ensemble.values(params, some, lambda at, logits: distance(own[at], logits))  # noqa: B023
                return apart.mean() if len(parts) == 1 else apart.sum() / count

            yield {"loss": ensemble.each(loss, run(), targets)}

    return descend(ensemble, losses, len(steps), config.lr, context, eight_bit=config.eight_bit)
