from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from calib.stats.moments import Moments
from compressor.engine.rotations import hadamard
from compressor.quantization.qsur import ceiling, published_qsur, qsur, qsur_of, qsur_of_rows, shrink

seeds = st.integers(0, 10_000)


def covariance(seed: int, d: int = 8) -> Tensor:
    x = torch.randn(40, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.mT @ x / 40


@pytest.mark.parametrize(("d", "value"), [(64, 0.24780), (4096, 0.032250)])
def test_ceiling_in_closed_form(d: int, value: float) -> None:
    assert ceiling(d) == pytest.approx(value, rel=1e-4)
    assert ceiling(100_000) == pytest.approx(math.sqrt(math.pi * math.e / 200_000), rel=1e-3)


def test_one_dimension_and_a_disc() -> None:
    """A segment fills its own box; a disc fills pi / 4 of a square."""
    assert ceiling(1) == pytest.approx(1)
    assert ceiling(2) ** 2 == pytest.approx(math.pi / 4)


@given(seeds)
def test_zero_mean_is_the_closed_form(seed: int) -> None:
    s, d = covariance(seed), 8
    log_u = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) - d * math.log(2)
    log_u += 0.5 * torch.linalg.eigvalsh(s).log().sum().item() - d / 2 * math.log(s.diagonal().max().item())
    assert qsur(torch.zeros(d), s) == pytest.approx(math.exp(log_u / d))


@given(seeds)
def test_nothing_exceeds_the_ceiling_and_isotropy_reaches_it(seed: int) -> None:
    s = covariance(seed)
    mean = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert qsur(mean, s) <= qsur(torch.zeros(8), s) <= ceiling(8) * (1 + 1e-9)
    assert qsur(torch.zeros(8), 3 * torch.eye(8)) == pytest.approx(ceiling(8))


def test_an_outlier_channel_and_what_a_hadamard_does_to_it() -> None:
    """One channel with 400 times the variance of 63 others: ceiling * sqrt(GM / max), then ceiling * sqrt(GM / AM)."""
    variance = torch.ones(64, dtype=torch.float64)
    variance[5] = 400.0
    s, h, zero = variance.diag(), hadamard(64), torch.zeros(64)
    geometric, arithmetic = 400.0 ** (1 / 64), (400.0 + 63) / 64
    assert qsur(zero, s) == pytest.approx(ceiling(64) * math.sqrt(geometric / 400))
    assert qsur(zero, h @ s @ h) == pytest.approx(ceiling(64) * math.sqrt(geometric / arithmetic))


@given(seeds)
def test_a_rotation_is_capped_by_the_eigenvalues_and_a_scaling_is_not(seed: int) -> None:
    s = covariance(seed)
    values, vectors = torch.linalg.eigh(s)
    cap = ceiling(8) * math.exp(values.log().mean().item() / 2) / math.sqrt(values.mean().item())
    rotated = hadamard(8) @ vectors.mT @ s @ vectors @ hadamard(8)
    assert qsur(torch.zeros(8), rotated) == pytest.approx(cap)
    whitened = torch.diag(values**-0.5) @ vectors.mT @ s @ vectors @ torch.diag(values**-0.5)
    assert qsur(torch.zeros(8), whitened) == pytest.approx(ceiling(8))


@pytest.mark.parametrize("d", [8, 40])
def test_the_published_share_takes_the_longest_axis_alone(d: int) -> None:
    """OSTQuant's equations 3-7, written out with all eigenvectors: at least the exact share, which it is where the
    longest axis is a coordinate's."""
    s = covariance(1, d) + 0.1 * torch.eye(d)
    values, vectors = torch.linalg.eigh(s)
    mean = torch.linspace(-1, 2, d, dtype=torch.float64)
    radius = float(chi2.ppf(0.99, d))
    tip = math.sqrt(radius * float(values[-1])) * vectors[:, -1]
    side = float(torch.cat([mean + tip, mean - tip]).max() - torch.cat([mean + tip, mean - tip]).min())
    log_u = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) + d / 2 * math.log(radius)
    log_u += 0.5 * float(values.log().sum()) - d * math.log(side)
    assert published_qsur(mean, s) == pytest.approx(math.exp(log_u / d), rel=1e-6)
    zero = torch.zeros(d)
    assert published_qsur(zero, s) > qsur(zero, s)
    variance = torch.ones(d, dtype=torch.float64)
    variance[3] = 400.0
    assert published_qsur(zero, variance.diag()) == pytest.approx(qsur(zero, variance.diag()))


def test_the_published_share_of_a_rotated_outlier() -> None:
    """One channel with 400 times the variance of 63 others, after a Hadamard: the axis ends at 20 / 8 in each
    coordinate, the ellipsoid at sqrt(463 / 64)."""
    variance = torch.ones(64, dtype=torch.float64)
    variance[5] = 400.0
    s, zero = hadamard(64) @ variance.diag() @ hadamard(64), torch.zeros(64)
    assert published_qsur(zero, s) == pytest.approx(ceiling(64) * 400 ** (1 / 128) / 2.5)
    assert published_qsur(zero, s) / qsur(zero, s) == pytest.approx(math.sqrt(463 / 64) / 2.5)


@pytest.mark.parametrize("n", [6, 50])
def test_the_published_share_of_few_rows_is_that_of_their_shrunk_covariance(n: int) -> None:
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x[:, 2] *= 5
    moments = Moments.zero(64).add(x)
    gathered = moments.covariance if n > 64 else shrink(moments.covariance, n)
    assert qsur_of_rows(x)["published"] == pytest.approx(published_qsur(x.mean(0), gathered), rel=1e-5)
    assert qsur_of_rows(torch.ones(n, 64))["published"] == 0


def test_few_samples_are_shrunk_and_dead_channels_fill_nothing() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few = qsur_of(Moments.zero(8).add(x))
    assert few["shrunk"] and 0 < few["qsur"] <= ceiling(8)
    many = Moments.zero(8).add(torch.randn(500, 8, dtype=torch.float64) * torch.tensor([0.0] + [1.0] * 7))
    assert qsur_of(many) == {"qsur": 0.0, "ratio": 0.0, "published": 0.0, "shrunk": False}


def test_shrinkage_keeps_the_trace_and_fades_with_samples() -> None:
    s = covariance(3)
    assert shrink(s, 4).trace() == pytest.approx(s.trace().item())
    assert (shrink(s, 10**6) - s).abs().max() < 1e-3 < (shrink(s, 4) - s).abs().max()


@given(seeds, st.integers(2, 20))
def test_rows_at_hand_give_what_their_moments_give(seed: int, rows: int) -> None:
    """In the smaller of the two dimensions: fewer rows than columns, as many, and more."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=g, dtype=torch.float64) * torch.rand(8, generator=g).double() + 0.3
    small, whole = qsur_of_rows(x), qsur_of(Moments.zero(8).add(x))
    assert small["shrunk"] == whole["shrunk"] == (rows <= 8)
    assert small["qsur"] == pytest.approx(whole["qsur"], rel=1e-8)
    assert small["ratio"] == pytest.approx(whole["ratio"], rel=1e-8)


def test_rows_that_are_all_the_same_fill_nothing() -> None:
    assert qsur_of_rows(torch.ones(3, 8))["qsur"] == 0


@given(seeds)
def test_channels_of_very_different_sizes_in_single_precision(seed: int) -> None:
    """Gains from 1e-6 to 1, correlated channels, and products in float32: within 5% of what float64 says."""
    g = torch.Generator().manual_seed(seed)
    gains = torch.rand(96, generator=g).mul(-6).mul(2.302585).exp().double()
    mixed = torch.randn(96, 96, generator=g, dtype=torch.float64) + 3 * torch.randn(96, generator=g).double()[:, None]
    x = (torch.randn(2000, 96, generator=g, dtype=torch.float64) @ mixed) * gains
    exact, single = (Moments.zero(96).add(rows) for rows in (x, x.float()))
    found = qsur_of(single)["qsur"]
    assert found == pytest.approx(qsur_of(exact)["qsur"], rel=0.05) and found


def test_what_rounding_has_left_indefinite() -> None:
    """Copies of a channel, and noise of single precision: shrunk a little; what no rounding explains is not known."""
    x = torch.randn(500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    s = x.mT @ x / 500
    s[0, 1] = s[1, 0] = s[0, 1] * (1 + 1e-7)
    assert torch.linalg.cholesky_ex(s)[1] and 0 < (qsur(torch.zeros(8), s) or 0) < ceiling(8) / 2
    s[0, 1] = s[1, 0] = 2 * s[0, 0]
    assert qsur(torch.zeros(8), s) is None
