from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.losses.divergences import DIVERGENCES, cross_entropy, dense, forward_kl, masked_mean
from compressor.distillation.losses.decoupled import POINTWISE, bd_kd, nkd, ofa, uskd
from tests.drawn import pair, shuffled, targets
from tests.oracles import softmax

seeds = st.integers(0, 10_000)
pointwise = pytest.mark.parametrize("name", POINTWISE)


def plain_nkd(p_logits: list[float], q_logits: list[float], y: int, gamma: float, lam: float) -> float:
    p, q = softmax(p_logits), softmax(q_logits)
    others = [i for i in range(len(p)) if i != y]
    p_hat, q_hat = (softmax([z[i] / lam for i in others]) for z in (p_logits, q_logits))
    cross = -sum(a * math.log(b) for a, b in zip(p_hat, q_hat, strict=True))
    return -p[y] * math.log(q[y]) + gamma * lam**2 * cross


def plain_uskd(rows: list[list[float]], weak: list[list[float]] | None, ys: list[int]) -> list[float]:
    """alpha 1, beta 0.1, mu 0.005."""
    found = [softmax(row)[y] for row, y in zip(rows, ys, strict=True)]
    level = sum(q**2 for q in found) / len(found)
    values = []
    for n, (row, y, q_y) in enumerate(zip(rows, ys, found, strict=True)):
        others = [i for i in range(len(row)) if i != y]
        q_hat = softmax([row[i] for i in others])
        w_hat = softmax([weak[n][i] for i in others]) if weak else [0.0] * len(others)
        ranking = sorted(range(len(others)), key=lambda k: -(q_hat[k] + w_hat[k]))
        total = sum(1 / r for r in range(1, len(row)))
        cross = -sum(math.log(q_hat[k]) / (r + 1) / total for r, k in enumerate(ranking))
        value = -(q_y**2 + 1 - level) * math.log(q_y) + 0.1 * cross
        if weak:
            w = softmax(weak[n])
            label = [0.1 / len(w) + (0.9 if i == y else 0.0) for i in range(len(w))]
            value -= 0.005 * sum(a * math.log(b) for a, b in zip(label, w, strict=True))
        values.append(value)
    return values


@pytest.mark.parametrize(("gamma", "lam"), [(1.5, 1.0), (3.5, 3.0)])
@given(seed=seeds)
def test_nkd_against_plain_loops(gamma: float, lam: float, seed: int) -> None:
    p, q = pair(seed)
    y = targets(seed)
    expected = [plain_nkd(a.tolist(), b.tolist(), int(t), gamma, lam) for a, b, t in zip(p, q, y, strict=True)]
    assert nkd(p, q, y, gamma, lam).tolist() == pytest.approx(expected, rel=1e-9)


@given(seed=seeds, step=st.floats(-5, 5))
def test_the_target_s_logit_has_no_part_in_nkd_s_second_term(seed: int, step: float) -> None:
    """One published revision has a mask that leaves nothing out: both softmaxes then hold the target too."""
    p, q = pair(seed)
    y = targets(seed)
    second = nkd(p, q, y) - nkd(p, q, y, gamma=0)
    there = torch.nn.functional.one_hot(y, 9) * step
    moved = nkd(p + there, q - there, y) - nkd(p + there, q - there, y, gamma=0)
    assert torch.allclose(moved, second, rtol=1e-9)


@given(seeds)
def test_nkd_s_second_term_is_least_at_the_teacher_and_its_first_is_not(seed: int) -> None:
    p, _ = pair(seed)
    y = targets(seed)
    q = p.clone().requires_grad_()
    (first,) = torch.autograd.grad(nkd(p, q, y, gamma=0).sum(), q)
    (both,) = torch.autograd.grad(nkd(p, q, y).sum(), q)
    assert torch.allclose(both, first, atol=1e-12)
    p_y = p.softmax(-1).gather(-1, y[:, None])
    assert torch.allclose(first.gather(-1, y[:, None]), p_y * (p_y - 1), atol=1e-12)  # towards q_y = 1, not p_y


@given(seed=seeds, e=st.floats(0.3, 3), temperature=st.floats(0.5, 4))
def test_ofa_in_its_published_form(seed: int, e: float, temperature: float) -> None:
    """-sum ((p + onehot)^e - onehot) log q."""
    p, q = pair(seed)
    y = targets(seed)
    one_hot = torch.nn.functional.one_hot(y, 9)
    raised = ((p / temperature).softmax(-1) + one_hot) ** e - one_hot
    expected = -(raised * (q / temperature).log_softmax(-1)).sum(-1)
    assert torch.allclose(ofa(p, q, y, e, temperature), expected, rtol=1e-9)


@given(seeds)
def test_ofa_at_one_is_forward_kl_and_the_teacher_s_entropy(seed: int) -> None:
    p, q = pair(seed)
    entropy = -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)
    assert torch.allclose(ofa(p, q, targets(seed), e=1), dense(forward_kl, p, q) + entropy, rtol=1e-9)


@pytest.mark.parametrize("with_weak", [False, True])
@given(seed=seeds)
def test_uskd_against_plain_loops(with_weak: bool, seed: int) -> None:
    q, weak = pair(seed)
    y = targets(seed)
    ours = uskd(q, y, weak_logits=weak if with_weak else None)
    assert ours.tolist() == pytest.approx(plain_uskd(q.tolist(), weak.tolist() if with_weak else None, y.tolist()))


@given(seeds)
def test_uskd_of_one_row_or_of_rows_alike_begins_with_cross_entropy(seed: int) -> None:
    """The soft target is 1 on the mean of the batch, so that alone a row has its hard label."""
    q, _ = pair(seed, rows=1)
    y = targets(seed, rows=1)
    assert torch.allclose(uskd(q, y, beta=0), cross_entropy(y, q))
    assert torch.allclose(uskd(q.expand(5, -1), y.expand(5), beta=0), cross_entropy(y, q))
    q, _ = pair(seed)
    y = targets(seed)
    soft = uskd(q, y, beta=0) / cross_entropy(y, q)
    assert soft.mean().item() == pytest.approx(1) and (soft > 0).all()


@given(seed=seeds, mask=st.lists(st.booleans(), min_size=4, max_size=4))
def test_uskd_s_masked_rows_and_chunks_see_the_batch_s_level(seed: int, mask: list[bool]) -> None:
    q, _ = pair(seed)
    y, keep = targets(seed), torch.tensor(mask)
    whole = uskd(q, y, mask=keep)
    assert whole.isfinite().all()
    if keep.any():
        assert torch.allclose(whole[keep], uskd(q[keep], y[keep]))
        level = (-2 * cross_entropy(y, q))[keep].exp().mean()
        assert torch.allclose(torch.cat([uskd(q[i : i + 1], y[i : i + 1], level=level) for i in range(4)]), whole)


def test_uskd_ranks_by_probabilities_of_both_heads() -> None:
    """The authors' code adds the student's log-probabilities to the weak head's probabilities, which drown in them.

    Of the classes beside target 0 the student has .8, .2 and next to nothing, the weak head nothing, .35 and .65.
    """
    q = torch.tensor([[0.5, 0.4, 0.1 - 1e-6, 1e-6]], dtype=torch.float64).log()
    weak = torch.tensor([[0.2, 1e-9, 0.28, 0.52]], dtype=torch.float64).log()
    second = uskd(q, torch.tensor([0]), weak_logits=weak, alpha=0, beta=1, mu=0).item()
    found = [2 * x for x in q[0, 1:].exp().tolist()]
    by_both, by_logs = (
        -sum(z * math.log(x) for z, x in zip(law, found, strict=True))
        for law in ((6 / 11, 2 / 11, 3 / 11), (6 / 11, 3 / 11, 2 / 11))
    )
    drowned = weak[0, 1:].exp() / 0.8 + q[0, 1:] / (1 - q[0, 0])
    assert drowned.argsort(descending=True).tolist() == [0, 1, 2]
    assert second == pytest.approx(by_both) and second != pytest.approx(by_logs)


def test_uskd_s_target_is_not_ranked_even_where_others_have_vanished() -> None:
    q = torch.tensor([[0.0, 5.0, -2000.0, -2000.0]], dtype=torch.float64)
    second = uskd(q, torch.tensor([0]), weak_logits=q, alpha=0, beta=1, mu=0)
    assert second.item() == pytest.approx(2005 * (3 / 11 + 2 / 11))


def test_uskd_has_no_gradient_through_what_it_aims_at() -> None:
    """t and z are constants: the gradient is that of -t log q_y - beta sum z log q^ with both held."""
    q, weak = pair(3)
    y = targets(3)
    q.requires_grad_()
    weak.requires_grad_()
    from_q, from_weak = torch.autograd.grad(uskd(q, y, weak_logits=weak, mu=0.5).sum(), (q, weak))
    square = (-2 * cross_entropy(y, q.detach())).exp()
    soft = square + 1 - square.mean()
    on_target = soft[:, None] * (q.detach().softmax(-1) - torch.nn.functional.one_hot(y, 9))
    others = from_q - on_target
    assert others.gather(-1, y[:, None]).abs().max() < 1e-12  # the second part does not see the target's logit
    label = torch.nn.functional.one_hot(y, 9) * 0.9 + 0.1 / 9
    assert torch.allclose(from_weak, 0.5 * (weak.detach().softmax(-1) - label), atol=1e-12)


@pointwise
@given(seed=seeds, constants=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_a_constant_added_to_logits_changes_nothing(name: str, seed: int, constants: tuple[float, float]) -> None:
    p, q = pair(seed)
    y = targets(seed)
    expected = POINTWISE[name](p, q, y)
    assert torch.allclose(POINTWISE[name](p + constants[0], q + constants[1], y), expected, rtol=1e-9, atol=1e-11)


@pointwise
@given(seed=seeds)
def test_the_order_of_the_vocabulary_does_not_count(name: str, seed: int) -> None:
    p, q = pair(seed)
    y, order = targets(seed), shuffled(seed)
    moved = POINTWISE[name](p[:, order], q[:, order], order.argsort()[y])
    assert torch.allclose(moved, POINTWISE[name](p, q, y), rtol=1e-9)


@pointwise
@given(seed=seeds)
def test_columns_that_are_cut_carry_no_mass(name: str, seed: int) -> None:
    p, q = pair(seed)
    y = targets(seed)
    wide = [torch.nn.functional.pad(z, (0, 5)) for z in (p, q)]
    expected = POINTWISE[name](p, q, y)
    assert torch.equal(POINTWISE[name](*(z[..., :9] for z in wide), y), expected)
    assert not torch.allclose(POINTWISE[name](*wide, y), expected, rtol=1e-3)


@pointwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_are_finite_in_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    p = torch.tensor([[1e4, -1e4, 0.0, 3.0], [0.0, 1e4, 1e4, -1e4], [-1e4, 1.0, 2.0, 1e4]], dtype=dtype)
    for a in (p, p.flip(0), p.flip(1), torch.zeros_like(p)):
        for y in range(4):
            q = a.clone().requires_grad_()
            value = POINTWISE[name](p, q, torch.full((3,), y))
            (gradient,) = torch.autograd.grad(value.sum(), q)
            assert value.dtype == torch.float32 and value.isfinite().all() and gradient.isfinite().all()
            value = uskd(q, torch.full((3,), y), weak_logits=p)
            (gradient,) = torch.autograd.grad(value.sum(), q)
            assert value.isfinite().all() and gradient.isfinite().all()


@pointwise
@given(seed=seeds)
def test_any_leading_shape(name: str, seed: int) -> None:
    p, q = pair(seed, rows=6)
    y = targets(seed, rows=6)
    folded = POINTWISE[name](p.view(2, 3, 9), q.view(2, 3, 9), y.view(2, 3))
    assert torch.allclose(folded, POINTWISE[name](p, q, y).view(2, 3), rtol=1e-12)


@pointwise
def test_an_empty_mask_gives_zero(name: str) -> None:
    p, q = pair(0)
    q.requires_grad_()
    mean = masked_mean(POINTWISE[name](p, q, targets(0)), torch.zeros(4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(mean, q)
    assert mean == 0 and not gradient.any()
    nobody = uskd(q, targets(0), mask=torch.zeros(4, dtype=torch.bool))
    assert nobody.isfinite().all()


@given(seed=seeds, heavier=st.floats(1, 4))
def test_bd_kd_weighs_by_entropy_row_by_row(seed: int, heavier: float) -> None:
    p, q = pair(seed)
    expected = []
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        a, b = softmax(a), softmax(b)
        of_p, of_q = (-sum(x * math.log(x) for x in z) for z in (a, b))
        forward = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        reverse = sum(y * math.log(y / x) for x, y in zip(a, b, strict=True))
        expected.append(forward * (heavier if of_p > of_q else 1) + reverse * (heavier if of_q > of_p else 1))
    assert dense(lambda a, b: bd_kd(a, b, heavier), p, q).tolist() == pytest.approx(expected, rel=1e-9)


@given(seeds)
def test_bd_kd_turned_round_is_itself_and_evenly_weighted_it_is_jeffreys(seed: int) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair(seed))
    assert torch.allclose(bd_kd(log_p, log_q), bd_kd(log_q, log_p), rtol=1e-9)
    assert torch.allclose(bd_kd(log_p, log_q, 1.0), DIVERGENCES["jeffreys"](log_p, log_q), rtol=1e-9)


def test_bd_kd_is_zero_at_equality_where_the_published_cross_entropy_is_not() -> None:
    """Third-party code has a cross-entropy for the forward half: its size tells of the teacher, not of the student."""
    log_p = torch.zeros(1, 1000, dtype=torch.float64).log_softmax(-1)
    published = -(log_p.exp() * log_p).sum(-1)
    assert bd_kd(log_p, log_p).item() == 0 and published.item() == pytest.approx(math.log(1000))
