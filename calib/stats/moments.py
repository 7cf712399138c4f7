"""Statistics of what passes through a model, as values: `add` rows, merge with `|`.

Sums are kept in float64, so batch size, order and sharding do not matter beyond rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.runtime.distributed import all_reduce_max_, all_reduce_sum_, world_size
from calib.runtime.precision import upcast

SLAB = 256  # rows of a Gram matrix that are added to at once


@dataclass
class Moments:
    """Sums over `count` rows x (n,): `total` = sum x, `gram` = sum x x^T, `absmax` = max |x_j| (each float64)."""

    count: int
    total: Tensor
    gram: Tensor
    absmax: Tensor

    @staticmethod
    def zero(n: int, device: torch.device | None = None) -> Moments:
        """Moments of no rows, of width n."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return Moments(0, zeros(n), zeros(n, n), zeros(n))

    def add(self, x: Tensor) -> Moments:
        """Count in every row of x (..., n); changes this value and returns it.

        In single precision at least, also under autocast: a Gram matrix of shortened products has eigenvalues below
        zero.
        """
        rows = upcast(x.detach()).reshape(-1, x.shape[-1])
        if not len(rows):
            return self
        with torch.autocast(rows.device.type, enabled=False):
            self.count += len(rows)
            # Sums within a micro-batch in its own dtype, sums of them in float64: exact enough, and fast.
            self.total += rows.sum(0)
            for start in range(0, rows.shape[1], SLAB):
                stop = start + SLAB
                product = rows[:, start:stop].mT @ rows[:, start:]  # from the diagonal on: what is left of it mirrors
                self.gram[start:stop, start:] += product
                self.gram[stop:, start:stop] += product[:, SLAB:].mT
            largest = torch.maximum(rows.amax(0), -rows.amin(0))  # aminmax is ten times slower along this axis
            torch.maximum(self.absmax, largest.double(), out=self.absmax)
        return self

    def __or__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.gram + other.gram,
            torch.maximum(self.absmax, other.absmax),
        )

    def everywhere(self) -> Moments:
        """A copy that counts the rows of every process."""
        if world_size() == 1:
            return self
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.total.device)
        all_reduce_sum_([count, self.total])
        all_reduce_sum_([self.gram])
        all_reduce_max_(self.absmax)
        return Moments(int(count), self.total, self.gram, self.absmax)

    @property
    def mean(self) -> Tensor:
        """The mean of the rows (n,)."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Biased (divided by the count), (n, n)."""
        return (self.gram / max(self.count, 1)).addr_(self.mean, self.mean, alpha=-1)
