"""What each answer of a group is worth: advantages over its group (GRPO), and how hard it is pulled to the teacher
(KDRL, arXiv:2506.02208)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_SPREAD = 1e-6  # of rewards in a group, below which they are all alike
LEAST_SHARE = 0.1  # of beta that is left of a right answer to the hardest prompt
LENGTH_PENALTY = 1.0  # advantage that a wrong answer loses for each time the right ones' length that it is longer


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """Advantages of answers over their group: (P, G) -> (P, G), r - mean, over the standard deviation where `scale`.

    GRPO's (arXiv:2402.03300), as KDRL takes them (arXiv:2506.02208, Eq. 8); zero in groups whose rewards are alike.
    Without the deviation the optimum of E r - beta KL(pi || T) is T exp(r / beta) / Z; with it beta is in effect beta
    times the deviation, so that easy and hard prompts have different targets.
    """
    apart = rewards - rewards.mean(-1, keepdim=True)
    if not scale:
        return apart
    spread = rewards.std(-1, keepdim=True)
    return torch.where(spread > LEAST_SPREAD, apart / spread.clamp(min=LEAST_SPREAD), 0.0)


def kl_weights(rewards: Tensor, mask: str) -> Tensor:
    """Weights (P, G) of the pull to the teacher, of answers with rewards (P, G); those above 0 are right.

    `mask` "response": 1 where the answer is wrong; "group": 1 where no answer of the group is right; "none": 1
    (KDRL, arXiv:2506.02208, Section 3.4).
    """
    right = rewards > 0
    if mask == "response":
        return (~right).to(rewards.dtype)
    if mask == "group":
        return (~right.any(-1, keepdim=True)).expand_as(right).to(rewards.dtype)
    return torch.ones_like(rewards)


def by_difficulty(rewards: Tensor, lengths: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and weights of the pull to the teacher (P, G) that go by how hard a prompt is.

    The direction is APO's (arXiv:2506.21655): right answers to hard prompts are pulled less, long wrong ones are
    punished. The formulas are this toolbox's own. With the difficulty d, the share of wrong answers in a group: a right
    answer has weight max(1 - d, 0.1), a wrong one 0; and a wrong one loses max(0, length / mean length of the right
    ones - 1) of its advantage (of all answers, where none is right). lengths (P, G) in tokens.
    """
    right = rewards > 0
    count = right.sum(-1, keepdim=True)
    share = count / rewards.shape[-1]
    weights = torch.where(right, share.clamp(min=LEAST_SHARE), 0.0).to(rewards.dtype)
    lengths = lengths.to(rewards.dtype)
    mean = torch.where(count > 0, (lengths * right).sum(-1, keepdim=True) / count.clamp(min=1), lengths.mean(-1, True))
    longer = (lengths / mean.clamp(min=1.0) - 1).clamp(min=0)
    return torch.where(right, advantages, advantages - LENGTH_PENALTY * longer), weights


def annealed(beta: float, end: float | None, step: int, steps: int) -> float:
    """Beta at a step, on a line from `beta` at the first to `end` at the last (KDRL, Section 3.3)."""
    return beta if end is None else beta + (end - beta) * step / max(1, steps - 1)


def pass_at_k(draws: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, unbiased, of `draws` answers of which `right` are
    (arXiv:2107.03374, Eq. 1).  Raises ValueError where k is more than were drawn."""
    if not 1 <= k <= draws:
        raise ValueError(f"k is {k}; it must be from 1 to the number of draws, {draws}")
    return 1 - math.comb(draws - right, k) / math.comb(draws, k)
