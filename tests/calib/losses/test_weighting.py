from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.losses.weighting import Recap, by_gradient

norms = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)
seeds = st.integers(0, 10_000)


def some_losses(seed: int, steps: int, losses: int = 3) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, losses, generator=generator, dtype=torch.float64) + 0.1).tolist()


def after(recap: Recap, steps: list[list[float]]) -> list[float]:
    for values in steps:
        recap.step(values)
    return recap.weights


def plain_weights(history: list[list[float]], window: int, temperature: float, unrest: float) -> list[float]:
    scores = []
    for values in zip(*history[-2 * window :], strict=True):
        earlier, later = values[:window], values[window:]
        m_old, m_new = statistics.fmean(earlier), statistics.fmean(later)
        scores.append(min(m_new / m_old, 2) + unrest * statistics.pstdev(later) / (m_new + m_old))
    powers = [math.exp(s / temperature) for s in scores]
    return [len(powers) * p / sum(powers) for p in powers]


@given(norms, st.data())
def test_each_gradient_gets_its_share_of_the_weights(lengths: list[float], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(lengths), max_size=len(lengths)))
    factors = by_gradient(lengths, weights)
    shares = [f * n for f, n in zip(factors, lengths, strict=True)]
    assert shares == pytest.approx([w / sum(weights) for w in weights])
    assert sum(shares) == pytest.approx(1) and all(f > 0 for f in factors)


@given(norms, st.floats(0.1, 10), st.data())
def test_a_gradient_made_longer_has_its_factor_made_smaller_and_no_other_s(
    lengths: list[float], times: float, data: st.DataObject
) -> None:
    """Which balance by value is not: a loss times a constant would keep its factor."""
    i = data.draw(st.integers(0, len(lengths) - 1))
    before = by_gradient(lengths, [1.0] * len(lengths))
    scaled = by_gradient([n * times if j == i else n for j, n in enumerate(lengths)], [1.0] * len(lengths))
    assert scaled == pytest.approx([f / times if j == i else f for j, f in enumerate(before)])


@given(norms, st.floats(0.1, 100))
def test_only_the_ratio_of_weights_counts(lengths: list[float], times: float) -> None:
    weights = [float(i + 1) for i in range(len(lengths))]
    assert by_gradient(lengths, [w * times for w in weights]) == pytest.approx(by_gradient(lengths, weights))


def test_the_whole_gradient_is_never_longer_than_one_and_reaches_it_where_all_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradients = torch.randn(3, 8, generator=generator) * torch.tensor([[0.44], [5.0], [23.0]])
        factors = by_gradient(gradients.norm(dim=-1).tolist(), [1.0, 2.0, 0.5])
        assert (torch.tensor(factors)[:, None] * gradients).sum(0).norm() <= 1 + 1e-6
    alike = gradients[:1] * torch.tensor([[1.0], [3.0], [9.0]])
    factors = by_gradient(alike.norm(dim=-1).tolist(), [1.0, 2.0, 0.5])
    assert (torch.tensor(factors)[:, None] * alike).sum(0).norm().item() == pytest.approx(1, abs=1e-6)


def test_what_has_converged_is_not_blown_up() -> None:
    assert by_gradient([1.0, 0.0], [1.0, 1.0]) == pytest.approx([0.5, 500.0])
    assert by_gradient([1.0, 1e-30], [1.0, 1.0], floor=0.1) == pytest.approx([0.5, 5.0])
    assert by_gradient([0.0, 0.0], [1.0, 3.0]) == pytest.approx([0.25, 0.75])
    assert by_gradient([], []) == []


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([-1.0], [1.0]), ([math.inf], [1.0]), ([1.0], [0.0]), ([1.0], [-1.0])],
)
def test_norms_and_weights_that_cannot_be(lengths: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError):
        by_gradient(lengths, weights)


@given(seed=seeds, window=st.integers(2, 6), temperature=st.floats(0.1, 5), unrest=st.floats(-2, 2))
def test_weights_against_plain_sums(seed: int, window: int, temperature: float, unrest: float) -> None:
    steps = some_losses(seed, 2 * window + 3)
    recap = Recap(3, window, temperature=temperature, unrest=unrest, keep=0)
    assert after(recap, steps) == pytest.approx(plain_weights(steps, window, temperature, unrest))


@given(seed=seeds, steps=st.integers(0, 30), losses=st.integers(1, 5))
def test_weights_are_positive_and_sum_to_the_number_of_losses(seed: int, steps: int, losses: int) -> None:
    recap = Recap(losses, 4)
    weights = after(recap, some_losses(seed, steps, losses))
    assert all(w > 0 for w in weights) and sum(weights) == pytest.approx(losses)
    if steps < 8:
        assert weights == [1.0] * losses


@given(seed=seeds, factors=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_a_loss_times_a_constant_is_the_same_loss(seed: int, factors: list[float]) -> None:
    steps = some_losses(seed, 14)
    scaled = [[v * f for v, f in zip(values, factors, strict=True)] for values in steps]
    assert after(Recap(3, 5), scaled) == pytest.approx(after(Recap(3, 5), steps), rel=1e-9)


@given(seed=seeds, order=st.permutations([0, 1, 2]))
def test_the_order_of_losses_does_not_count(seed: int, order: list[int]) -> None:
    steps = some_losses(seed, 14)
    weights = after(Recap(3, 5), steps)
    moved = after(Recap(3, 5), [[values[i] for i in order] for values in steps])
    assert moved == pytest.approx([weights[i] for i in order])


def test_what_stands_still_gets_more_than_what_falls() -> None:
    steps = [[1.0, 0.97**t, 0.9**t] for t in range(30)]
    stands, falls, dives = after(Recap(3, 10, unrest=0), steps)
    assert stands > falls > dives


def test_what_is_unstable_gets_less_or_as_in_the_paper_more() -> None:
    steps = [[1.0, 1 + 0.5 * (-1) ** t] for t in range(40)]
    calm, wild = after(Recap(2, 10), steps)
    assert calm > 1 > wild
    calm, wild = after(Recap(2, 10, unrest=1), steps)
    assert calm < 1 < wild


def test_a_closed_form() -> None:
    """One loss stands, one halves between windows: c = 1 and 1/2, i = 0; e^(1/2T) between their weights."""
    steps = [[1.0, 1.0]] * 5 + [[1.0, 0.5]] * 5
    for temperature in (0.5, 5.0):
        stands, halves = after(Recap(2, 5, temperature=temperature, keep=0), steps)
        assert stands / halves == pytest.approx(math.exp(0.5 / temperature))
    assert stands / halves == pytest.approx(1.105, abs=1e-3)  # the paper's temperature


def test_weights_move_by_what_is_not_kept() -> None:
    steps = [[1.0, 1.0]] * 5 + [[1.0, 0.5]] * 5
    aims, moved = (after(Recap(2, 5, keep=keep), steps) for keep in (0.0, 0.75))
    assert moved == pytest.approx([1 + 0.25 * (a - 1) for a in aims])


def test_zero_and_exploding_losses() -> None:
    recap = Recap(3, 2, keep=0)
    weights = after(recap, [[0.0, 1e-9, 1.0]] * 2 + [[0.0, 1e9, 1.0]] * 2)
    assert all(math.isfinite(w) and w > 0 for w in weights) and weights[0] == pytest.approx(weights[2])
    assert weights[1] / weights[2] == pytest.approx(math.exp(1 / 0.5))


@given(seed=seeds, cut=st.integers(0, 20))
@settings(max_examples=10)
def test_taken_up_from_its_state_it_goes_on_bit_by_bit(seed: int, cut: int) -> None:
    steps = some_losses(seed, 25)
    whole, first, second = (Recap(3, 5) for _ in range(3))
    tensors = first.state()
    after(first, steps[:cut])
    for name, tensor in second.state().items():
        tensor.copy_(tensors[name])  # those asked for at first: they are changed in place
    assert after(second, steps[cut:]) == after(whole, steps)


@pytest.mark.parametrize("values", [[1.0], [1.0, -1.0], [math.nan, 1.0], [1.0, math.inf]])
def test_values_that_cannot_be(values: list[float]) -> None:
    recap = Recap(2)
    with pytest.raises(ValueError):
        recap.step(values)
    assert recap.state()["seen"] == 0


@pytest.mark.parametrize(
    "config", [{"losses": 0}, {"window": 1}, {"temperature": 0.0}, {"temperature": -1.0}, {"keep": 1.0}, {"keep": -0.1}]
)
def test_settings_that_cannot_be(config: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Recap(**({"losses": 2} | config))  # type: ignore[arg-type]
