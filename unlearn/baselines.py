"""What else is done to make a model forget: each a loss of logits, some with a part for what is to be retained.

    ascent       -CE on the forget set
    retain       CE on what is retained
    difference   -CE on the forget set + CE on what is retained (GradDiff)
    npo          -(2 / b) log s(b (l - l_0)) + CE on what is retained, l the loss of a forgotten row now and l_0 before,
                 s the logistic function (NPO, arXiv:2404.05868)
    simnpo       the same of l alone: -(2 / b) log s(b (l - delta)) (SimNPO, arXiv:2410.07163)
    scrub        in the first half of the epochs -KL(before || now) on the forget set; in all of them
                 KL(before || now) + CE on what is retained (SCRUB, arXiv:2302.09880)

What a model said before is a constant, computed once. One published SCRUB descends on the frozen teacher's parameters,
so that its student never moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy, logsigmoid

from calib import BadInput
from unlearn.ensemble import Ensemble
from unlearn.match import descended, kl


@dataclass(frozen=True)
class Rows:
    """Some rows of one model: logits now and before (b, C), labels (b,)."""

    now: Tensor
    before: Tensor
    labels: Tensor

    @property
    def nats(self) -> Tensor:
        return cross_entropy(self.now, self.labels, reduction="none")

    @property
    def nats_before(self) -> Tensor:
        return cross_entropy(self.before, self.labels, reduction="none")


def away(rows: Rows) -> Tensor:
    return -rows.nats.mean()


def towards(rows: Rows) -> Tensor:
    return rows.nats.mean()


def npo(rows: Rows, beta: float = 0.1) -> Tensor:
    return -2 / beta * logsigmoid(beta * (rows.nats - rows.nats_before)).mean()


def simnpo(rows: Rows, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    return -2 / beta * logsigmoid(beta * (rows.nats - delta)).mean()


def astray(rows: Rows) -> Tensor:
    return -kl(rows.before, rows.now).mean()


def as_before(rows: Rows) -> Tensor:
    return kl(rows.before, rows.now).mean() + rows.nats.mean()


Loss = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Baseline:
    """Losses on the forget set and on what is retained; where `first` they do not go together: the forget set comes
    alone, and in the first half of the epochs only."""

    forget: Loss | None
    retain: Loss | None
    first: bool = False


BASELINES: dict[str, Baseline] = {
    "ascent": Baseline(away, None),
    "retain": Baseline(None, towards),
    "difference": Baseline(away, towards),
    "npo": Baseline(npo, towards),
    "simnpo": Baseline(simnpo, towards),
    "scrub": Baseline(astray, as_before, first=True),
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How long and how fast."""

    epochs: int = 5  # over the forget set
    batch: int = 32  # rows to forget in a step
    lr: float = 1e-3
    retain_multiplier: float = 1.0  # retained rows for each that is forgotten
    weight: float = 1.0  # of the loss on the forget set, beside 1 of the other
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise BadInput("epochs and batch must be at least 1")
        for name in ("lr", "retain_multiplier", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")


def forget(
    name: str, ensemble: Ensemble, inputs: Tensor, labels: Tensor, forgotten: Tensor, retained: Tensor, how: Tuning
) -> Ensemble:
    """Make every model forget by the baseline called `name`.  -> the models; the same where nothing is to be forgotten.

    inputs (n, ...), labels (n,), forgotten (f,) and retained (r,) numbers of rows. Raises BadInput for an unknown name.
    """
    if name not in BASELINES:
        raise BadInput(f"method '{name}' is unknown; choose from {', '.join(BASELINES)}")
    if not len(forgotten):
        return ensemble
    method, before, forward = BASELINES[name], ensemble.logits(inputs), ensemble.forward
    steps = _steps(method, forgotten, retained, how)

    def loss(params: dict[str, Tensor], said: Tensor, some: Tensor, others: Tensor) -> Tensor:
        total = torch.zeros((), dtype=said.dtype, device=said.device)
        for part, rows, weight in ((method.forget, some, how.weight), (method.retain, others, 1.0)):
            if part is not None and len(rows):
                total = total + weight * part(Rows(forward(params, inputs[rows]), said[rows], labels[rows]))
        return total

    losses = vmap(loss, in_dims=(0, 0, None, None))
    return descended(ensemble, lambda params, step: losses(params, before, *steps[step]), len(steps), how.lr)


def _steps(method: Baseline, forgotten: Tensor, retained: Tensor, how: Tuning) -> list[tuple[Tensor, Tensor]]:
    """Rows to forget and to retain in each step."""
    generator, steps, none = torch.Generator().manual_seed(how.seed), list[tuple[Tensor, Tensor]](), forgotten[:0]
    for epoch in range(how.epochs):
        some = forgotten[torch.randperm(len(forgotten), generator=generator)].split(how.batch)
        count = round(how.retain_multiplier * len(forgotten))
        drawn = retained[torch.randint(len(retained), (count,), generator=generator)]
        others = drawn.tensor_split(len(some)) if method.retain else [none] * len(some)
        if method.first:
            steps += [(rows, none) for rows in some if 2 * epoch < how.epochs]
            steps += [(none, rows) for rows in others]
        else:
            steps += list(zip(some, others, strict=True))
    return steps
