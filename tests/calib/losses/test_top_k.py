from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.losses.divergences import DIVERGENCES, dense, forward_kl
from calib.losses.top_k import (
    kl_top_partial,
    kl_top_renormalised,
    kl_top_tail,
    sample_targets,
    sampled_cross_entropy,
    top_k,
    with_tail_bucket,
)
from tests import drawn, oracles

seeds = st.integers(0, 10_000)
pair = partial(drawn.pair, dtype=torch.float32)


@given(seeds, st.integers(1, 9))
def test_tail_bucket_equals_plain_sums(seed: int, k: int) -> None:
    p, q = pair(seed)
    top = top_k(p, k)
    values = kl_top_tail(top, q)
    for row in range(len(p)):
        expected = oracles.kl_top_tail(p[row].tolist(), q[row].tolist(), top.index[row].tolist())
        assert values[row].item() == pytest.approx(expected, abs=2e-5)


@given(seeds, st.integers(1, 8))
def test_tail_bucket_lies_between_zero_and_the_full_kl(seed: int, k: int) -> None:
    p, q = pair(seed)
    values = kl_top_tail(top_k(p, k), q)
    assert (values >= -1e-6).all()
    assert (values <= dense(forward_kl, p, q) + 1e-5).all()


@given(seeds)
def test_with_every_token_kept_all_forms_are_the_kl(seed: int) -> None:
    p, q = pair(seed)
    top = top_k(p, 100)
    for form in (kl_top_tail, kl_top_partial, kl_top_renormalised):
        assert torch.allclose(form(top, q), dense(forward_kl, p, q), atol=1e-5)


@given(seeds, st.integers(1, 8))
def test_identities_between_the_three_forms(seed: int, k: int) -> None:
    p, q = pair(seed)
    top = top_k(p, k)
    a, b, c = kl_top_partial(top, q), kl_top_renormalised(top, q), kl_top_tail(top, q)
    m_p = p.softmax(-1).gather(-1, top.index).sum(-1).double()
    m_q = q.softmax(-1).gather(-1, top.index).sum(-1).double()
    assert torch.allclose(a.double(), m_p * b + m_p * (m_p / m_q).log(), atol=1e-4)
    binary = m_p * (m_p / m_q).log() + (1 - m_p) * ((1 - m_p) / (1 - m_q)).log()
    assert torch.allclose(c.double(), m_p * b + binary, atol=1e-4)


def test_published_forms_are_not_minimised_by_the_teacher_or_do_not_see_it_leave() -> None:
    """p = (.6, .4), q = (.8, .2), k = 1: the partial sum is below zero, the renormalised form is zero."""
    p, q = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.8, 0.2]]).log()
    top = top_k(p, 1)
    assert kl_top_partial(top, q).item() == pytest.approx(0.6 * math.log(0.6 / 0.8), abs=1e-6)
    assert kl_top_partial(top, q) < kl_top_partial(top, p)
    assert kl_top_renormalised(top, q).item() == pytest.approx(0, abs=1e-7)
    assert kl_top_tail(top, q) > kl_top_tail(top, p) + 0.05


@given(seeds, st.integers(1, 8))
def test_gradient_of_the_tail_form(seed: int, k: int) -> None:
    """q - p on the top, q (1 - (1 - m_p) / (1 - m_q)) off it."""
    p, q = pair(seed, rows=1)
    q.requires_grad_()
    top = top_k(p, k)
    kl_top_tail(top, q).sum().backward()
    ps, qs = p.softmax(-1), q.detach().softmax(-1)
    on = torch.zeros_like(ps, dtype=torch.bool).scatter(-1, top.index, True)
    m_p, m_q = ps[on].sum(), qs[on].sum()
    expected = torch.where(on, qs - ps, qs * (1 - (1 - m_p) / (1 - m_q)))
    assert q.grad is not None and torch.allclose(q.grad, expected, atol=1e-5)


def test_a_teacher_that_is_all_but_certain_gives_a_finite_loss_and_gradient() -> None:
    p = torch.tensor([[200.0, 0.0, -5.0, 3.0]])
    q = torch.zeros(1, 4, requires_grad=True)
    for form in (kl_top_tail, kl_top_partial, kl_top_renormalised):
        for k in (1, 2, 4):
            value = form(top_k(p, k), q)
            (gradient,) = torch.autograd.grad(value.sum(), q)
            assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds)
def test_every_divergence_with_every_token_kept_is_the_dense_one(name: str, seed: int) -> None:
    """Value and gradient; in double precision, so that the bound speaks of the mathematics."""
    p, q = (x.double() for x in pair(seed))
    q.requires_grad_()
    whole, kept = dense(DIVERGENCES[name], p, q), with_tail_bucket(DIVERGENCES[name], top_k(p, 9), q)
    assert torch.allclose(kept, whole, rtol=1e-9, atol=1e-9)
    a, b = (torch.autograd.grad(v.sum(), q)[0] for v in (whole, kept))
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"cauchy-schwarz", "alpha-beta"}))
@given(seed=seeds, k=st.integers(1, 8))
def test_a_bucket_never_adds_to_an_f_divergence(name: str, seed: int, k: int) -> None:
    p, q = (x.double() for x in pair(seed))
    value = with_tail_bucket(DIVERGENCES[name], top_k(p, k), q)
    assert (value >= -1e-12).all() and (value <= dense(DIVERGENCES[name], p, q) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds, k=st.integers(1, 8))
def test_a_bucket_is_one_more_class(name: str, seed: int, k: int) -> None:
    """The sparse form against the dense form of distributions that were put together by hand."""
    p, q = (x.double() for x in pair(seed))
    top = top_k(p, k)

    def together(z: Tensor) -> Tensor:
        probability = z.softmax(-1)
        kept = probability.gather(-1, top.index)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()

    expected = DIVERGENCES[name](together(p), together(q))
    assert torch.allclose(with_tail_bucket(DIVERGENCES[name], top, q), expected, rtol=1e-6, atol=1e-9)


def test_drawn_tokens_give_an_unbiased_gradient_of_the_forward_kl_and_top_k_a_biased_one() -> None:
    p, q = pair(3, rows=1, vocab=6)
    q.requires_grad_()
    exact = q.detach().softmax(-1) - p.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws, repeats = 12, 4000
    drawn = sample_targets(p.expand(repeats, -1), draws, generator)
    assert torch.allclose(drawn.weight.sum(-1), torch.ones(repeats))
    (gradient,) = torch.autograd.grad(sampled_cross_entropy(drawn, q.expand(repeats, -1)).mean(), q)
    # A share of 12 draws has a standard deviation below sqrt(1 / 48); of 4,000 of them, below 0.0023.
    assert (gradient - exact).abs().max() < 4 * 0.0023
    (biased,) = torch.autograd.grad(kl_top_renormalised(top_k(p, 2), q).sum(), q)
    assert (biased - exact).abs().max() > 0.05


@given(seeds)
def test_what_is_drawn_twice_is_kept_once(seed: int) -> None:
    p, q = pair(seed)
    drawn = sample_targets(p[:, None], 5, torch.Generator().manual_seed(seed))
    for index, weight in zip(drawn.index.flatten(0, 1), drawn.weight.flatten(0, 1), strict=True):
        kept = index[weight > 0]
        assert len(set(kept.tolist())) == len(kept)
        assert torch.allclose(weight * 5, (weight * 5).round()) and weight.sum().item() == pytest.approx(1)
    plain = -(drawn.weight * q[:, None].log_softmax(-1).gather(-1, drawn.index)).sum(-1)
    assert torch.allclose(sampled_cross_entropy(drawn, q[:, None]), plain, atol=1e-5)
