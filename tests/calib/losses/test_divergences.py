from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.losses.divergences import (
    DIVERGENCES,
    GENERATORS,
    alpha_beta,
    cauchy_schwarz,
    cross_entropy,
    dense,
    f_divergence,
    f_weight,
    forward_kl,
    jensen_shannon,
    k2,
    k3,
    masked_mean,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_hellinger,
    total_variation,
)
from tests.drawn import pair

seeds = st.integers(0, 10_000)
every = pytest.mark.parametrize("name", DIVERGENCES)


@every
@given(seed=seeds)
def test_never_negative_and_zero_at_equality(name: str, seed: int) -> None:
    p, q = pair(seed)
    assert (dense(DIVERGENCES[name], p, q) > 0).all()
    assert dense(DIVERGENCES[name], p, p).abs().max() < 1e-12


@every
@given(seed=seeds)
def test_the_gradient_vanishes_at_equality(name: str, seed: int) -> None:
    p, _ = pair(seed)
    q = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dense(DIVERGENCES[name], p, q).sum(), q)
    assert gradient.abs().max() < 1e-9


@every
@given(seed=seeds, constants=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_a_constant_added_to_logits_changes_nothing(name: str, seed: int, constants: tuple[float, float]) -> None:
    p, q = pair(seed)
    moved = dense(DIVERGENCES[name], p + constants[0], q + constants[1])
    assert torch.allclose(moved, dense(DIVERGENCES[name], p, q), rtol=1e-9, atol=1e-11)


@every
@given(seed=seeds)
def test_a_step_downhill_is_downhill(name: str, seed: int) -> None:
    p, q = pair(seed)
    q.requires_grad_()
    before = dense(DIVERGENCES[name], p, q)
    (gradient,) = torch.autograd.grad(before.sum(), q)
    step = 1e-4 / gradient.abs().max().clamp(min=1e-9)
    assert (dense(DIVERGENCES[name], p, q - step * gradient).sum() < before.sum()).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_are_finite_in_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    p = torch.tensor([[1e4, -1e4, 0.0, 3.0], [0.0, 1e4, 1e4, -1e4], [-1e4, 1.0, 2.0, 1e4]], dtype=dtype)
    for a in (p, p.flip(0), p.flip(1), torch.zeros_like(p)):
        q = a.clone().requires_grad_()
        value = dense(DIVERGENCES[name], p, q)
        (gradient,) = torch.autograd.grad(value.sum(), q)
        assert value.dtype == torch.float32 and value.isfinite().all() and gradient.isfinite().all()


@every
@given(seed=seeds)
def test_columns_that_are_cut_carry_no_mass(name: str, seed: int) -> None:
    """Padding of a vocabulary: -inf logits, as a model that masks them gives, or a slice; zeros would not do."""
    p, q = pair(seed)
    wide = [torch.nn.functional.pad(z, (0, 5)) for z in (p, q)]
    expected = dense(DIVERGENCES[name], p, q)
    assert torch.equal(dense(DIVERGENCES[name], *(z[..., :9] for z in wide)), expected)
    assert not torch.allclose(dense(DIVERGENCES[name], *wide), expected, rtol=1e-3)


@given(seed=seeds, temperature=st.floats(0.2, 20))
def test_temperature_divides_logits(seed: int, temperature: float) -> None:
    p, q = pair(seed)
    expected = dense(forward_kl, p / temperature, q / temperature)
    assert torch.allclose(dense(forward_kl, p, q, temperature), expected, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_kl_against_the_library(seed: int) -> None:
    p, q = pair(seed)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    library = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(forward_kl(log_p, log_q), library)
    assert torch.equal(reverse_kl(log_p, log_q), forward_kl(log_q, log_p))


CLOSED = {
    "forward-kl": 1.0,
    "reverse-kl": 1.0,
    "js": 2.0,  # ours is divided by beta (1 - beta) = 1/4, the generator's by 1/2
    "softened-reverse-kl": 1.0,
    "hellinger": 1.0,
    "jeffreys": 1.0,
    "chi-square": 1.0,
}


@pytest.mark.parametrize("name", GENERATORS)
@given(seed=seeds)
def test_f_divergences_by_generator_are_their_closed_forms(name: str, seed: int) -> None:
    p, q = pair(seed)
    by_generator = dense(f_divergence(GENERATORS[name]), p, q)
    assert torch.allclose(CLOSED[name] * by_generator, dense(DIVERGENCES[name], p, q), rtol=1e-8, atol=1e-10)


WEIGHTS = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "js": lambda r: r / (r + 1),
    "softened-reverse-kl": lambda r: 1 / (r + 1),
    "hellinger": lambda r: r.sqrt() / 4,
    "jeffreys": lambda r: r + 1,
    "chi-square": lambda r: 2 * r.square(),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_weights_of_f_divergences(name: str) -> None:
    """h(r) = f''(r) r^2, as in arXiv:2502.15681."""
    r = torch.logspace(-3, 3, 25, dtype=torch.float64).reshape(5, 5)
    assert torch.allclose(f_weight(GENERATORS[name], r), WEIGHTS[name](r), rtol=1e-8)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_generator_form_is_finite_at_extremes(name: str) -> None:
    p = torch.tensor([[1e4, -1e4, 0.0, 3.0]])
    q = p.flip(-1).requires_grad_()
    value = dense(f_divergence(GENERATORS[name]), p, q)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert value.isfinite().all() and gradient.isfinite().all()


@given(seeds)
def test_generalised_jensen_shannon_is_continuous_and_ends_in_the_two_kls(seed: int) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    for end, kl in ((0.0, forward_kl), (1.0, reverse_kl)):
        assert torch.equal(jensen_shannon(log_p, log_q, end), kl(log_p, log_q))
        gaps = [
            (jensen_shannon(log_p, log_q, abs(end - away)) - kl(log_p, log_q)).abs().max().item()
            for away in (1e-3, 1e-8)
        ]
        assert gaps[1] < 0.05 * gaps[0] + 1e-7  # undivided, it would tend to zero here and jump
    halves = jensen_shannon(log_p, log_q), jensen_shannon(log_q, log_p)
    assert torch.allclose(*halves) and (halves[0] <= 4 * math.log(2)).all()


@given(seed=seeds, alpha=st.floats(0.01, 0.99))
def test_skew_against_plain_probabilities(seed: int, alpha: float) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    p, q = log_p.exp(), log_q.exp()
    mixed = alpha * p + (1 - alpha) * q
    assert torch.allclose(skew_kl(log_p, log_q, alpha), (p * (p / mixed).log()).sum(-1))
    mixed = (1 - alpha) * p + alpha * q
    assert torch.allclose(skew_reverse_kl(log_p, log_q, alpha), (q * (q / mixed).log()).sum(-1))


def test_the_gradient_of_skew_reverse_kl_is_that_of_the_stated_loss() -> None:
    """A published version detaches the student within the mixture: another gradient."""
    p, q = (z[:1] for z in pair(5))
    gradient = torch.autograd.functional.jacobian(lambda z: dense(skew_reverse_kl, p, z).sum(), q)
    step = 1e-6 * torch.randn_like(q, generator=None)
    measured = dense(skew_reverse_kl, p, q + step) - dense(skew_reverse_kl, p, q - step)
    assert measured.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-5)


@given(seeds)
def test_alpha_beta_at_its_named_corners(seed: int) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    corners = {
        (1, 0): forward_kl(log_p, log_q),
        (0, 1): reverse_kl(log_p, log_q),
        (0.5, 0.5): 4 * squared_hellinger(log_p, log_q),
        (1, 1): (log_p.exp() - log_q.exp()).square().sum(-1) / 2,
    }
    for (alpha, beta), expected in corners.items():
        assert torch.allclose(alpha_beta(log_p, log_q, alpha, beta), expected, rtol=1e-9, atol=1e-12)


@given(seed=seeds, at=st.floats(0.2, 1.5))
def test_alpha_beta_is_continuous_at_its_axes(seed: int, at: float) -> None:
    """Published special cases are scaled by 1/b where the limit has 1/b^2, so they jump unless the exponent is 1."""
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    for axis in (lambda e: (e, at), lambda e: (at, e), lambda e: (at, e - at)):
        on, near = alpha_beta(log_p, log_q, *axis(0.0)), alpha_beta(log_p, log_q, *axis(1e-6))
        assert torch.allclose(on, near, rtol=1e-3)
    assert torch.allclose(alpha_beta(log_p, log_q, 0, 0), alpha_beta(log_p, log_q, 1e-5, 1e-5), rtol=1e-2)


@given(seeds)
def test_bounded_ones_are_bounded_and_symmetric_ones_symmetric(seed: int) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    for f in (total_variation, squared_hellinger):
        assert (f(log_p, log_q) <= 1).all()
    for f in (total_variation, squared_hellinger, cauchy_schwarz, DIVERGENCES["jeffreys"]):
        assert torch.allclose(f(log_p, log_q), f(log_q, log_p), atol=1e-12)
    # Le Cam: H^2 <= TV <= H sqrt(2 - H^2), with H^2 = 1 - sum sqrt(p q)
    h = squared_hellinger(log_p, log_q)
    tv = total_variation(log_p, log_q)
    assert (h <= tv + 1e-12).all() and (tv <= (h * (2 - h)).sqrt() + 1e-12).all()


def test_estimators_on_policy_by_enumeration() -> None:
    """Summed over every token with its probability, the gradients of k2 and k3 are those of reverse and forward KL."""
    p, q = (z[0] for z in pair(1))
    log_p = p.log_softmax(-1)
    q.requires_grad_()
    log_q = q.log_softmax(-1)
    expected = {k2: reverse_kl(log_p, log_q), k3: forward_kl(log_p, log_q)}
    for estimator, kl in expected.items():
        weighted = (log_q.exp().detach() * estimator(log_p, log_q)).sum()
        a, b = (torch.autograd.grad(v, q, retain_graph=True)[0] for v in (weighted, kl))
        assert torch.allclose(a, b, atol=1e-10)
    value = (log_q.exp() * k3(log_p, log_q)).sum()
    assert value.item() == pytest.approx(reverse_kl(log_p, log_q).item(), rel=1e-9)  # as a value: the reverse KL


@given(seed=seeds, mask=st.lists(st.booleans(), min_size=4, max_size=4))
def test_masked_is_the_subset_and_an_empty_mask_gives_zero(seed: int, mask: list[bool]) -> None:
    p, q = pair(seed)
    q.requires_grad_()
    keep = torch.tensor(mask)
    values = dense(forward_kl, p, q).where(keep, torch.nan)  # what is masked may be anything
    mean = masked_mean(values, keep)
    (gradient,) = torch.autograd.grad(mean, q)
    assert gradient.isfinite().all()
    if keep.any():
        assert mean.item() == pytest.approx(dense(forward_kl, p[keep], q[keep]).mean().item())
    else:
        assert mean == 0


def test_cross_entropy_of_a_uniform_guess() -> None:
    assert cross_entropy(torch.tensor([3]), torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
