from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.losses.divergences import forward_kl
from compressor.distillation.losses.representation import (
    HiddenProjection,
    gram_cauchy_schwarz,
    linear_cka,
    match_attention,
    match_hidden,
)

seeds = st.integers(0, 10_000)
masks = st.lists(st.booleans(), min_size=6, max_size=6)
Loss = Callable[..., Tensor]
GRAMS: dict[str, Loss] = {"cka": linear_cka, "cauchy-schwarz": gram_cauchy_schwarz}
grams = pytest.mark.parametrize("name", GRAMS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, d)).Q


def plain_cka(x: list[list[float]], y: list[list[float]]) -> float:
    """<K, L> / (|K| |L|) of Gram matrices of centred rows."""

    def gram(rows: list[list[float]]) -> list[list[float]]:
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        rows = [[v - m for v, m in zip(row, means, strict=True)] for row in rows]
        return [[sum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]

    k, other = gram(x), gram(y)
    return inner(k, other) / math.sqrt(inner(k, k) * inner(other, other))


def plain_cauchy_schwarz(x: list[list[float]], y: list[list[float]], bandwidth: float) -> float:
    def gram(rows: list[list[float]]) -> list[list[float]]:
        n = len(rows)
        square = [[math.dist(r, s) ** 2 for s in rows] for r in rows]
        mean = sum(map(sum, square)) / (n * (n - 1))
        return [[math.exp(-d / (2 * bandwidth**2 * mean)) for d in row] for row in square]

    k, other = gram(x), gram(y)
    return math.log(inner(k, k) * inner(other, other) / inner(k, other) ** 2)


def inner(a: list[list[float]], b: list[list[float]]) -> float:
    return sum(u * v for r, s in zip(a, b, strict=True) for u, v in zip(r, s, strict=True))


def test_a_projection_between_equal_widths_is_nothing() -> None:
    projection = HiddenProjection(7, 7)
    assert not list(projection.parameters()) and torch.equal(projection(torch.ones(2, 7)), torch.ones(2, 7))


def test_a_projection_starts_as_the_identity_cut_or_padded() -> None:
    hidden = normal(0, 2, 3, 4).float()
    assert torch.equal(HiddenProjection(4, 6)(hidden), torch.nn.functional.pad(hidden, (0, 2)))
    assert torch.equal(HiddenProjection(4, 2)(hidden), hidden[..., :2])
    assert HiddenProjection(4, 6)(hidden.bfloat16()).dtype == torch.bfloat16


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_hidden_states_against_the_formula_and_in_any_scale(seed: int, scale: float) -> None:
    t, s = normal(seed, 2, 3, 5), normal(seed + 1, 2, 3, 5)
    value = match_hidden(t, s)
    for i in range(2):
        for j in range(3):
            a, b = t[i, j].tolist(), s[i, j].tolist()
            expected = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(x**2 for x in a)
            assert value[i, j].item() == pytest.approx(expected)
    assert torch.allclose(match_hidden(scale * t, scale * s), value)
    turn = rotation(seed, 5)
    assert torch.allclose(match_hidden(t @ turn, s @ turn), value)
    assert not match_hidden(t, t).any() and torch.allclose(match_hidden(t, 0 * t), torch.ones(2, 3).double())


@given(seed=seeds, mask=masks)
def test_masked_hidden_states_may_be_anything(seed: int, mask: list[bool]) -> None:
    t, s, keep = normal(seed, 6, 4), normal(seed + 1, 6, 4), torch.tensor(mask)
    t[~keep], s[~keep] = torch.nan, torch.inf
    s.requires_grad_()
    value = match_hidden(t, s, keep)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert not value[~keep].any() and not gradient[~keep].any() and gradient.isfinite().all()
    assert torch.equal(value[keep], match_hidden(t[keep], s[keep]))


def test_hidden_states_of_zeros_and_of_great_size_and_in_16_bits() -> None:
    s = (1e4 * normal(0, 3, 4)).float().requires_grad_()
    for t in (torch.zeros(3, 4), torch.full((3, 4), 1e4), torch.full((3, 4), 1e-20)):
        value = match_hidden(t, s)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert value.isfinite().all() and gradient.isfinite().all()
    assert match_hidden(s.bfloat16(), s.bfloat16() * 0).dtype == torch.float32


@given(seeds)
def test_attention_of_as_many_heads_is_the_kl(seed: int) -> None:
    p, q = (normal(seed + i, 2, 3, 4, 5) for i in range(2))
    expected = forward_kl(p.log_softmax(-1), q.log_softmax(-1))
    assert torch.allclose(match_attention(p.softmax(-1), q.softmax(-1)), expected, atol=1e-12)
    assert not match_attention(p.softmax(-1), p.softmax(-1)).any()


@pytest.mark.parametrize(("teacher", "student", "groups"), [(6, 2, 2), (2, 6, 2), (6, 4, 2), (3, 2, 1), (4, 4, 4)])
def test_attention_of_other_numbers_of_heads(teacher: int, student: int, groups: int) -> None:
    p, q = normal(0, teacher, 4, 5).softmax(-1), normal(1, student, 4, 5).softmax(-1)
    value = match_attention(p, q)
    assert value.shape == (groups, 4) and (value >= 0).all()
    for g in range(groups):
        rows = []
        for heads in (p, q):
            each = len(heads) // groups
            rows.append(sum(heads[g * each + h] for h in range(each)) / each)
        assert torch.allclose(value[g], forward_kl(*(r.log() for r in rows)), atol=1e-12)
    order = [g * (teacher // groups) + h for g in range(groups) for h in reversed(range(teacher // groups))]
    assert torch.allclose(match_attention(p[order], q), value, atol=1e-12)  # within a group the order does not count


def test_attention_with_keys_nobody_may_see_and_with_weights_that_have_vanished() -> None:
    """A causal model has exact zeros; log 0 must meet them neither in the value nor in the gradient."""
    unseen = torch.ones(4, 4, dtype=torch.bool).triu(1)
    scores = normal(0, 2, 4, 4).float().requires_grad_()
    q = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    p = normal(1, 2, 4, 4).float().masked_fill(unseen, -torch.inf).softmax(-1)
    value = match_attention(p, q)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert gradient.isfinite().all() and torch.allclose(gradient, q.detach() - p, atol=1e-6)
    hard = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    for other in (hard.detach().flip(-1).softmax(-1), torch.full((1, 1, 3), 1 / 3)):
        value = match_attention(other, hard.softmax(-1))
        (gradient,) = torch.autograd.grad(value.sum(), hard)
        assert value.isfinite().all() and gradient.isfinite().all()


@given(seed=seeds, mask=masks)
def test_masked_queries_may_be_anything(seed: int, mask: list[bool]) -> None:
    p, q = normal(seed, 2, 4, 6, 5).softmax(-1), normal(seed + 1, 2, 2, 6, 5).softmax(-1)
    keep = torch.tensor([mask, mask[::-1]])
    whole = match_attention(p, q)
    p.mT[(~keep)[:, None, None].expand(2, 4, 5, 6)] = torch.nan
    q.mT[(~keep)[:, None, None].expand(2, 2, 5, 6)] = torch.nan
    q.requires_grad_()
    value = match_attention(p, q, keep)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert torch.allclose(value, whole.where(keep[:, None], 0)) and gradient.isfinite().all()


@given(seed=seeds, n=st.integers(3, 7), widths=st.tuples(st.integers(2, 5), st.integers(2, 5)))
def test_gram_losses_against_plain_loops(seed: int, n: int, widths: tuple[int, int]) -> None:
    x, y = normal(seed, n, widths[0]), normal(seed + 1, n, widths[1])
    assert linear_cka(x, y).item() == pytest.approx(1 - plain_cka(x.tolist(), y.tolist()), abs=1e-9)
    for bandwidth in (0.5, 1.0, 2.0):
        expected = plain_cauchy_schwarz(x.tolist(), y.tolist(), bandwidth)
        assert gram_cauchy_schwarz(x, y, bandwidth).item() == pytest.approx(expected, abs=1e-9)


@grams
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_gram_losses_are_blind_to_rotation_shift_scale_and_padding_of_a_side(
    name: str, seed: int, scale: float
) -> None:
    x, y = normal(seed, 6, 3), normal(seed + 1, 6, 4)
    value = GRAMS[name](x, y)
    moved = scale * (y @ rotation(seed, 4)) + normal(seed + 2, 4)
    assert torch.allclose(GRAMS[name](x, moved), value, atol=1e-8)
    assert torch.allclose(GRAMS[name](torch.nn.functional.pad(x, (1, 2)), y), value, atol=1e-9)
    assert abs(GRAMS[name](x, scale * torch.nn.functional.pad(x @ rotation(seed, 3), (0, 2)) - 5).item()) < 1e-8


@grams
@given(seed=seeds)
def test_gram_losses_are_not_negative_and_symmetric_and_blind_to_the_order_of_rows(name: str, seed: int) -> None:
    x, y = normal(seed, 6, 3), normal(seed + 1, 6, 4)
    value = GRAMS[name](x, y)
    assert 0 < value.item() < (1 if name == "cka" else math.inf)
    assert torch.allclose(GRAMS[name](y, x), value, atol=1e-12)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(GRAMS[name](x[order], y[order]), value, atol=1e-12)
    assert GRAMS[name](x, y[order]).item() != pytest.approx(value.item(), abs=1e-12) or order.tolist() == list(range(6))


@grams
@given(seed=seeds, mask=masks)
def test_masked_rows_are_left_out_and_an_empty_mask_gives_zero(name: str, seed: int, mask: list[bool]) -> None:
    x, y, keep = normal(seed, 6, 3), normal(seed + 1, 6, 4), torch.tensor(mask)
    x[~keep], y[~keep] = torch.nan, torch.inf
    y.requires_grad_()
    value = GRAMS[name](x, y, mask=keep)
    (gradient,) = torch.autograd.grad(value, y)
    assert gradient.isfinite().all() and not gradient[~keep].any()
    assert value.item() == pytest.approx(GRAMS[name](x[keep], y[keep]).item() if keep.any() else 0, abs=1e-12)
    if keep.sum() < 2:
        assert value == 0 and not gradient.any()


@grams
@given(seed=seeds)
def test_several_sets_at_once(name: str, seed: int) -> None:
    x, y = normal(seed, 3, 6, 3), normal(seed + 1, 3, 6, 4)
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    expected = [GRAMS[name](x[i], y[i], mask=keep[i]).item() for i in range(3)]
    assert GRAMS[name](x, y, mask=keep).tolist() == pytest.approx(expected, abs=1e-12)


@grams
def test_a_collapsed_student_is_not_rewarded_and_a_teacher_without_structure_asks_nothing(name: str) -> None:
    x, alike = normal(0, 7, 3).float(), normal(1, 1, 4).float().repeat(7, 1).requires_grad_()
    value = GRAMS[name](x, alike)
    (gradient,) = torch.autograd.grad(value, alike)
    assert value > 0.05 and gradient.isfinite().all()
    assert linear_cka(x, alike) == 1 and linear_cka(alike.detach(), x) == 0


@grams
@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e4, 1e12])
def test_great_and_small_states_are_finite_in_value_and_gradient(name: str, size: float) -> None:
    x, y = (size * normal(i, 6, 3).float() for i in range(2))
    y.requires_grad_()
    value = GRAMS[name](x, y)
    (gradient,) = torch.autograd.grad(value, y)
    assert value.item() == pytest.approx(GRAMS[name](x.double() / size, y.detach().double() / size).item(), abs=1e-4)
    assert gradient.isfinite().all() and gradient.any()
    assert GRAMS[name](x.bfloat16(), y.bfloat16()).dtype == torch.float32


@grams
@given(seed=seeds)
def test_the_gradient_is_the_slope(name: str, seed: int) -> None:
    """Also though the size that rows are divided by has none."""
    x, y, step = normal(seed, 6, 3), normal(seed + 1, 6, 4).requires_grad_(), 1e-6 * normal(seed + 2, 6, 4)
    (gradient,) = torch.autograd.grad(GRAMS[name](x, y), y)
    measured = (GRAMS[name](x, y + step) - GRAMS[name](x, y - step)).item() / 2
    assert measured == pytest.approx((gradient * step).sum().item(), abs=1e-12)


def test_cka_in_closed_form() -> None:
    """x of two orthogonal columns of one length, y one of them: CKA = 1 / sqrt 2; one against the other: 0."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert linear_cka(x, x[:, :1]).item() == pytest.approx(1 - 2**-0.5, abs=1e-6)
    assert linear_cka(x[:, 1:], x[:, :1]).item() == pytest.approx(1, abs=1e-6)
