"""Advantages, pulls to the teacher and pass@k, against closed forms and enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.on_policy.advantages import annealed, by_difficulty, group_advantages, kl_weights, pass_at_k

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(draws: int, right: int, k: int) -> None:
    right, k = min(right, draws), min(k, draws)
    subsets = list(combinations(range(draws), k))
    assert pass_at_k(draws, right, k) == pytest.approx(sum(min(s) < right for s in subsets) / len(subsets))


def test_pass_at_k_of_more_than_were_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to the number of draws"):
        pass_at_k(4, 1, 5)


@given(st.lists(st.integers(-3, 3), min_size=4, max_size=4), st.floats(0.1, 9), st.floats(-5, 5))
def test_advantages_do_not_see_shift_and_scale_of_rewards(rewards: list[int], factor: float, shift: float) -> None:
    some = torch.tensor([rewards], dtype=torch.float64)
    scaled, plain = group_advantages(some), group_advantages(some, scale=False)
    assert float(plain.sum()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(group_advantages(factor * some + shift), scaled, atol=1e-9)
    assert torch.allclose(group_advantages(factor * some + shift, scale=False), factor * plain)
    if len(set(rewards)) == 1:
        assert not scaled.any(), "a group that is rewarded alike teaches nothing"
    else:
        assert float(scaled.std()) == pytest.approx(1)


def test_masks_by_hand() -> None:
    assert kl_weights(REWARDS, "none").eq(1).all()
    assert torch.equal(kl_weights(REWARDS, "response"), (REWARDS <= 0).float())
    assert kl_weights(REWARDS, "group").sum(-1).tolist() == [0, 4, 0, 0]


def test_without_hard_prompts_difficulty_changes_nothing() -> None:
    """Where every answer is right the job is KDRL, to the bit."""
    rewards, lengths = torch.ones(3, 4), torch.tensor([[3, 9, 1, 5]] * 3)
    advantages = torch.randn(3, 4)
    changed, weights = by_difficulty(rewards, lengths, advantages)
    assert torch.equal(changed, advantages) and torch.equal(weights, torch.ones(3, 4))


def test_difficulty_by_hand() -> None:
    lengths = torch.tensor([[4, 8, 2, 4], [2, 4, 6, 4], [1, 1, 1, 1], [9, 3, 6, 3]])
    changed, weights = by_difficulty(REWARDS, lengths, torch.zeros_like(REWARDS))
    assert weights[0].tolist() == [0.5, 0, 0, 0.5] and not weights[1].any() and weights[3, 3] == 0.25
    assert changed[0].tolist() == [0, -1, 0, 0], "twice as long as the right ones, which are 4"
    assert changed[1].tolist() == [0, 0, -0.5, 0], "of a group without a right one, longer than its mean"
    assert changed[3].tolist() == [-2, 0, -1, 0]


def test_annealing_is_a_line() -> None:
    assert [annealed(0.5, None, step, 3) for step in range(3)] == [0.5] * 3
    assert [annealed(0.5, 0.1, step, 3) for step in range(3)] == pytest.approx([0.5, 0.3, 0.1])
    assert annealed(0.5, 0.1, 0, 1) == 0.5


def test_the_gradient_of_grpo_is_that_of_the_mean_reward() -> None:
    """Unscaled advantages: (1 - 1/G) times the policy gradient, as the group's mean holds the answer itself."""
    g, group = torch.Generator().manual_seed(0), 4
    logits = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(6, generator=g, dtype=torch.float64)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    drawn = torch.multinomial(logits.detach().softmax(0), 400_000, replacement=True, generator=g).view(-1, group)
    value = group_advantages(reward[drawn], scale=False) * logits.log_softmax(0)[drawn]
    expected = gradient((logits.softmax(0) * reward).sum()) * (1 - 1 / group)
    assert torch.allclose(gradient(value.mean()), expected, atol=5e-3)
