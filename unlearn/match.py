"""Matching: move models to where, it is predicted, they would answer had they never seen the forget set.

Oracle Matching takes the answers of models that really never saw it, datamodel matching (DMM, arXiv:2410.23232) those
that a datamodel predicts. Nothing else differs, and labels are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from calib import BadInput
from calib.divergence import forward_kl
from calib.fit import Descent, Group, fit
from unlearn.ensemble import Ensemble

Loss = Callable[[Tensor, Tensor], Tensor]  # what is wanted and what is said (b, C) -> (b,)


def squares(wanted: Tensor, said: Tensor) -> Tensor:
    """Mean over all logits of squared differences."""
    return (said - wanted).square().mean(-1)


def kl(wanted: Tensor, said: Tensor) -> Tensor:
    """KL(wanted || said) of the distributions."""
    return forward_kl(wanted.log_softmax(-1), said.log_softmax(-1))  # `dense` has a step that vmap cannot take


DISTANCES: dict[str, Loss] = {"squares": squares, "kl": kl}


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a model is moved."""

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    forget_multiplier: int = 1  # how often the forget set comes in an epoch
    retain_multiplier: float = 5.0  # retained rows in an epoch, for each row that is forgotten
    fresh: bool = True  # other retained rows in every epoch; published code draws them once
    distance: str = "squares"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "forget_multiplier"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < math.inf or not 0 <= self.retain_multiplier < math.inf:
            raise BadInput("lr must be positive, retain-multiplier not negative")
        if self.distance not in DISTANCES:
            raise BadInput(f"distance '{self.distance}' is unknown; choose from {', '.join(DISTANCES)}")


def schedule(forget: Tensor, retain: Tensor, how: Match) -> list[Tensor]:
    """Rows of every step, from the numbers of those to forget (f,) and to retain (r,), mixed."""
    generator = torch.Generator().manual_seed(how.seed)
    count = min(len(retain), round(how.retain_multiplier * len(forget)))
    steps, chosen = list[Tensor](), retain[:0]
    for epoch in range(how.epochs):
        if epoch == 0 or how.fresh:
            chosen = retain[torch.randperm(len(retain), generator=generator)[:count]]
        rows = torch.cat([forget.repeat(how.forget_multiplier), chosen])
        steps += rows[torch.randperm(len(rows), generator=generator)].split(how.batch)
    return steps


def match(ensemble: Ensemble, inputs: Tensor, targets: Tensor, forget: Tensor, retain: Tensor, how: Match) -> Ensemble:
    """Move each model towards its own targets.  -> the models, moved; the same ones where nothing is to be forgotten.

    inputs (n, ...), targets (M, n, C): of rows that are neither in `forget` (f,) nor in `retain` (r,) they do not
    matter. Adam, its rate falling along a cosine.
    """
    if not len(forget):
        return ensemble
    distance, forward, steps = DISTANCES[how.distance], ensemble.forward, schedule(forget, retain, how)

    def loss(params: dict[str, Tensor], wanted: Tensor, rows: Tensor) -> Tensor:
        return distance(wanted[rows], forward(params, inputs[rows])).mean()

    losses = vmap(loss, in_dims=(0, 0, None))
    return descended(ensemble, lambda params, step: losses(params, targets, steps[step]), len(steps), how.lr)


def descended(
    ensemble: Ensemble, losses: Callable[[dict[str, Tensor], int], Tensor], steps: int, lr: float
) -> Ensemble:
    """losses(params, step) -> (M,), each model's own; descend on all of them."""
    params = {name: p.clone().requires_grad_() for name, p in ensemble.params.items()}

    def gradients(step: int) -> dict[str, float]:
        total = losses(params, step).sum()
        total.backward()
        return {"loss": float(total.detach()) / len(ensemble)}

    fit([Group(list(params.values()), lr)], gradients, Descent(steps=steps))
    return Ensemble(ensemble.make, {name: p.detach() for name, p in params.items()})
