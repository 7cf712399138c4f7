"""A power law through measured losses, loss = a size^-b, and what it says of sizes that were not tried.

Least squares on logarithms; errors there are taken to be normal and alike, so bands are Student's. Bits are a size by
their levels, 2^bits: an even grid's squared error falls with b = 2. Students that were cut out of a teacher of T
parameters are by 1 / ln(T / N), so that what they lose beside it is 0 at its own size, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calib import BadInput

CONFIDENCE = 0.95
Band = tuple[float, float, float]  # what is expected, and the two ends of its band


@dataclass(frozen=True)
class Law:
    """exponent: b. `size` and `loss` are means of logarithms, `spread` is the sum of squares about the first of them,
    `residual` the standard deviation of the second about the line, `count` how many there were."""

    exponent: float
    size: float
    loss: float
    spread: float
    residual: float
    count: int

    @property
    def _reach(self) -> float:
        """How far from the line, in its logarithm, a single loss may lie at the mean size."""
        from scipy.stats import t as student

        return float(student.ppf((1 + CONFIDENCE) / 2, self.count - 2)) * self.residual

    @property
    def exponent_error(self) -> float:
        """b lies within this of `exponent`."""
        return self._reach / math.sqrt(self.spread)

    def predicted(self, size: float) -> Band:
        """The loss of one more model of `size`."""
        x = math.log(size) - self.size
        middle = self.loss - self.exponent * x
        off = self._reach * math.sqrt(1 + 1 / self.count + x * x / self.spread)
        return _exp(middle), _exp(middle - off), _exp(middle + off)

    def needed(self, loss: float) -> Band:
        """The size at which one more model has `loss`; the band holds every size for which that would not surprise.

        It ends at 0 and nowhere where it is too uncertain that losses fall at all (Fieller's theorem).
        """
        d, k = self.loss - math.log(loss), self._reach**2
        # (d - b u)^2 = k (1 + 1/n + u^2 / S), with u the distance from the mean of log sizes
        square, rest = self.exponent**2 - k / self.spread, d * d - k * (1 + 1 / self.count)
        middle = _exp(self.size + d / self.exponent)
        if square <= 0:
            return middle, 0.0, math.inf
        root = math.sqrt(max(0.0, (d * self.exponent) ** 2 - square * rest))
        low, high = ((d * self.exponent + sign * root) / square for sign in (-1, 1))
        return middle, _exp(self.size + low), _exp(self.size + high)


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Law:
    """Raises BadInput where there are not three sizes, or losses that are not positive or do not fall."""
    if len(set(sizes)) < 3:
        raise BadInput(f"a law needs three different sizes or more, and there are {len(set(sizes))}")
    if not all(0 < value < math.inf for value in (*sizes, *losses)):
        raise BadInput("a law needs sizes and losses that are positive and finite")
    import numpy as np

    x, y = np.log(sizes), np.log(losses)
    x, y, size, loss = x - x.mean(), y - y.mean(), float(x.mean()), float(y.mean())
    spread = float(x @ x)
    slope = float(x @ y) / spread
    if slope >= 0:
        raise BadInput("losses do not fall with size, so that no size can be named")
    off = y - slope * x
    return Law(-slope, size, loss, spread, math.sqrt(float(off @ off) / (len(x) - 2)), len(x))


def cut_size(count: float, whole: float) -> float:
    """The size of a student of `count` parameters that was cut out of a teacher of `whole`, which has more."""
    return 1 / math.log(whole / count)


def count_of(size: float, whole: float) -> float:
    """The inverse of `cut_size`."""
    return whole * math.exp(-1 / size) if size > 0 else 0.0


def leave_one_out_errors(sizes: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Each loss over what the law through all others says; no number where the others show none.

    Nothing where there are not three other sizes each time.
    """
    ratios = []
    for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        others = [j for j in range(len(sizes)) if j != i]
        if len({sizes[j] for j in others}) < 3:
            return []
        try:
            law = fit([sizes[j] for j in others], [losses[j] for j in others])
        except BadInput:
            ratios.append(math.nan)
            continue
        ratios.append(loss / law.predicted(size)[0])
    return ratios


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
