"""Generators trained by scores: the gradient is that of the divergence, by quadrature in one dimension."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib import BadInput
from calib.losses.divergences import GENERATORS
from calib.losses.score_distillation import score_distillation, score_weight

Z = torch.linspace(-9, 9, 6001, dtype=torch.float64)
DENSITY = (-Z.square() / 2).exp() / math.sqrt(2 * math.pi) * (Z[1] - Z[0])
MEANS, SPREADS, SHARES = (torch.tensor(of, dtype=torch.float64) for of in ([-1.0, 1.5], [0.9, 1.1], [0.4, 0.6]))


def log_p(x: Tensor) -> Tensor:
    """A mixture of two Gaussians."""
    apart = ((x[..., None] - MEANS) / SPREADS).square() / 2 + SPREADS.log() + math.log(2 * math.pi) / 2
    return (SHARES.log() - apart).logsumexp(-1)


def generated(theta: Tensor) -> Tensor:
    """Samples of q at the nodes: not a line in z, so q is not Gaussian."""
    return theta[0] + theta[1].exp() * (Z + theta[2] * Z.tanh())


def log_q(x: Tensor, z: Tensor, theta: Tensor) -> Tensor:
    slope = theta[1].exp() * (1 + theta[2] * (1 - z.tanh().square()))
    return -z.square() / 2 - math.log(2 * math.pi) / 2 - slope.log()


def score(log_density: Tensor, by: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(log_density.sum(), by, retain_graph=True)
    return found


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_the_gradient_is_that_of_the_divergence(name: str) -> None:
    theta = torch.tensor([0.3, 0.1, 0.4], dtype=torch.float64, requires_grad=True)

    # E_q f(p / q) by quadrature over z, differentiated as it stands.
    x = generated(theta)
    divergence = (DENSITY * GENERATORS[name]((log_p(x) - log_q(x, Z, theta)).exp())).sum()
    (expected,) = torch.autograd.grad(divergence, theta)

    x = generated(theta)
    free, z = x.detach().requires_grad_(), Z.clone().requires_grad_()
    s_p = score(log_p(free), free)
    s_q = score(log_q(x.detach(), z, theta), z) / score(generated_at(z, theta), z)  # by x = by z / (dx / dz)
    weight = score_weight(log_p(x) - log_q(x, Z, theta), name)
    loss = (DENSITY * score_distillation(x[:, None], s_p[:, None], s_q[:, None], weight)).sum()
    (found,) = torch.autograd.grad(loss, theta)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


def generated_at(z: Tensor, theta: Tensor) -> Tensor:
    theta = theta.detach()
    return theta[0] + theta[1].exp() * (z + theta[2] * z.tanh())


@given(st.lists(st.tuples(st.floats(-8, 8), st.integers(0, 3)), min_size=1, max_size=30), st.floats(1.5, 20))
def test_normalised_within_each_bin_and_then_clipped(rows: list[tuple[float, int]], bound: float) -> None:
    log_ratio = torch.tensor([ratio for ratio, _ in rows], dtype=torch.float64)
    bins = torch.tensor([of for _, of in rows])
    weight = score_weight(log_ratio, "forward-kl", bins, bound)
    for level in set(bins.tolist()):
        of = log_ratio[bins == level].exp()
        assert torch.allclose(weight[bins == level], (of / of.mean()).clamp(max=bound), rtol=1e-9)
    ones = torch.ones(len(rows), dtype=torch.float64)
    assert torch.allclose(score_weight(log_ratio, "reverse-kl", bins), ones, rtol=1e-12)


def test_a_divergence_that_is_not_known() -> None:
    with pytest.raises(BadInput, match="use one of forward-kl"):
        score_weight(torch.zeros(2), "kl")


def test_nothing_flows_into_scores_and_weights() -> None:
    x, s_p, s_q, weight = (torch.randn(3, 4, requires_grad=True) for _ in range(4))
    score_distillation(x, s_p, s_q, weight[:, 0]).sum().backward()
    assert torch.allclose(x.grad, (s_q - s_p) * weight[:, :1])
    assert s_p.grad is None and s_q.grad is None and weight.grad is None


@pytest.mark.parametrize("divergence", GENERATORS)
def test_weights_in_half_precision_are_those_in_double(divergence: str) -> None:
    """exp(12) is beyond half precision, and one such sample made all weights of its noise level 0 or no number."""
    ratio, bins = torch.tensor([12.0, 0.0, -3.0, 30.0]), torch.tensor([0, 0, 0, 1])
    half, exact = (score_weight(ratio.to(dtype), divergence, bins) for dtype in (torch.float16, torch.float64))
    assert half.dtype is torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=1e-3, atol=1e-4)
    assert score_weight(ratio.half(), divergence).isfinite().all()
