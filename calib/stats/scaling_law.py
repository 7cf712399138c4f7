"""A power law through measured losses, loss = a size^-b, or above a floor, loss = L + a size^-b, and what it says of
sizes that were not tried.

The first is of losses that a model of any size could bring to 0, as the KL from a teacher; the second of those that it
could not, as the cross-entropy of a text, which has an entropy of its own (arXiv:2001.08361, arXiv:2203.15556). Least
squares on logarithms; errors there are taken to be normal and alike, so bands are Student's. Bits are a size by
their levels, 2^bits: an even grid's squared error falls with b = 2. Students that were cut out of a teacher of T
parameters are by 1 / ln(T / N), so that what they lose beside it is 0 at its own size, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calib import BadInput

CONFIDENCE = 0.95
FLOORED_SIZES = 6  # three more than such a law has parameters
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


@dataclass(frozen=True)
class FlooredLaw:
    """loss = floor + scale (size / mid)^-exponent, with mid the geometric mean of the sizes; `covariance` (3, 3) of
    floor, log scale and exponent, `residual` the standard deviation of losses about it, `count` how many there were.
    Bands are Student's, by the delta method."""

    floor: float
    scale: float
    exponent: float
    mid: float
    covariance: tuple[tuple[float, float, float], ...]
    residual: float
    count: int

    def _reach(self, gradient: Sequence[float], noise: float = 0.0) -> float:
        """How far from its value something with this gradient may lie, `noise` being the variance of one more loss."""
        import numpy as np
        from scipy.stats import t as student

        g = np.array(gradient)
        variance = float(g @ np.array(self.covariance) @ g) + noise
        return float(student.ppf((1 + CONFIDENCE) / 2, self.count - 3)) * math.sqrt(max(0.0, variance))

    @property
    def exponent_error(self) -> float:
        """The exponent lies within this of `exponent`."""
        return self._reach((0.0, 0.0, 1.0))

    @property
    def floor_error(self) -> float:
        """The floor lies within this of `floor`."""
        return self._reach((1.0, 0.0, 0.0))

    def predicted(self, size: float) -> Band:
        """The loss of one more model of `size`."""
        log_size = math.log(size / self.mid)
        above = self.scale * _exp(-self.exponent * log_size)
        off = self._reach((1.0, above, -above * log_size), self.residual**2)
        return self.floor + above, self.floor + above - off, self.floor + above + off

    def needed(self, loss: float) -> Band:
        """The size at which one more model has `loss`; no size where that is at the floor or below it."""
        above = loss - self.floor
        if above <= 0:
            return math.inf, 0.0, math.inf
        log_size = math.log(self.scale / above) / self.exponent
        gradient = (1 / above, 1.0, -log_size)
        off = self._reach([g / self.exponent for g in gradient], (self.residual / above / self.exponent) ** 2)
        return tuple(self.mid * _exp(log_size + sign * off) for sign in (0, -1, 1))  # type: ignore[return-value]


def fit_floored(sizes: Sequence[float], losses: Sequence[float]) -> FlooredLaw:
    """Least squares on losses, the floor not below 0.  Raises BadInput where there are not six sizes, or losses that
    are not positive, do not fall or follow no such law."""
    if len(set(sizes)) < FLOORED_SIZES:
        raise BadInput(
            f"a law with a floor needs {FLOORED_SIZES} different sizes or more, and there are {len(set(sizes))}"
        )
    plain = fit(sizes, losses)
    import numpy as np
    from scipy.optimize import curve_fit

    mid = math.exp(plain.size)
    x, y = np.log(np.array(sizes) / mid), np.array(losses, float)
    start = (0.9 * y.min(), math.log(max(1e-12, float(np.median(y)) - 0.9 * y.min())), plain.exponent)

    def law(x: np.ndarray, floor: float, log_scale: float, exponent: float) -> np.ndarray:
        made: np.ndarray = floor + np.exp(np.clip(log_scale - exponent * x, -700, 700))
        return made

    try:
        found, covariance = curve_fit(
            law, x, y, start, bounds=((0, -700, 1e-3), (y.min(), 700, 50)), x_scale="jac", max_nfev=10_000
        )
    except RuntimeError as error:
        raise BadInput("losses follow no power law above a floor; give outputs of more sizes") from error
    if not np.isfinite(covariance).all():
        raise BadInput("losses follow no power law above a floor; give outputs of more sizes")
    residual = math.sqrt(float(np.square(y - law(x, *found)).sum()) / (len(y) - 3))
    rows = tuple((float(row[0]), float(row[1]), float(row[2])) for row in covariance)
    return FlooredLaw(float(found[0]), math.exp(float(found[1])), float(found[2]), mid, rows, residual, len(y))


def cut_size(count: float, whole: float) -> float:
    """The size of a student of `count` parameters that was cut out of a teacher of `whole`, which has more."""
    return 1 / math.log(whole / count)


def count_of(size: float, whole: float) -> float:
    """The inverse of `cut_size`."""
    return whole * math.exp(-1 / size) if size > 0 else 0.0


def leave_one_out_errors(sizes: Sequence[float], losses: Sequence[float], *, floored: bool = False) -> list[float]:
    """Each loss over what the law through all others says; no number where the others show none.

    Nothing where there are not enough other sizes each time: three, or six where it has a floor.
    """
    ratios = []
    for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        others = [j for j in range(len(sizes)) if j != i]
        if len({sizes[j] for j in others}) < (FLOORED_SIZES if floored else 3):
            return []
        try:
            law = (fit_floored if floored else fit)([sizes[j] for j in others], [losses[j] for j in others])
        except BadInput:
            ratios.append(math.nan)
            continue
        ratios.append(loss / law.predicted(size)[0])
    return ratios


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
