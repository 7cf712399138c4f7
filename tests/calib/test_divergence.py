from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.divergence import (
    by_chunks,
    cross_entropy,
    forward_kl,
    kl_top_partial,
    kl_top_renormalised,
    kl_top_tail,
    reverse_kl,
    top_k,
)
from tests import oracles

seeds = st.integers(0, 10_000)


def pair(seed: int, rows: int = 4, vocab: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(rows, vocab, generator=g) for _ in range(2))  # type: ignore[return-value]


@given(seeds, st.floats(-50, 50))
def test_a_constant_added_to_logits_changes_nothing(seed: int, constant: float) -> None:
    p, _ = pair(seed)
    assert forward_kl(p, p + constant).abs().max() < 1e-5


@given(seeds)
def test_forward_and_reverse_swap(seed: int) -> None:
    p, q = pair(seed)
    assert torch.equal(forward_kl(p, q), reverse_kl(q, p))


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
    assert (values <= forward_kl(p, q) + 1e-5).all()


@given(seeds)
def test_with_every_token_kept_all_forms_are_the_kl(seed: int) -> None:
    p, q = pair(seed)
    top = top_k(p, 100)
    for form in (kl_top_tail, kl_top_partial, kl_top_renormalised):
        assert torch.allclose(form(top, q), forward_kl(p, q), atol=1e-5)


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


@given(seeds, st.integers(1, 12))
def test_chunks_of_any_size_give_the_whole_loss_and_gradient(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(10, 5, generator=g).double(), torch.randn(9, 5, generator=g).double()
    target = torch.randint(9, (10,), generator=g)

    def value(positions: slice, x: Tensor, head: Tensor) -> Tensor:
        return -(x @ head.mT).log_softmax(-1).gather(-1, target[positions, None]).sum()

    whole_x, whole_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    whole = value(slice(None), whole_x, whole_head)
    whole.backward()
    some_head = head.clone().requires_grad_()
    total, gradient = by_chunks(hidden, lambda p, x: value(p, x, some_head), 9, size)
    assert total == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, whole_x.grad, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(some_head.grad, whole_head.grad, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]


def test_cross_entropy_of_a_uniform_guess() -> None:
    assert cross_entropy(torch.tensor([3]), torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
