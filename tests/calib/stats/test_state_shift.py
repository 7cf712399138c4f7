"""How two sets of hidden states differ: closed forms, the law of chance by simulation, invariance, SciPy's distance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from calib.stats.state_shift import (
    beyond_range,
    chance_kl,
    chance_of,
    deal_rows,
    gaussian_kl,
    principal_components,
    random_directions,
    sliced_wasserstein,
    state_shift,
)

seeds = st.integers(0, 10**6)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.T.cov(correction=0).reshape(x.shape[1], x.shape[1])


def gaussian(seed: int, k: int) -> tuple[Tensor, Tensor]:
    root = normal(seed, k, k)
    return normal(seed + 1, k), root @ root.T + 0.1 * torch.eye(k, dtype=torch.float64)


@given(seeds, st.integers(1, 6))
def test_the_kl_of_gaussians_is_torch_s_and_of_no_basis(seed: int, k: int) -> None:
    p, q = gaussian(seed, k), gaussian(seed + 7, k)
    nats = float(gaussian_kl(*p, *q))
    theirs = kl_divergence(MultivariateNormal(*p), MultivariateNormal(*q))
    assert nats == pytest.approx(float(theirs), rel=1e-9, abs=1e-9) and nats >= 0
    assert float(gaussian_kl(*p, *p)) == pytest.approx(0, abs=1e-9)
    a = normal(seed + 3, k, k) + 3 * torch.eye(k, dtype=torch.float64)
    p_turned, q_turned = ((a @ mean, a @ cov @ a.T) for mean, cov in (p, q))
    assert float(gaussian_kl(*p_turned, *q_turned)) == pytest.approx(nats, rel=1e-5, abs=1e-6)
    batch = gaussian_kl(*(torch.stack(pair) for pair in zip((*p, *q), (*q, *p), strict=True)))
    assert batch.tolist() == pytest.approx([nats, float(gaussian_kl(*q, *p))])


def test_which_way_and_what_is_singular() -> None:
    """Coding a wide text by a narrow one's Gaussian costs more than the reverse; of one point there is no Gaussian."""
    zero, narrow, wide = torch.zeros(1), torch.eye(1), 9 * torch.eye(1)
    assert float(gaussian_kl(zero, wide, zero, narrow)) == pytest.approx((9 - 1) / 2 - math.log(3))
    assert float(gaussian_kl(zero, narrow, zero, wide)) == pytest.approx((1 / 9 - 1) / 2 + math.log(3))
    assert float(gaussian_kl(zero + 2, narrow, zero, narrow)) == pytest.approx(2)
    assert float(gaussian_kl(zero, 0 * narrow, zero, narrow)) == math.inf
    assert gaussian_kl(*(torch.stack([x, x]) for x in (zero, narrow, zero)), torch.stack([wide, 0 * wide])).isfinite().tolist() == [True, False]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("k", "n", "m"), [(2, 400, 400), (5, 1000, 1000), (5, 600, 3000), (8, 4000, 1500)])
def test_two_halves_of_one_sample_differ_as_the_formula_says(k: int, n: int, m: int) -> None:
    """(k + k (k + 1) / 2) / n where n = m; mean and spread over seeds, within four standard errors."""
    found = torch.stack(
        [gaussian_kl(*moments(x[:n]), *moments(x[n:])) for x in (normal(s, n + m, k) for s in range(200))]
    )
    mean, spread = chance_kl(k, n, m)
    second_order = 1 + 6 * k / min(n, m)
    assert mean - 4 * spread / 200**0.5 < float(found.mean()) < mean * second_order + 4 * spread / 200**0.5
    assert float(found.std()) == pytest.approx(spread, rel=0.25)
    if n == m:
        assert mean == pytest.approx((k + k * (k + 1) / 2) / n)


@given(seeds, st.integers(2, 30), st.integers(2, 30), st.integers(1, 4))
def test_sliced_wasserstein_is_scipy_s_in_each_direction(seed: int, n: int, m: int, k: int) -> None:
    a, b, directions = normal(seed, n, k), normal(seed + 1, m, k), random_directions(k, 5, seed)
    assert torch.allclose(directions.norm(dim=0), torch.ones(5, dtype=torch.float64))
    each = [wasserstein_distance((a @ d).numpy(), (b @ d).numpy()) for d in directions.T]
    found = sliced_wasserstein(a, b, directions)
    assert found == pytest.approx(sum(each) / 5, rel=1e-9, abs=1e-12)
    assert sliced_wasserstein(b, a, directions) == pytest.approx(found)
    assert sliced_wasserstein(a, a[torch.randperm(n)], directions) == pytest.approx(0, abs=1e-12)
    shift = normal(seed + 2, k)
    assert sliced_wasserstein(a, a + shift, directions) == pytest.approx(float((shift @ directions).abs().mean()))
    assert sliced_wasserstein(a + shift, b + shift, directions) == pytest.approx(found)


@given(seeds, st.integers(1, 40))
def test_components_are_those_that_vary_most(seed: int, d: int) -> None:
    cov = gaussian(seed, d)[1]
    basis, values = principal_components(cov, 5), torch.linalg.eigvalsh(cov).flip(0)[:5]
    assert torch.allclose(basis.T @ basis, torch.eye(min(5, d), dtype=torch.float64), atol=1e-9)
    assert torch.allclose((basis.T @ cov @ basis).diagonal(), values, rtol=1e-8)


def test_channels_beyond_the_range() -> None:
    low, high = torch.tensor([-1.0, -1, -1, -1]), torch.tensor([1.0, 1, 1, 1])
    assert beyond_range(low, high, torch.tensor([-1.0, -2, 0, -1]), torch.tensor([1.0, 0, 3, 0.5])) == 0.5
    assert beyond_range(low, high, low, high) == 0


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_rows_are_dealt_whole(seed: int, first: int, second: int) -> None:
    dealt = deal_rows(first, first + second, seed, 30)
    assert dealt.shape == (31, first + second) and dealt[0].tolist() == [True] * first + [False] * second
    assert (dealt.sum(1) == first).all() and torch.equal(dealt, deal_rows(first, first + second, seed, 30))


def shifted(seed: int, rows: int, tokens: int, d: int, *, by_row: float, by_text: float) -> tuple[Tensor, ...]:
    """Two texts of `rows` rows: tokens around their row's mean, and the second text moved in its first channel."""
    x = normal(seed, 2 * rows, tokens, d) + by_row * normal(seed + 1, 2 * rows, 1, d)
    x[rows:, :, 0] += by_text
    return x.flatten(0, 1), torch.arange(2 * rows).repeat_interleave(tokens), x.amin(1), x.amax(1)


def test_rows_that_differ_among_themselves_are_no_difference_of_texts() -> None:
    """Independent tokens are as the formula says; tokens of a row that go together are not, and dealing rows tells: the
    true deal is among the random ones as often as chance has it, and beyond them where the texts do differ."""
    dealt = deal_rows(12, 24)

    def found(seed: int, by_row: float, by_text: float) -> tuple[float, float, float]:
        shift = state_shift(*shifted(seed, 12, 40, 3, by_row=by_row, by_text=by_text), dealt)
        return float(shift.kl[0]), shift.chance, chance_of(shift.kl[None])

    alone = [found(seed, 0.0, 0.0) for seed in range(25)]
    mean, spread = chance_kl(3, 480, 480)
    assert sum(nats for nats, *_ in alone) / 25 == pytest.approx(mean, abs=4 * spread / 25**0.5)
    assert all(chance == pytest.approx(mean) for _, chance, _ in alone)
    together = [found(seed, 1.0, 0.0) for seed in range(25)]
    assert sum(nats for nats, *_ in together) / 25 > 5 * mean, "far more than independent tokens would differ by"
    assert sum(p <= 0.1 for *_, p in together) <= 7 and sum(p > 0.5 for *_, p in together) >= 6
    assert all(p == 1 / 200 for *_, p in (found(seed, 0.3, 1.5) for seed in range(3)))


def test_states_are_compared_in_any_units(seed: int = 3) -> None:
    """KL and the share of channels do not depend on a channel's unit; a channel that is flat is left out."""
    x, row, low, high = shifted(seed, 6, 30, 4, by_row=0.2, by_text=0.5)
    dealt, units = deal_rows(6, 12, deals=9), torch.tensor([0.1, 1.0, 7.0, 100.0], dtype=torch.float64)
    plain, scaled = state_shift(x, row, low, high, dealt), state_shift(x * units, row, low * units, high * units, dealt)
    assert torch.allclose(plain.kl, scaled.kl, rtol=1e-6) and plain.beyond == scaled.beyond
    flat = torch.cat([x, torch.full((len(x), 1), 5.0)], 1)
    assert state_shift(flat, row, low, high, dealt).components == 4
    (mean_p, cov_p), (mean_q, cov_q) = moments(x[180:]), moments(x[:180])
    assert float(plain.kl[0]) == pytest.approx(float(gaussian_kl(mean_p, cov_p, mean_q, cov_q)), rel=1e-9)
    same = state_shift(torch.cat([x[:180], x[:180]]), row, torch.cat([low[:6]] * 2), torch.cat([high[:6]] * 2), dealt)
    assert float(same.kl[0]) == pytest.approx(0, abs=1e-12) and same.wasserstein[0] == pytest.approx(0, abs=1e-12)
    assert same.beyond[0] == 0 and chance_of(same.kl[None]) == 1


def test_of_many_blocks_the_greatest_counts() -> None:
    kl = torch.tensor([[3.0, 1, 2, 4], [1.0, 5, 1, 1]])
    assert chance_of(kl) == 0.75 and chance_of(kl[:1]) == 0.5
