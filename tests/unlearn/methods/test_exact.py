from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn.methods.exact import Logistic, Ridge

seeds = st.integers(0, 10_000)


def problem(seed: int, n: int = 60, d: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = x @ torch.randn(d, classes, generator=g, dtype=torch.float64)
    return x, y + 0.5 * torch.randn(n, classes, generator=g, dtype=torch.float64)


@given(seeds, st.integers(0, 59))
def test_deleting_rows_is_fitting_without_them(seed: int, count: int) -> None:
    x, y = problem(seed)
    fit, fresh = Ridge.fit(x, y, 0.7).without(x[:count], y[:count]), Ridge.fit(x[count:], y[count:], 0.7)
    assert torch.allclose(fit.theta, fresh.theta, atol=1e-8) and torch.allclose(fit.inverse, fresh.inverse, atol=1e-8)


@given(seeds, st.integers(1, 40))
def test_deletions_in_two_steps_are_one(seed: int, count: int) -> None:
    x, y = problem(seed)
    whole = Ridge.fit(x, y, 0.5)
    step = whole.without(x[:count], y[:count]).without(x[count:50], y[count:50])
    assert torch.allclose(step.theta, whole.without(x[:50], y[:50]).theta, atol=1e-8)


@given(seeds)
def test_leave_one_out_is_exact_for_one_row_and_first_order_is_less(seed: int) -> None:
    x, y = problem(seed)
    fit, i = Ridge.fit(x, y, 0.5), seed % 60
    exact = x @ (fit.theta - fit.without(x[i : i + 1], y[i : i + 1]).theta)
    assert torch.allclose(fit.influences(x, y, x, leave_one_out=True)[i], exact, atol=1e-10)
    first = fit.influences(x, y, x)[i]
    assert torch.allclose(first, exact * (1 - fit.leverages(x)[i]), atol=1e-10)


def test_a_sum_over_rows_is_not_the_deletion_of_all() -> None:
    """Which is why matching with summed weights can only be as good as they are."""
    x, y = problem(0)
    fit = Ridge.fit(x, y, 0.5)
    exact = x @ (fit.theta - fit.without(x[:15], y[:15]).theta)
    summed = fit.influences(x, y, x, leave_one_out=True)[:15].sum(0)
    assert 0.05 < ((summed - exact).norm() / exact.norm()).item() < 0.7


@given(seeds)
def test_a_logistic_fit_has_no_gradient_left_and_the_hessian_is_its_slope(seed: int) -> None:
    x, y = problem(seed)
    fit = Logistic.fit(x, y.argmax(-1), 3, 1.0)
    assert fit.gradient(x, y.argmax(-1)).abs().max() < 1e-8
    theta = fit.theta.clone().requires_grad_()
    slope = torch.autograd.functional.hessian(
        lambda t: Logistic(t, 1.0).objective(x, y.argmax(-1)), theta, vectorize=True
    )
    assert torch.allclose(slope.reshape(24, 24), fit.hessian(x), atol=1e-9)
    (gradient,) = torch.autograd.grad(Logistic(theta, 1.0).objective(x, y.argmax(-1)), theta)
    assert torch.allclose(gradient, fit.gradient(x, y.argmax(-1)), atol=1e-9)


def test_newton_steps_forget_and_influence_does_so_less_well() -> None:
    """Distances to a new fit, from nearest: two steps, one step with what is retained, influence, doing nothing."""
    ratios = []
    for seed in range(10):
        x, y = problem(seed, n=300, d=20, classes=2)
        labels, forget, penalty = y.argmax(-1), torch.arange(30), 1.0
        fit, fresh = (Logistic.fit(x[s:], labels[s:], 2, penalty) for s in (0, 30))
        moved = (
            fit.newton(x[30:], labels[30:], 2),
            fit.newton(x[30:], labels[30:]),
            fit.without(x, labels, forget),
            fit,
        )
        ratios.append([float((m.theta - fresh.theta).norm() / (fit.theta - fresh.theta).norm()) for m in moved])
    two, one, influence, nothing = torch.tensor(ratios).mean(0).tolist()
    assert two < 0.05 < one < 0.3 and one < influence < nothing == pytest.approx(1)
