"""Levels of 4-bit grids that are not evenly spaced, ascending from -1 to 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.stats import norm

_OUTERMOST = 0.9677083  # the largest quantile, which is to become 1
_FP4 = (0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)


@cache
def nf4() -> tuple[float, ...]:
    """Sixteen quantiles of the normal distribution (arXiv:2305.14314, appendix E): eight above 0 and seven below."""
    above = norm.ppf(np.linspace(_OUTERMOST, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(_OUTERMOST, 0.5, 8)[:-1])
    whole = np.concatenate([below, [0.0], above[::-1]]) / above[0]
    return tuple(whole.astype(np.float32).tolist())


@cache
def fp4() -> tuple[float, ...]:
    """A sign, two bits of exponent and one of mantissa, as bitsandbytes has them.  There are two zeros."""
    values = np.array(_FP4, np.float32)
    return tuple(np.concatenate([-values[::-1], values]).tolist())


TABLES: dict[str, Callable[[], tuple[float, ...]]] = {"nf4": nf4, "fp4": fp4}
