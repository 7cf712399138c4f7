"""How the hidden states of one text differ from those of another, and what mere chance would make of them.

Two sets of states are laid against each other in the leading principal components of their pooled covariance: the KL of
the Gaussians that have their means and covariances, sliced Wasserstein-1 distances, and the channels whose range one
set leaves (arXiv:2404.03176 bounds a loss by such distances, block by block; that text of calibration and of deployment
are compared this way is our use of them).

Chance is told in two ways. For n and m independent Gaussian states it is a formula (`chance_kl`). But tokens of a row
are not independent, so rows are also dealt anew to the two sets, whole, many times: if both texts were alike, the KL of
the true deal would be one of those (a permutation test).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

MOST_COMPONENTS = 32
TOKENS_A_COMPONENT = 4  # at least, of either set, for a covariance to be one
PROJECTIONS = 256  # of the sliced distance
DEALS = 199  # of rows, besides the true one
_RANGES = 20  # of these deals, in which ranges are compared too
_FLAT = 1e-9  # of the largest variance: below it a component is noise
_TIE = 1e-9  # nats by which two deals of the same rows may differ
_AT_ONCE = 2**22  # numbers that are sorted together


def principal_components(covariance: Tensor, most: int = MOST_COMPONENTS) -> Tensor:
    """The leading eigenvectors (d, k) of a covariance (d, d), largest first, k = min(most, d)."""
    d = len(covariance)
    _, vectors = eigh(covariance.double().cpu().numpy(), subset_by_index=[max(0, d - most), d - 1])
    return torch.from_numpy(vectors[:, ::-1].copy()).to(covariance.device)


def gaussian_kl(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """KL(N(mean_p, cov_p) || N(mean_q, cov_q)) in nats.  (..., k), (..., k, k), (..., k), (..., k, k) -> (...).

    Infinite where a covariance is singular.
    """
    (lower_p, bad_p), (lower_q, bad_q) = (torch.linalg.cholesky_ex(cov) for cov in (cov_p, cov_q))
    failed = (bad_p > 0) | (bad_q > 0)
    eye = torch.eye(cov_p.shape[-1], dtype=cov_p.dtype, device=cov_p.device)
    lower_p, lower_q = (torch.where(failed[..., None, None], eye, lower) for lower in (lower_p, lower_q))
    ratio = torch.linalg.solve_triangular(lower_q, lower_p, upper=False)
    shift = torch.linalg.solve_triangular(lower_q, (mean_p - mean_q)[..., None], upper=False)
    spread = 2 * (lower_q.diagonal(dim1=-2, dim2=-1).log() - lower_p.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    nats = (ratio.square().sum((-2, -1)) + shift.square().sum((-2, -1)) - cov_p.shape[-1] + spread) / 2
    return torch.where(failed, torch.inf, nats)


def chance_kl(k: int, n: int, m: int) -> tuple[float, float]:
    """Mean and standard deviation, in nats, of `gaussian_kl` between n and m independent draws of one Gaussian in k
    dimensions, to leading order.

    Means differ with covariance S (1/n + 1/m), and covariances with variances of that size (twice it on the diagonal),
    so that the KL, 1/2 of one quadratic form and 1/4 of the other, is (1/n + 1/m) / 2 times a chi-squared variable with
    p = k + k (k + 1) / 2 degrees of freedom: its mean is (1/n + 1/m) p / 2, which is p / n for n = m.
    """
    p, scale = k + k * (k + 1) / 2, (1 / n + 1 / m) / 2
    return scale * p, scale * (2 * p) ** 0.5


def random_directions(k: int, count: int = PROJECTIONS, seed: int = 0) -> Tensor:
    """Unit vectors (k, count) in float64, uniform over the sphere."""
    drawn = torch.randn(k, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean over `directions` (k, D) of the Wasserstein-1 distance between the projections of a (n, k) and of b (m, k).

    In one dimension that is the area between the two distribution functions, exact for any n and m.
    """
    weights = torch.cat([a.new_full((len(a),), 1 / len(a)), a.new_full((len(b),), -1 / len(b))])
    both, total = torch.cat([a, b]), 0.0
    for some in directions.to(both).split(max(1, _AT_ONCE // len(both)), 1):
        values, order = (both @ some).sort(0)
        apart = weights[order].cumsum(0)[:-1].abs()
        total += float((apart * values.diff(dim=0)).sum())
    return total / directions.shape[1]


def beyond_range(low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> float:
    """Share of channels whose values, `least` to `most`, leave the range `low` to `high` (each (d,))."""
    return float(((least < low) | (most > high)).double().mean())


def deal_rows(first: int, rows: int, seed: int = 0, deals: int = DEALS) -> Tensor:
    """Deal rows to two sets, (1 + deals, rows) bool, True for the first set: the true deal, which gives it the first
    `first` rows, and random ones, which give it as many."""
    draws = torch.rand(deals, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dealt = torch.zeros(1 + deals, rows, dtype=torch.bool)
    dealt[0, :first] = True
    return dealt.scatter_(1, torch.cat([torch.arange(rows)[None], draws.argsort(1)])[:, :first], True)


@dataclass(frozen=True)
class StateShift:
    """How one set of states differs from another, at one block.

    kl: by deal of rows (1 + deals,), the true one first: KL(second set || first set) of Gaussians, in nats.
    components: how many principal components that is in. chance: its mean for independent Gaussian states that are
    alike. wasserstein: sliced W1 in whitened components, of the true deal and of a random one. beyond: share of
    channels in which the second set leaves the range of the first, in the true deal and in the mean of random ones.
    """

    kl: Tensor
    components: int
    chance: float
    wasserstein: tuple[float, float]
    beyond: tuple[float, float]


def state_shift(projected: Tensor, row: Tensor, low: Tensor, high: Tensor, dealt: Tensor) -> StateShift:
    """Compare the states of two sets of rows.

    Args:
        projected: states (n, k) of all tokens in principal components of their pooled covariance.
        row: the row (n,) that each token is of.
        low: least value (R, d) of each channel in each row; +inf in a row without tokens.
        high: greatest value (R, d), likewise.
        dealt: (1 + D, R), as `deal_rows` has it.
    """
    x = projected.double() - projected.double().mean(0)
    variances = x.square().mean(0)
    kept = variances > _FLAT * variances.max()
    x = x[:, kept] / variances[kept].sqrt()
    first = dealt.to(x.device)
    nats = _kl_by_deal(x, row, first)
    directions = random_directions(x.shape[1])
    far = [sliced_wasserstein(x[mine[row]], x[~mine[row]], directions) for mine in first[:2]]
    out = [
        beyond_range(low[mine].amin(0), high[mine].amax(0), low[~mine].amin(0), high[~mine].amax(0))
        for mine in first[: 1 + _RANGES]
    ]
    n = int(first[0][row].sum())
    return StateShift(
        nats.cpu(), x.shape[1], chance_kl(x.shape[1], n, len(row) - n)[0], (far[0], far[-1]),
        (out[0], sum(out[1:]) / max(len(out) - 1, 1)),
    )  # fmt: skip


def _kl_by_deal(x: Tensor, row: Tensor, first: Tensor) -> Tensor:
    """KL(others || first) of Gaussians for each deal (D, R), from sums over each row's states x (n, k)."""
    rows, k = first.shape[1], x.shape[1]
    counts = torch.bincount(row, minlength=rows).to(x)
    totals = x.new_zeros(rows, k).index_add_(0, row, x)
    grams = torch.stack([each.mT @ each for each in (x[row == i] for i in range(rows))])

    def moments(mine: Tensor) -> tuple[Tensor, Tensor]:
        count = (mine @ counts).clamp(min=1)
        mean = mine @ totals / count[:, None]
        gram = (mine @ grams.flatten(1)).unflatten(1, (k, k)) / count[:, None, None]
        return mean, gram - mean[:, :, None] * mean[:, None]

    return gaussian_kl(*moments((~first).to(x)), *moments(first.to(x)))


def chance_of(kl: Tensor) -> float:
    """How probable a greatest KL over the blocks as large as the true deal's is, if both texts are alike: the share of
    deals whose greatest is no less.  kl: (blocks, 1 + deals), the true deal first."""
    greatest = kl.amax(0)
    return float((greatest >= greatest[0] - _TIE).double().mean())
