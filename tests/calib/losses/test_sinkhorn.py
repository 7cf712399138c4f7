from __future__ import annotations

import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.losses.sinkhorn import COSTS, debiased, entropic, half_square, l1, sharp, sinkd, transport
from tests import oracles

seeds = st.integers(0, 10_000)


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int, n: int, c: int, scale: float = 3.0) -> Tensor:
    return (scale * points(seed, n, c)).softmax(-1)


@given(seed=seeds, n=st.integers(1, 7), m=st.integers(1, 7))
def test_the_plan_is_pot_s(seed: int, n: int, m: int) -> None:
    cost = half_square(points(seed, n, 3), points(seed + 1, m, 3))
    plan = transport(cost, 0.5, sweeps=3000, tolerance=1e-12)
    expected = ot.sinkhorn([1 / n] * n, [1 / m] * m, cost.numpy(), 0.5, method="sinkhorn_log", numItermax=10000)
    assert torch.allclose(plan.p, torch.as_tensor(expected), atol=1e-8)
    assert plan.error < 1e-10
    assert torch.allclose(plan.p.sum(-1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-9)


@given(seed=seeds)
def test_the_entropic_value_and_its_gradient(seed: int) -> None:
    """<P, C> + eps KL(P || a b) from its definition; the gradient in C is P, as a central difference sees it too."""
    cost, eps = l1(rows(seed, 4, 3), rows(seed + 1, 5, 3)).requires_grad_(), 0.3

    def value(c: Tensor) -> Tensor:
        return entropic(c, transport(c.detach(), eps, sweeps=5000, tolerance=1e-13))

    plan = transport(cost.detach(), eps, sweeps=5000, tolerance=1e-13)
    definition = (plan.p * cost).sum() + eps * (plan.p * (plan.p * 20).log()).sum()
    assert value(cost).item() == pytest.approx(definition.item(), abs=1e-9)
    (gradient,) = torch.autograd.grad(value(cost), cost)
    assert torch.allclose(gradient, plan.p, atol=1e-10)
    step = 1e-5 * points(seed, 4, 5)
    measured = (value(cost.detach() + step) - value(cost.detach() - step)).item() / 2
    assert measured == pytest.approx((plan.p * step).sum().item(), abs=1e-9)


@pytest.mark.parametrize("cost", COSTS)
@given(seed=seeds)
@settings(max_examples=8)
def test_debiased_is_zero_at_equality_and_symmetric_and_not_negative(cost: str, seed: int) -> None:
    x, y = rows(seed, 5, 4), rows(seed + 1, 5, 4)

    def s(a: Tensor, b: Tensor) -> Tensor:
        return debiased(a, b, COSTS[cost], 0.3, sweeps=3000, tolerance=1e-8)[0]

    assert abs(s(x, x).item()) < 1e-7
    assert s(x, y).item() == pytest.approx(s(y, x).item(), abs=1e-7)
    assert s(x, y) > 0


@given(seed=seeds, eps=st.floats(0.5, 2))
@settings(max_examples=10)
def test_a_shift_costs_half_its_square(seed: int, eps: float) -> None:
    """S(x, x + s) = |s|^2 / 2 for the quadratic cost and any eps."""
    x, s = points(seed, 6, 3), points(seed + 1, 3)
    value, error = debiased(x, x + s, half_square, eps, sweeps=3000, tolerance=1e-6)
    assert error < 1e-6
    assert value.item() == pytest.approx(s.square().sum().item() / 2, rel=1e-4)


@given(seed=seeds)
def test_blind_to_permutations(seed: int) -> None:
    """Which is why it is no loss by itself: it cannot say which row got which answer."""
    p, q = 3 * points(seed, 6, 4), 3 * points(seed + 1, 6, 4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert sinkd(p, p[order]).item() == pytest.approx(sinkd(p, p).item(), abs=1e-15)
    x, y = p.softmax(-1), q.softmax(-1)
    a, b = (debiased(x, z, l1, 0.1)[0].item() for z in (y, y[order]))
    assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("factor", [0.001, 0.0008])
@given(seed=seeds, b=st.integers(1, 6), c=st.integers(2, 5))
def test_fidelity_to_the_published_loss(factor: float, seed: int, b: int, c: int) -> None:
    """Value and gradient against the formula in plain loops: rows first, marginals of one, 20 sweeps, a sum."""
    p, q = 3 * points(seed, b, c), 3 * points(seed + 1, b, c)
    ours = sinkd(p, q.requires_grad_(), factor=factor)
    assert ours.item() == pytest.approx(oracles.sinkd(p.tolist(), q.tolist(), factor=factor), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours, q)
    for i, j in ((0, 0), (b - 1, c - 1)):
        around = []
        for step in (1e-5, -1e-5):
            moved = q.detach().clone()
            moved[i, j] += step
            around.append(oracles.sinkd(p.tolist(), moved.tolist(), factor=factor))
        assert gradient[i, j].item() == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-4, abs=1e-9)


@given(seed=seeds)
def test_two_rows_in_closed_form(seed: int) -> None:
    """Student = teacher: L = 2 d / (1 + exp(d / eps)), d the distance of the two rows; not zero."""
    z = points(seed, 2, 4)
    p = (z / 2).softmax(-1)
    delta = (p[0] - p[1]).abs().sum().item()
    assert sinkd(z, z, factor=1).item() == pytest.approx(2 * delta / (1 + math.exp(delta / 0.1)), rel=1e-6)
    assert sinkd(z[:1], z[1:], factor=1).item() == pytest.approx(delta, rel=1e-9)


def test_twenty_sweeps_have_not_converged_and_the_error_says_so() -> None:
    """Independent student, logits of deviation 3, C = 2, b = 64: a row-marginal error of about 0.07 (sheet .070)."""
    errors = []
    for seed in range(40):
        cost = l1(*((3 * points(2 * seed + i, 64, 2) / 2).softmax(-1) for i in (0, 1)))
        errors.append(transport(cost, 0.1, sweeps=20, anneal=False).error.item())
    assert 0.04 < sum(errors) / len(errors) < 0.11
    assert transport(cost, 0.1, sweeps=5000, tolerance=1e-6).error < 1e-6


def test_single_precision_does_not_underflow() -> None:
    """exp(-D / eps) is 0 in float32 below eps = 0.019; the log domain does not mind."""
    x = rows(0, 8, 5, 6.0).float()
    y = rows(1, 8, 5, 6.0).float().requires_grad_()
    value, error = debiased(y, x, l1, 0.002, sweeps=3000, tolerance=1e-3)
    (gradient,) = torch.autograd.grad(value, y)
    assert value.isfinite() and gradient.isfinite().all() and error < 1e-3


@given(seed=seeds, kept=st.lists(st.booleans(), min_size=5, max_size=5))
@settings(max_examples=15)
def test_masked_is_the_subset_and_an_empty_mask_gives_zero(seed: int, kept: list[bool]) -> None:
    x, y, mask = rows(seed, 5, 4).requires_grad_(), rows(seed + 1, 5, 4), torch.tensor(kept)
    value, error = debiased(x, y, l1, 0.3, mask=mask, sweeps=2000, tolerance=1e-7)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.isfinite().all() and not gradient[~mask].any() and error.isfinite()
    if mask.any():
        subset, _ = debiased(x[mask], y[mask], l1, 0.3, sweeps=2000, tolerance=1e-7)
        assert value.item() == pytest.approx(subset.item(), abs=1e-5)
    else:
        assert value == 0


@given(seeds)
@settings(max_examples=8)
def test_several_problems_at_once(seed: int) -> None:
    x, y = rows(seed, 15, 4).view(3, 5, 4), rows(seed + 1, 15, 4).view(3, 5, 4)
    together, _ = debiased(x, y, l1, 0.3, sweeps=2000, tolerance=1e-7)
    for i in range(3):
        assert together[i].item() == pytest.approx(
            debiased(x[i], y[i], l1, 0.3, sweeps=2000, tolerance=1e-7)[0].item(), abs=1e-5
        )


@given(seeds)
def test_the_unrolled_gradient_of_the_sharp_form_is_not_the_detached_one(seed: int) -> None:
    x, y = rows(seed, 8, 3).requires_grad_(), rows(seed + 1, 8, 3)
    cost = l1(x, y)
    unrolled = torch.autograd.grad(sharp(cost, transport(cost, 0.1, sweeps=200)), x, retain_graph=True)[0]
    plan = transport(cost.detach(), 0.1, sweeps=200)
    held = torch.autograd.grad((plan.p * cost).sum(), x)[0]
    assert (unrolled - held).norm() > 0.01 * held.norm()
    cosine = torch.nn.functional.cosine_similarity(unrolled.flatten(), held.flatten(), dim=0)
    assert cosine > 0.5
