from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.losses.chunked_head import Head, by_chunks, through_head
from calib.losses.divergences import DIVERGENCES, dense

seeds = st.integers(0, 10_000)


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
    assert float(total) == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, whole_x.grad, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(some_head.grad, whole_head.grad, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]


def test_a_large_head_is_not_read_for_single_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many bytes a position's logits take: a twentieth of the width in positions; more where they fit."""
    head, hidden = Head(torch.randn(9, 100)), torch.randn(23, 100)
    for room, expected in ((0, [5, 5, 5, 5, 3]), (7 * 9 * 4, [7, 7, 7, 2])):
        monkeypatch.setattr("calib.losses.chunked_head.HEAD_BYTES", room)
        seen = list[int]()

        def loss(positions: slice, logits: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(logits))
            return logits.sum()

        through_head(hidden, head, loss)
        assert seen == expected
        seen.clear()
        head.each(hidden, lambda positions, logits: loss(positions, logits)[None].expand(len(logits)))
        assert seen == expected


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, 2.0)])
@given(seed=seeds, size=st.integers(1, 12))
def test_through_the_head_is_the_dense_loss(name: str, scale: float, cap: float | None, seed: int, size: int) -> None:
    """Value, and gradients of hidden states and of the head, from chunks of any size; teacher and student each with
    a width and a head of their own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(10, 5).requires_grad_(), normal(9, 5).requires_grad_()
    teacher_hidden, teacher = normal(10, 7), Head(normal(9, 7), cap=cap)
    head = Head(weight, scale, cap)
    share = torch.rand(10, generator=g, dtype=torch.float64)

    def loss(positions: slice, logits: Tensor) -> Tensor:
        values = dense(DIVERGENCES[name], teacher(teacher_hidden[positions]), logits)
        return (share[positions] * values).sum()

    whole = loss(slice(None), head(hidden))
    expected = torch.autograd.grad(whole, (hidden, weight))
    weight.grad = None
    total, gradient = through_head(hidden, head, loss, size)
    assert weight.grad is not None
    assert float(total) == pytest.approx(whole.item(), rel=1e-9)
    assert torch.allclose(gradient, expected[0], rtol=1e-6, atol=1e-10)
    assert torch.allclose(weight.grad, expected[1], rtol=1e-6, atol=1e-10)


def test_gradients_of_a_head_add_up_and_a_fixed_head_gets_none() -> None:
    hidden = torch.randn(4, 3)

    def loss(_: slice, logits: Tensor) -> Tensor:
        return logits.square().sum()

    weight = torch.randn(6, 3, requires_grad=True)
    through_head(hidden, Head(weight), loss, 3)
    assert weight.grad is not None
    once = weight.grad.clone()
    through_head(hidden, Head(weight), loss, 2)
    assert torch.allclose(weight.grad, 2 * once)
    fixed = weight.detach()
    through_head(hidden, Head(fixed), loss)
    assert fixed.grad is None


def test_no_position_at_all() -> None:
    weight = torch.randn(6, 3, requires_grad=True)
    total, gradient = through_head(torch.empty(0, 3), Head(weight), lambda _, z: z.sum())
    assert float(total) == 0 and gradient.shape == (0, 3)
    assert weight.grad is not None and not weight.grad.any()
