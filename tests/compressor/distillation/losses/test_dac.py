from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.losses.divergences import dense, forward_kl
from calib.losses.top_k import top_k, with_tail_bucket
from compressor.distillation.losses.dac import (
    ClipNet,
    _clipped,
    clip_objective,
    dac_clipped,
    dac_nucleus,
    span_correlation,
)
from compressor.distillation.losses.decoupled import bd_kd
from tests.drawn import pair, shuffled
from tests.oracles import softmax

seeds = st.integers(0, 10_000)


def within(lower: float, upper: float, softness: float = 0.02) -> Callable[[Tensor, Tensor], Tensor]:
    """The clip with the same limits for all rows."""

    def clipped(log_p: Tensor, log_q: Tensor) -> Tensor:
        ends = (torch.full_like(log_p[..., 0], end) for end in (lower, upper))
        return dac_clipped(log_p, log_q, *ends, softness)

    return clipped


def learnt(log_p: Tensor, log_q: Tensor) -> Tensor:
    return dac_clipped(log_p, log_q, *ClipNet(torch.Generator().manual_seed(0))(log_p, log_q))


DIVERGENT = {"bd-kd": bd_kd, "dac-nucleus": dac_nucleus, "within": within(0.1, 0.8), "learnt": learnt}


divergent = pytest.mark.parametrize("name", DIVERGENT)


def plain_nucleus(p: list[float], q: list[float], mass: float) -> float:
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept: list[int] = []
    while sum(p[i] for i in kept) < mass:
        kept.append(order[len(kept)])
    total = sum(p[i] * math.log(p[i] / q[i]) for i in kept)
    rest = [i for i in order if i not in kept]
    if not rest:
        return total
    p_rest, q_rest = sum(p[i] for i in rest), sum(q[i] for i in rest)
    return total + p_rest * math.log(p_rest / q_rest)


def plain_clipped(p: list[float], q: list[float], lower: float, upper: float, softness: float) -> float:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    order, before, middle = sorted(range(len(p)), key=lambda i: -p[i]), 0.0, [0.0] * len(p)
    for i in order:
        middle[i] = before + p[i] / 2
        before += p[i]
    total, sides = 0.0, [[0.0, 0.0], [0.0, 0.0]]
    for i, t in enumerate(middle):
        past, short = logistic((t - lower) / softness), logistic((upper - t) / softness)
        total += past * short * p[i] * math.log(p[i] / q[i])
        for side, share in enumerate((1 - past, past * (1 - short))):
            sides[side][0] += share * p[i]
            sides[side][1] += share * q[i]
    return total + sum(a * math.log(a / b) for a, b in sides)


@divergent
@given(seed=seeds)
def test_never_negative_and_zero_with_its_gradient_at_equality(name: str, seed: int) -> None:
    p, q = pair(seed)
    assert (dense(DIVERGENT[name], p, q) > 0).all()
    same = p.clone().requires_grad_()
    value = dense(DIVERGENT[name], p, same)
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-9


@divergent
@given(seed=seeds, constants=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_neither_constants_nor_the_order_of_classes_count(name: str, seed: int, constants: tuple[float, float]) -> None:
    p, q = pair(seed)
    order, expected = shuffled(seed), dense(DIVERGENT[name], p, q)
    moved = dense(DIVERGENT[name], p[:, order] + constants[0], q[:, order] + constants[1])
    assert torch.allclose(moved, expected, rtol=1e-6, atol=1e-9)


@divergent
@given(seed=seeds)
def test_classes_that_tie_are_not_told_apart_by_their_order(name: str, seed: int) -> None:
    """As 16-bit logits do all the time."""
    p, q = pair(seed)
    p, order = p.round(), shuffled(seed)
    moved = dense(DIVERGENT[name], p[:, order], q[:, order])
    assert torch.allclose(moved, dense(DIVERGENT[name], p, q), rtol=1e-6, atol=1e-9)


@divergent
def test_extremes_are_finite_in_value_and_gradient(name: str) -> None:
    p = torch.tensor([[1e4, -1e4, 0.0, 3.0], [0.0, 1e4, 1e4, -1e4], [-1e4, 1.0, 2.0, 1e4]])
    for a in (p, p.flip(0), p.flip(1), torch.zeros_like(p)):
        q = a.clone().requires_grad_()
        value = dense(DIVERGENT[name], p, q)
        (gradient,) = torch.autograd.grad(value.sum(), q)
        assert value.isfinite().all() and gradient.isfinite().all()


@divergent
@given(seed=seeds, k=st.integers(1, 8))
def test_a_teacher_s_top_is_one_more_class(name: str, seed: int, k: int) -> None:
    p, q = pair(seed)
    top = top_k(p, k)

    def together(z: Tensor) -> Tensor:
        kept = z.softmax(-1).gather(-1, top.index)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()

    expected = DIVERGENT[name](together(p), together(q))
    assert torch.allclose(with_tail_bucket(DIVERGENT[name], top, q), expected, rtol=1e-5, atol=1e-9)
    whole = with_tail_bucket(DIVERGENT[name], top_k(p, 9), q)
    assert torch.allclose(whole, dense(DIVERGENT[name], p, q), rtol=1e-6, atol=1e-9)


@given(seed=seeds, mass=st.floats(0.05, 0.999))
def test_the_nucleus_against_plain_loops(seed: int, mass: float) -> None:
    p, q = pair(seed)
    ours = dense(lambda a, b: dac_nucleus(a, b, mass), p, q)
    expected = [plain_nucleus(softmax(a), softmax(b), mass) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seed=seeds, masses=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_a_wider_nucleus_tells_more_and_all_of_it_tells_the_kl(seed: int, masses: tuple[float, float]) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    narrow, wide = (dac_nucleus(log_p, log_q, mass) for mass in sorted(masses))
    full = forward_kl(log_p, log_q)
    assert (narrow <= wide + 1e-12).all() and (wide <= full + 1e-12).all()
    assert torch.equal(dac_nucleus(log_p, log_q, 1.0), full)


def test_the_nucleus_at_its_ends() -> None:
    p = torch.tensor([[0.7, 0.2, 0.06, 0.04]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64)
    binary = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert dac_nucleus(p.log(), q.log(), 0.5).item() == pytest.approx(binary)
    assert dac_nucleus(p.log(), q.log(), 0.97).item() == pytest.approx(forward_kl(p.log(), q.log()).item())
    one = torch.zeros(2, 1)  # a vocabulary of one
    assert torch.equal(dac_nucleus(one, one), torch.zeros(2))
    for mass in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match="mass"):
            dac_nucleus(p.log(), q.log(), mass)


def test_the_nucleus_sees_mass_that_leaks_out_of_it() -> None:
    """Without the class for the rest, a student that keeps the ratios within and leaks all it can has no loss."""
    p = torch.tensor([[0.6, 0.36, 0.04]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.18, 0.52]], dtype=torch.float64)
    assert dac_nucleus(p.log(), q.log(), 0.9).item() == pytest.approx(
        0.96 * math.log(0.96 / 0.48) + 0.04 * math.log(0.04 / 0.52)
    )


@given(seed=seeds, ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), softness=st.floats(0.02, 0.5))
def test_the_clip_against_plain_loops_and_below_the_kl(seed: int, ends: tuple[float, float], softness: float) -> None:
    p, q = pair(seed)
    lower, upper = sorted(ends)
    ours = dense(within(lower, upper, softness), p, q)
    expected = [
        plain_clipped(softmax(a), softmax(b), lower, upper, softness)
        for a, b in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (ours <= dense(forward_kl, p, q) + 1e-12).all()


@given(seed=seeds, lower=st.floats(0, 0.5), uppers=st.tuples(st.floats(0.5, 1), st.floats(0.5, 1)))
def test_a_higher_limit_tells_more_and_far_limits_tell_the_kl(
    seed: int, lower: float, uppers: tuple[float, float]
) -> None:
    p, q = pair(seed)
    narrow, wide = (dense(within(lower, upper), p, q) for upper in sorted(uppers))
    assert (narrow <= wide + 1e-12).all()
    assert torch.allclose(dense(within(-1, 2), p, q), dense(forward_kl, p, q), rtol=1e-9)


@given(seed=seeds, spread=st.floats(0.1, 100))
def test_limits_are_ordered_and_apart_whatever_the_weights(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = ClipNet(generator, mass=0.4)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    lower, upper = net(*(z.log_softmax(-1) for z in pair(seed)))
    assert (lower >= 0).all() and (upper <= 1 + 1e-6).all() and (upper - lower >= 0.4 - 1e-6).all()


def test_limits_at_first_are_near_the_nucleus_and_the_seed_s() -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(0))
    net, again, other = (ClipNet(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    lower, upper = net(log_p, log_q)
    assert (lower < 0.01).all() and (upper - lower - 0.95).abs().max() < 1e-3 and lower.unique().numel() == 1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.read.weight, other.read.weight)
    with pytest.raises(ValueError, match="mass"):
        ClipNet(torch.Generator(), mass=1.0)


@given(seed=seeds, vocab=st.integers(1, 40))
def test_what_the_net_reads_has_no_vocabulary(seed: int, vocab: int) -> None:
    """Any number of classes in any order; the limits pass no gradient to the rows they are read off."""
    log_p, log_q = (z.log_softmax(-1).requires_grad_() for z in pair(seed, vocab=vocab))
    net = ClipNet(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.limits.weight, generator=torch.Generator().manual_seed(1))
    limits = torch.stack(net(log_p, log_q))
    order = shuffled(seed, vocab)
    assert torch.allclose(torch.stack(net(log_p[:, order], log_q[:, order])), limits, atol=1e-5)
    assert torch.autograd.grad(limits.sum(), (log_p, log_q), allow_unused=True) == (None, None)


def test_student_and_limits_each_have_a_loss_of_their_own() -> None:
    p, q = pair(4)
    q.requires_grad_()
    lower, upper = torch.full((4,), 0.1).requires_grad_(), torch.full((4,), 0.8).requires_grad_()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    from_loss = torch.autograd.grad(dac_clipped(log_p, log_q, lower, upper).sum(), (q, lower, upper), allow_unused=True)
    assert from_loss[0].any() and from_loss[1:] == (None, None)
    aims = clip_objective(log_p, log_q, lower, upper)
    from_aims = torch.autograd.grad(aims.sum(), (q, lower, upper), allow_unused=True)
    assert from_aims[0] is None and from_aims[1].any() and from_aims[2].any()
    assert (aims.abs() <= 1).all()
    step = 1e-6
    measured = clip_objective(log_p, log_q, lower, upper + step) - clip_objective(log_p, log_q, lower, upper - step)
    assert measured.double().sum().item() / 2 / step == pytest.approx(from_aims[2].sum().item(), rel=0.1, abs=0.05)


def trained(objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], p: Tensor, q: Tensor) -> Tensor:
    """The share of the full KL that is left by limits which were free to go anywhere, after training them."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    free = torch.tensor([0.1, 0.9], dtype=torch.float64).expand(len(p), 2).clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        objective(log_p, log_q, *free.unbind(-1)).sum().backward()
        optimizer.step()
    return dac_clipped(log_p, log_q, *free.unbind(-1)) / forward_kl(log_p, log_q)


def test_limits_trained_on_the_clipped_kl_look_away_and_on_ours_do_not() -> None:
    p, q = pair(7, rows=32)
    published = trained(lambda *a: _clipped(*a, softness=0.02)[0], p, q)
    ours = trained(clip_objective, p, q)
    assert published.mean() < 0.35 and ours.mean() > 0.6


def test_the_net_learns_where_the_two_disagree() -> None:
    """Half of the rows disagree on the likely classes, half on the unlikely ones; which, the shapes give away."""
    generator = torch.Generator().manual_seed(0)
    p = torch.linspace(3, -3, 40).expand(64, 40) + 0.1 * torch.randn(64, 40, generator=generator)
    q = p + 0.02 * torch.randn(64, 40, generator=generator)
    q[:32, :4] += torch.tensor([1.5, -1.5, 1.5, -1.5])
    q[32:, 12:] += torch.tensor([2.0, -2.0]).repeat(14)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    net = ClipNet(generator, mass=0.2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    curve = []
    for _ in range(200):
        optimizer.zero_grad()
        value = clip_objective(log_p, log_q, *net(log_p, log_q)).mean()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    lower, upper = net(log_p, log_q)
    assert curve[-1] < curve[0] - 0.1
    assert upper[:32].mean() < upper[32:].mean() - 0.1 and (upper - lower >= 0.2 - 1e-6).all()


@given(seed=seeds, spans=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=4))
@settings(max_examples=50)
def test_spans_against_plain_loops(seed: int, spans: list[tuple[int, int]]) -> None:
    p, q = (z.softmax(-1) for z in pair(seed, rows=8))
    spans = [(start, start + length) for start, length in spans]

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.dist(x, [0.0] * 9) / math.dist(y, [0.0] * 9)

    gaps = [
        cosine(*p[t : t + 2].tolist()) - cosine(*q[t : t + 2].tolist())
        for start, end in spans
        for t in range(start, end - 1)
    ]
    expected = sum(g**2 for g in gaps) / max(len(gaps), 1)
    assert span_correlation(p, q, spans).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert span_correlation(p, p, spans) == 0


@given(seeds)
def test_spans_see_neither_order_of_classes_nor_widths_nor_other_tokens(seed: int) -> None:
    p, q = (z.softmax(-1) for z in pair(seed, rows=6))
    spans, order = [(0, 2), (3, 6)], shuffled(seed)
    value = span_correlation(p, q, spans)
    assert torch.allclose(span_correlation(p[:, order], torch.nn.functional.pad(q, (2, 1)), spans), value, rtol=1e-9)
    assert torch.allclose(span_correlation(p[2:], q[2:], [(1, 4)]), span_correlation(p, q, [(3, 6)]), rtol=1e-9)
    changed = q.clone()
    changed[2] = q[0]  # in no span
    assert torch.equal(span_correlation(p, changed, spans), value)


def test_spans_without_neighbours_and_rows_of_zeros() -> None:
    p = torch.zeros(4, 3)
    q = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for spans in ([], [(0, 1), (3, 4)], [(0, 4)]):
        value = span_correlation(p, q, spans)
        (gradient,) = torch.autograd.grad(value, q, allow_unused=True)
        assert value.isfinite() and gradient.isfinite().all()
        assert (value == 0) == (spans != [(0, 4)])
    zeros = torch.zeros(4, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(span_correlation(q.detach(), zeros, [(0, 4)]), zeros)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("span", [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_spans_out_of_range(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="span"):
        span_correlation(torch.ones(4, 3), torch.ones(4, 3), [(0, 2), span])
