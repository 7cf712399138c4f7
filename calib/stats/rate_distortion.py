"""How few bits a weight any Gaussian code needs for a KL: reverse water-filling (Cover and Thomas, theorem 10.3.3).

Near its weights a model's KL is 1/2 sum l_i d_i^2 for errors d_i along the axes of its Fisher matrix, whose curvatures
are l_i. Weights that are independent Gaussians of variance s^2 along these axes, and are off by D_i / l_i each in mean
square, cost a KL of 1/2 sum D_i, and any code of them takes at least sum 1/2 log2(l_i s^2 / D_i) bits. The least is
where the D_i are all the same level, or l_i s^2 where that is lower. With K-FAC the curvatures of a linear are the
products of the eigenvalues of its two factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

LEVELS = 2.0 ** (torch.arange(-320, 81, dtype=torch.float64) / 4)  # of the water, in nats


def water_filling(inputs: Tensor, outputs: Tensor, square: float, levels: Tensor = LEVELS) -> tuple[Tensor, Tensor]:
    """KL in nats, and bits, of the best Gaussian code of a linear at each level of the water (n,).

    Args:
        inputs: eigenvalues of the factor of its inputs (in,), none below 0.
        outputs: those of the factor of the gradients of its outputs (out,).
        square: variance of a weight; curvatures are the products of one eigenvalue of each.
        levels: D of every direction that has as much to lose, ascending.
    """
    rising = inputs.double().sort().values
    sums = torch.nn.functional.pad(rising.cumsum(0), (1, 0))
    logs = rising.clamp(min=torch.finfo(torch.float64).tiny).log2().cumsum(0)
    logs = torch.nn.functional.pad(logs, (1, 0))
    scale = outputs.double()[outputs > 0] * square
    if not len(scale):
        return torch.zeros_like(levels), torch.zeros_like(levels)
    below = torch.searchsorted(rising, levels / scale[:, None], right=True)  # (outputs, levels) directions under water
    above = len(rising) - below
    nats = 0.5 * (scale[:, None] * sums[below] + levels * above).sum(0)
    bits = 0.5 * (logs[-1] - logs[below] + above * (scale.log2()[:, None] - levels.log2())).sum(0)
    return nats, bits


def rate_curve(nats: Tensor, bits: Tensor, weights: int) -> list[tuple[float, float]]:
    """(KL, bits a weight) of all of a model's linears together, from their sums at each level; KL rises from 1e-4."""
    points = [(float(kl), float(rate) / weights) for kl, rate in zip(nats, bits, strict=True) if kl >= 1e-4]
    end = next((i for i, (_, rate) in enumerate(points) if rate < 0.01), len(points) - 1)
    return points[: end + 1]


def bits_at(curve: Sequence[Sequence[float]], kl: float) -> float | None:
    """Bits a weight on a curve at a KL, linear in its logarithm between points; None beyond its ends."""
    for (low, more), (high, fewer) in pairwise(curve):
        if low <= kl <= high:
            share = 0.0 if high <= low else float(torch.tensor(kl / low).log() / torch.tensor(high / low).log())
            return more + share * (fewer - more)
    return None
