"""QSUR: the share of the quantization cube that the data's ellipsoid fills (OSTQuant, OpenReview rAcgDBdKnP, eq. 3-7).

For x ~ N(mu, S) in d dimensions the ellipsoid holds a share `QUANTILE` of the mass; the cube is the smallest one that
holds the ellipsoid. The paper takes the cube's half-width from the tip of the leading principal axis, which is
`published_qsur`; `qsur` takes the ellipsoid's exact extent along each axis, sqrt(c S_jj), of which the former is at
most equal, so that it flatters. What is reported is the d-th root of each, and of the exact one its ratio to the
ceiling, which a zero-mean S proportional to I reaches.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from calib.stats.moments import Moments

QUANTILE = 0.99
FEW_DIMENSIONS = 32  # dimensions below which all eigenvectors are as quick as one

NOISE = 1e-6  # of correlations whose sums were taken in single precision
WEIGHTS = (NOISE, 1e-5, 1e-4, 1e-3, 1e-2)  # by which correlations are shrunk, where rounding made them indefinite


def qsur(mean: Tensor, covariance: Tensor) -> float | None:
    """U^(1/d), the mean share of the quantization cube's side that the data's ellipsoid fills.

    mean (d,), covariance (d, d). 0 where a channel does not vary at all. The determinant is taken of the correlation
    matrix in float64, so that channels of very different sizes do no harm; where rounding has left that indefinite, it
    is shrunk towards the identity, by at most 1%. None: even then it has no Cholesky factor, so the share is not known.
    """
    return _shares(mean, covariance)[0]


def published_qsur(mean: Tensor, covariance: Tensor) -> float | None:
    """U^(1/d) as OSTQuant's equations 3-7 have it: the cube reaches to the tips of the longest principal axis alone.

    mean (d,), covariance (d, d). Above `qsur`, and above its ceiling where that axis points to a corner of the cube; U
    itself is the d-th power of it. Where several axes are longest it depends on which of them is taken, as theirs does.
    """
    return _shares(mean, covariance)[1]


def _shares(mean: Tensor, covariance: Tensor) -> tuple[float | None, float | None]:
    """(exact, as published)."""
    mean, covariance = mean.double(), covariance.double()
    variance = covariance.diagonal()
    if bool((variance <= 0).any()):
        return 0.0, 0.0
    log_det = _log_det(covariance, variance)
    if log_det is None:
        return None, None
    return _filled(mean, variance.sqrt(), log_det), _filled(mean, _longest_axis(covariance), log_det)


def _longest_axis(covariance: Tensor) -> Tensor:
    """Half of the longest principal axis of x^T S^-1 x = 1, without signs: sqrt(lambda_1) |q_1|.  (d, d) -> (d,)."""
    value, vector = _leading(covariance)
    return value**0.5 * vector.abs()


def _leading(matrix: Tensor) -> tuple[float, Tensor]:
    """The largest eigenvalue of a positive semidefinite matrix (d, d), and a unit vector of it (d,)."""
    if len(matrix) < FEW_DIMENSIONS:
        values, vectors = torch.linalg.eigh(matrix)
        return max(float(values[-1]), 0.0), vectors[:, -1]
    from scipy.sparse.linalg import eigsh  # takes half a second, and only reports ask for it

    start = matrix.diagonal().clamp(min=0).sqrt().cpu().numpy()  # the same each time, so that the answer is
    values, vectors = eigsh(matrix.cpu().numpy(), k=1, v0=start, tol=1e-9)
    return max(float(values[0]), 0.0), torch.from_numpy(vectors[:, 0]).to(matrix.device)


def _log_det(covariance: Tensor, variance: Tensor) -> float | None:
    size = variance.sqrt()
    correlation = covariance / size / size[:, None]
    for weight in (0.0, *WEIGHTS):
        shrunk = correlation * (1 - weight)
        shrunk.diagonal().add_(weight)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        pivots = factor.diagonal()
        if not failed and (weight or float(pivots.min()) ** 2 > NOISE):
            return 2 * float(pivots.log().sum()) + float(variance.log().sum())
    return None


def _filled(mean: Tensor, extent: Tensor, log_det: float) -> float:
    """U^(1/d) from how far the ellipsoid of radius one reaches along each axis (d,), and the logarithm of the
    covariance's determinant."""
    d = len(mean)
    half_width = extent * _radius_squared(d) ** 0.5
    width = float((mean + half_width).max() - (mean - half_width).min())
    if width <= 0:
        return 0.0
    log_u = _log_ball(d) + 0.5 * log_det + d / 2 * math.log(_radius_squared(d)) - d * math.log(width)
    return math.exp(log_u / d)


def ceiling(d: int) -> float:
    """The largest U^(1/d) there is in d dimensions; tends to sqrt(pi e / (2 d))."""
    return math.exp(_log_ball(d) / d) / 2


def qsur_of(moments: Moments) -> dict[str, float | bool | None]:
    """QSUR of gathered data: value, ratio to the ceiling, value as published (None: not known), and whether there were
    so few rows that the covariance had to be shrunk."""
    shrunk = moments.count <= len(moments.total)
    covariance = shrink(moments.covariance, moments.count) if shrunk else moments.covariance
    return _result(_shares(moments.mean, covariance), len(moments.total), shrunk)


def qsur_of_rows(x: Tensor) -> dict[str, float | bool | None]:
    """QSUR of rows x (n, d) that are all at hand; see `qsur`.

    Where n <= d, in n dimensions: with centred rows Y / sqrt(n), det(a I + b Y^T Y) = a^d det(I + b/a Y Y^T).
    """
    n, d = x.shape
    if n > d:
        return qsur_of(Moments.zero(d, x.device).add(x))
    mean = x.double().mean(0)
    centred = x - mean.to(x.dtype)
    small = (centred @ centred.mT).double() / n
    weight = _shrinkage(float(small.trace()), float(small.norm() ** 2), d, n)
    a, b = weight * float(small.trace()) / d, 1 - weight
    if a <= 0:  # every row is the same
        return _result((0.0, 0.0), d, True)
    value, vector = _leading(small)  # whose rows' own axis is Y^T u / sqrt(n lambda)
    axis = centred.mT @ vector.to(x.dtype)
    longest = (a + b * value) ** 0.5 * axis.double().abs() / axis.norm().double()
    small.mul_(b / a).diagonal().add_(1)
    factor, failed = torch.linalg.cholesky_ex(small)
    if failed:
        return _result((None, None), d, True)
    log_det = d * math.log(a) + 2 * float(factor.diagonal().log().sum())
    variance = a + b * centred.square().mean(0, dtype=torch.float64)
    exact, published = (_filled(mean, extent, log_det) for extent in (variance.sqrt(), longest))
    return _result((exact, published), d, True)


def _result(shares: tuple[float | None, float | None], d: int, shrunk: bool) -> dict[str, float | bool | None]:
    exact, published = shares
    ratio = None if exact is None else exact / ceiling(d)
    return {"qsur": exact, "ratio": ratio, "published": published, "shrunk": shrunk}


def shrink(covariance: Tensor, count: int) -> Tensor:
    """Towards the mean variance times I by the oracle-approximating weight (Chen et al., arXiv:0907.4698, eq. 23).

    With no more samples than dimensions the plain estimate is singular and would say that nothing is filled.
    """
    d, trace = len(covariance), float(covariance.trace())
    weight = _shrinkage(trace, float(covariance.norm() ** 2), d, count)
    shrunk = covariance * (1 - weight)
    shrunk.diagonal().add_(weight * trace / d)
    return shrunk


def _shrinkage(trace: float, squares: float, d: int, count: int) -> float:
    spread = (count + 1 - 2 / d) * (squares - trace**2 / d)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / d) * squares + trace**2) / spread)


def _log_ball(d: int) -> float:
    """Log volume of the unit ball."""
    return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)


@cache
def _radius_squared(d: int) -> float:
    """The QUANTILE of the chi-squared distribution with d degrees of freedom."""
    from scipy.stats import chi2  # takes half a second, and only reports ask for it

    return float(chi2.ppf(QUANTILE, d))
