"""Which rows make each step of an epoch, for models that are trained beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def orders_of(masks: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """(M, most rows of any): each model's rows in an order of its own, filled up with one of them; which count."""
    counts = masks.sum(1)
    orders = torch.empty(len(masks), int(counts.max()), dtype=torch.long)
    for order, mask, generator in zip(orders, masks, generators, strict=True):
        all_rows = torch.randperm(len(mask), generator=generator)
        own = all_rows[mask[all_rows]]
        order[: len(own)], order[len(own) :] = own, own[0]
    return orders, torch.arange(orders.shape[1]) < counts[:, None]


@dataclass(frozen=True)
class Batches:
    """Batches of an epoch for many models, each with rows of its own in an order of its own.

    Rows that fill up a model's last batch count for nothing, except where norms would see them: then models are `apart`
    by how many rows their batches have, and `fewest` is how many one may have at least.
    """

    masks: Tensor
    size: int
    fewest: int
    apart: bool

    @property
    def steps(self) -> Tensor:
        """Steps of an epoch for each model (M,)."""
        return ((self.masks.sum(1) - self.fewest + 1) / self.size).ceil().long()

    def of(self, step: int) -> Iterator[tuple[Tensor | None, slice]]:
        """-> which models (None: all), and where in their orders the rows of this step stand."""
        if not self.apart:
            yield None, slice(step * self.size, (step + 1) * self.size)
            return
        counts, steps = self.masks.sum(1), self.steps
        ends = torch.where(step + 1 < steps, torch.full_like(counts, (step + 1) * self.size), counts)
        going = step < steps
        for end in ends[going].unique().tolist():
            which = (going & (ends == end)).nonzero().flatten()
            yield None if len(which) == len(counts) else which, slice(step * self.size, end)
