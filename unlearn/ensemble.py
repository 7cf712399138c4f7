"""Many small models, each trained on its own part of the data, all at once: oracles, and what datamodels are fit on.

The parameters of all models are stacked, and one pass of `torch.func.vmap` trains all of them: for models of some ten
thousand parameters a hundred take little longer than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from calib import BadInput

Params = dict[str, Tensor]  # of all models, (M, ...) each


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier is trained: SGD with momentum, its rate rising for a while and then falling to zero."""

    epochs: int = 20
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4  # added to the gradient, as a penalty on the weights
    warmup: float = 0.25  # share of all steps

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "momentum", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 < self.warmup < 1:
            raise BadInput(f"warmup is {self.warmup}; it must lie between 0 and 1")

    def rate(self, step: Tensor, steps: Tensor) -> Tensor:
        """Of a step among all, for each model."""
        done = (step + 1) / (steps + 1)
        return self.lr * torch.minimum(done / self.warmup, (1 - done) / (1 - self.warmup))


@dataclass(frozen=True)
class Ensemble:
    """Models of one architecture; `make` gives a fresh one, whose own weights do not matter."""

    make: Callable[[], nn.Module]
    params: Params

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def __getitem__(self, which: slice | Tensor | Sequence[int]) -> Ensemble:
        return Ensemble(self.make, {name: p[which] for name, p in self.params.items()})

    def __or__(self, other: Ensemble) -> Ensemble:
        return Ensemble(self.make, {name: torch.cat([p, other.params[name]]) for name, p in self.params.items()})

    def logits(self, inputs: Tensor, at_once: int = 4096) -> Tensor:
        """What each model says of the same inputs (n, ...).  -> (M, n, C)."""
        run, parts = vmap(self.forward, in_dims=(0, None)), inputs.split(at_once)
        with torch.no_grad():
            return torch.cat([run(self.params, part) for part in parts], 1)

    @property
    def forward(self) -> Callable[[Params, Tensor], Tensor]:
        """Parameters of one model and inputs (b, ...) -> logits (b, C).  To be put under vmap."""
        model = self.make()
        return lambda params, inputs: functional_call(model, params, (inputs,))


def initial(make: Callable[[], nn.Module], seeds: Sequence[int]) -> Ensemble:
    """As each seed initialises them.  Raises BadInput where a model has buffers: they would be one model's for all."""
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(make())
    params, buffers = stack_module_state(models)
    if buffers:
        raise BadInput(f"model: has buffers ({next(iter(buffers))}), which models that are stacked cannot have")
    return Ensemble(make, {name: p.detach() for name, p in params.items()})


def train(
    ensemble: Ensemble, inputs: Tensor, labels: Tensor, masks: Tensor, seeds: Sequence[int], how: Training
) -> Ensemble:
    """Train each model on the rows that its mask leaves.  -> the same models, trained.

    inputs (n, ...), labels int (n,), masks bool (M, n). A seed gives a model's order of rows: models of one seed see
    the rows that they share in one order, as far as what lies between them allows. The step of a model depends on
    nothing but its own rows and seed, so it does not matter which others are trained beside it. Raises BadInput where a
    mask leaves nothing.
    """
    if not masks.any(1).all():
        raise BadInput(f"ensemble: model {int((~masks.any(1)).nonzero()[0])} has no row to train on")
    params = {name: p.clone().requires_grad_() for name, p in ensemble.params.items()}
    moments = {name: torch.zeros_like(p) for name, p in params.items()}
    forward = ensemble.forward

    def loss(params: Params, rows: Tensor, real: Tensor) -> Tensor:
        nats = cross_entropy(forward(params, inputs[rows]), labels[rows], reduction="none")
        return (nats * real).sum() / real.sum().clamp(min=1)

    losses = vmap(loss, randomness="different")
    steps_of = (masks.sum(1) / how.batch).ceil().long()  # in an epoch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for epoch in range(how.epochs):
        orders, within = _orders(masks, generators)
        for step in range(int(steps_of.max())):
            some = slice(step * how.batch, (step + 1) * how.batch)
            total = losses(params, orders[:, some], within[:, some]).sum()
            gradients = torch.autograd.grad(total, list(params.values()))
            rates = how.rate(epoch * steps_of + step, how.epochs * steps_of).where(step < steps_of, 0.0)
            _descend(params, moments, gradients, rates, how)
    return Ensemble(ensemble.make, {name: p.detach() for name, p in params.items()})


def _orders(masks: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """(M, most rows of any): each model's rows in an order of its own, filled up with one of them; which count."""
    counts = masks.sum(1)
    orders = torch.empty(len(masks), int(counts.max()), dtype=torch.long)
    for order, mask, generator in zip(orders, masks, generators, strict=True):
        all_rows = torch.randperm(len(mask), generator=generator)
        own = all_rows[mask[all_rows]]
        order[: len(own)], order[len(own) :] = own, own[0]
    return orders, torch.arange(orders.shape[1]) < counts[:, None]


@torch.no_grad()
def _descend(params: Params, moments: Params, gradients: Sequence[Tensor], rates: Tensor, how: Training) -> None:
    """One step of SGD for every model whose rate is not zero."""
    for (name, p), gradient in zip(params.items(), gradients, strict=True):
        rate = rates.view(-1, *[1] * (p.dim() - 1)).to(p)
        moving = rate > 0
        moment = moments[name]
        moment.copy_(torch.where(moving, how.momentum * moment + gradient + how.decay * p, moment))
        p.sub_(rate * moment)


def subsets(count: int, rows: int, share: float, seed: int) -> Tensor:
    """Masks that leave each row with probability `share`, (count, rows)."""
    return torch.rand(count, rows, generator=torch.Generator().manual_seed(seed)) < share


def related(inputs: Tensor, labels: Tensor, difficulty: Tensor, count: int, seed: int, *, each: int = 2) -> Tensor:
    """Masks that leave out rows that belong together, as those do that somebody wants forgotten.  -> (count, n).

    inputs (n, ...), labels int (n,), difficulty (n,), such as the mean loss of models trained on all rows. Each mask
    leaves out `each` neighbourhoods, a row and the nearest 9 to 59 of its class, and `each` ranges of 10 to 100 rows
    of like difficulty, which is where mislabelled ones are. Weights that are fitted to random subsets know next to
    nothing of such deletions: their rows stand in for each other.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = inputs.flatten(1).double()
    apart = torch.cdist(flat, flat).masked_fill(labels[:, None] != labels, torch.inf)
    nearest, hardest = apart.argsort(-1)[:, :60], difficulty.argsort()
    masks = torch.ones(count, len(inputs), dtype=torch.bool)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for mask in masks:
        for _ in range(each):
            row = drawn(0, len(inputs))
            near = nearest[row, : drawn(10, 61)]
            mask[near[labels[near] == labels[row]]] = False
            size = drawn(10, 101)
            start = drawn(-size // 2, len(inputs) - size // 2)
            mask[hardest[max(start, 0) : start + size]] = False
    return masks
