"""The fewest bits for a KL: brute force, closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from calib.stats.rate_distortion import LEVELS, bits_at, rate_curve, water_filling

seeds = st.integers(0, 10**6)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.floats(-8, 0))
def test_no_other_split_of_the_kl_takes_fewer_bits(seed: int, into: int, out: int, log_level: float) -> None:
    """Against a solver that knows nothing of water: it minimizes the bits over all D_i with the same sum."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, generator=g).exp().double() for n in (into, out))
    power = (0.7 * torch.outer(b, a)).flatten().numpy()
    nats, bits = water_filling(a, b, 0.7, torch.tensor([2.0**log_level], dtype=torch.float64))
    kl = float(nats)

    def rate(log_share: np.ndarray) -> float:
        return float(-0.5 * np.log2(np.exp(log_share)).sum())

    start = np.log(np.full(len(power), min(1.0, 2 * kl / power.sum())))
    spent = {"type": "ineq", "fun": lambda s: (kl - 0.5 * (power * np.exp(s)).sum()) / kl}
    options = {"maxiter": 500, "ftol": 1e-12}
    found = minimize(rate, start, bounds=[(-40, 0)] * len(power), constraints=[spent], options=options)
    assert float(bits) == pytest.approx(found.fun, abs=1e-4)
    level = np.minimum(power, 2.0**log_level)
    assert kl == pytest.approx(0.5 * level.sum())
    assert float(bits) == pytest.approx(rate(np.log(level / power)), abs=1e-9)


def test_weights_of_one_curvature_in_closed_form() -> None:
    """n weights with l s^2 = p each: a KL of n p 2^(-2 bits) / 2, a quarter with every bit."""
    nats, bits = water_filling(torch.full((4,), 2.0), torch.full((3,), 0.5), 0.25)
    curve = rate_curve(nats, bits, 12)
    for kl, rate in curve[:-1]:
        assert kl == pytest.approx(12 * 0.25 * 2 ** (-2 * rate) / 2)
    assert bits_at(curve, 12 * 0.25 / 2 / 16) == pytest.approx(2, abs=1e-6)
    assert bits_at(curve, 1e-9) is None and bits_at(curve, 1e9) is None


def test_directions_without_curvature_take_no_bits() -> None:
    a = torch.tensor([0.0, 1.0])
    with_, without = water_filling(a, torch.tensor([1.0, 0.0]), 1.0), water_filling(a[1:], torch.ones(1), 1.0)
    for one, other in zip(with_, without, strict=True):
        torch.testing.assert_close(one, other)
    nothing = water_filling(a, torch.zeros(2), 1.0)
    assert all(torch.equal(part, torch.zeros_like(LEVELS)) for part in nothing)
