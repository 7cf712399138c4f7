"""Matching: move models to where, it is predicted, they would answer had they never seen the forget set.

Oracle Matching takes the answers of models that really never saw it, datamodel matching (DMM, arXiv:2410.23232) those
that a datamodel predicts. Nothing else differs, and labels are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib import BadInput
from calib.jobs.journal import CheckpointSlot
from calib.jobs.training_loop import Group, OptimizerConfig, Parts, optimize, steps_done
from calib.losses.divergences import forward_kl
from calib.losses.top_k import TopK, with_tail_bucket
from calib.runtime.progress import stage
from unlearn.methods.quantization_robust import Through, unchanged
from unlearn.model.ensemble import Ensemble, StackedParams
from unlearn.model.examples import Examples

Targets = Tensor | TopK  # of d decisions: logits (d, C), or of a language model the most likely tokens
DistanceFunction = Callable[[Targets, Tensor], Tensor]  # what is wanted and the logits that are said (d, C) -> (d,)


def squares(target: Targets, outputs: Tensor) -> Tensor:
    """Mean over all logits of squared differences."""
    assert isinstance(target, Tensor)
    return (outputs - target).square().mean(-1)


def kl(target: Targets, outputs: Tensor) -> Tensor:
    """KL(wanted || said) of the distributions; of the k most likely tokens and all others together, where only those
    are kept."""
    if isinstance(target, TopK):
        return with_tail_bucket(forward_kl, target, outputs)
    return forward_kl(target.log_softmax(-1), outputs.log_softmax(-1))  # `dense` has a step that vmap cannot take


DISTANCES: dict[str, DistanceFunction] = {"squares": squares, "kl": kl}


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How a model is moved."""

    epochs: int = 10
    batch: int = 8  # many small steps move a model further than few large ones, at the same cost
    lr: float = 1e-2
    forget_multiplier: int = 1  # how often the forget set comes in an epoch
    retain_multiplier: float = 5.0  # retained rows in an epoch, for each row that is forgotten
    fresh: bool = True  # other retained rows in every epoch; published code draws them once
    distance: str = "squares"
    eight_bit: bool = False  # moments in 8 bits (bitsandbytes)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "forget_multiplier"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < math.inf or not 0 <= self.retain_multiplier < math.inf:
            raise BadInput("lr must be positive, retain-multiplier not negative")
        if self.distance not in DISTANCES:
            raise BadInput(f"distance '{self.distance}' is unknown; choose from {', '.join(DISTANCES)}")


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
    page: CheckpointSlot | None = None,
    through: Through = unchanged,
    *,
    most: int | None = None,
) -> Ensemble:
    """Move each model towards its own targets.  -> the models, moved; the same ones where nothing is to be forgotten.

    targets: what is wanted of each model at the decisions of `rows`, (M, d, C) or M of `TopK`; of rows that are neither
    in `forget` (f,) nor in `retain` (r,) they do not matter. Adam, its rate falling along a cosine; where
    `most` is given only so many first steps are taken.
    """
    if not len(forget):
        return ensemble
    distance, steps = DISTANCES[config.distance], schedule(forget, retain, config)[:most]

    def losses(run: Callable[[], StackedParams], step: int) -> Iterator[dict[str, Tensor]]:
        parts = ensemble.parts(rows, steps[step])
        count = len(rows.decisions(steps[step]))
        for part in parts:
            some, where = rows[part], rows.decisions(part)

            def loss(params: StackedParams, target: Targets) -> Tensor:
                own = target[where]  # noqa: B023
                apart = ensemble.values(params, some, lambda at, logits: distance(own[at], logits))  # noqa: B023
                return apart.mean() if len(parts) == 1 else apart.sum() / count

            yield {"loss": ensemble.each(loss, run(), targets)}

    return descended(ensemble, losses, len(steps), config.lr, page=page, through=through, eight_bit=config.eight_bit)


def descended(
    ensemble: Ensemble,
    losses: Callable[[Callable[[], StackedParams], int], Iterable[Mapping[str, Tensor]]],
    steps: int,
    lr: float,
    *,
    page: CheckpointSlot | None = None,
    after_step: Callable[[int, Parts], None] = lambda step, parts: None,
    keep: Mapping[str, Tensor] | None = None,
    through: Through = unchanged,
    eight_bit: bool = False,
) -> Ensemble:
    """Descend on the sum of losses, for all models.

    losses(run, step) gives, for rows that pass through the models one after another, parts of each model's own loss
    (M,); `run` gives the parameters to run with. Gradients are taken as they come, and losses of one name add up.

    What the models run with, and what they are in the end, is what `through` makes of what is trained.
    Raises Diverged where a loss or a gradient is no number.
    """
    moving = ensemble.trained
    params = {name: p.clone().requires_grad_() if name in moving else p for name, p in ensemble.params.items()}

    def gradients(step: int) -> dict[str, float]:
        total = dict[str, float]()
        for parts in losses(lambda: through(params), step):
            torch.stack([part.sum() for part in parts.values()]).sum().backward()
            for name, part in parts.items():
                total[name] = total.get(name, 0.0) + float(part.detach().mean())
            del parts
        return total

    with stage("unlearn", steps, "steps", steps_done(page)) as done:

        def after(step: int, parts: Parts) -> None:
            after_step(step, parts)
            done(", ".join(f"{name} {value:.4g}" for name, value in parts.items()))

        group = Group([p for p in params.values() if p.requires_grad], lr)
        descent = OptimizerConfig(steps=steps, eight_bit=eight_bit)
        optimize([group], gradients, descent, after_step=after, keep=keep, page=page)
    for p in params.values():
        p.grad = None
    with torch.no_grad():
        return ensemble.with_params(through(params)).checked()
