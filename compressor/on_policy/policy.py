"""A student as a policy: each step it answers some prompts several times, and learns from how its answers are
rewarded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.on_policy.advantages import annealed, by_difficulty, group_advantages, kl_weights
from compressor.on_policy.completions import Answering, Completions, RewardedPrompts, score_completions
from compressor.on_policy.options import OnPolicyOptions
from compressor.on_policy.targets import LogPartition, log_target, pseudo_rewards


@dataclass(frozen=True)
class Credit:
    """Weights of each answer (n,): of its log-probability, which is what it is worth, and of (log pi / T)^2 / 2 of its
    tokens, which pulls it to the teacher; and figures of the step by name."""

    advantage: Tensor
    pull: Tensor
    figures: dict[str, float] = field(default_factory=dict)


class Policy:
    """How a job rewards what its student writes."""

    def __init__(
        self, loss: str | None, divergence: str | None, options: OnPolicyOptions, prompts: RewardedPrompts, steps: int,
        at_once: int,
    ) -> None:  # fmt: skip
        """loss: grpo, kdrl, f-dpg (with its divergence) or, where rewards are measured alone, none of them."""
        self.prompts, self.group, self._loss, self._divergence = prompts, options.group, loss, divergence
        self._options, self._steps, self._at_once = options, steps, at_once
        self._partition = LogPartition(len(prompts.about)) if loss == "f-dpg" else None

    @property
    def kept(self) -> dict[str, Tensor]:
        """Tensors that change from step to step: what is known of the targets so far."""
        return {} if self._partition is None else self._partition.kept

    def beginnings(self, numbers: list[int]) -> list[Tensor]:
        """Repeat the prompts (s,) of these numbers, for a group of answers to each."""
        return [self.prompts.beginnings[number] for number in numbers for _ in range(self.group)]

    def answers(self, numbers: list[int], ids: Tensor, written: Tensor) -> Completions:
        """Reward rows (P G, T) that begin so, of which `written` is the answer."""
        return Completions(ids, written, numbers, self.prompts.rewards(numbers, ids, written))

    def credit(self, answers: Completions, student: Answering, teacher: Answering | None, step: int) -> Credit:
        """Weigh the answers of a step, under the job's loss."""
        options, rewards = self._options, answers.rewards
        alike = (rewards == rewards[:, :1]).all(-1).float().mean()
        figures = {"reward": float(rewards.mean()), "prompts answered alike": float(alike)}
        advantages, pull = torch.zeros_like(rewards), torch.zeros_like(rewards)
        if self._loss in ("grpo", "kdrl"):
            advantages = group_advantages(rewards, scale=options.scale_rewards == "group")
        if self._loss == "kdrl":
            weights = kl_weights(rewards, options.kl_mask)
            if options.kl_by_difficulty:
                advantages, harder = by_difficulty(rewards, answers.lengths, advantages)
                weights = weights * harder
            pull = annealed(options.beta, options.beta_end, step, self._steps) * weights
        if self._partition is not None:
            assert teacher is not None and self._divergence is not None
            scores = score_completions(student, teacher, answers.ids, answers.written, self._at_once)
            log_pi, log_base = (x.view(rewards.shape) for x in (scores.log_pi, scores.log_base))
            beta = None if options.target == "verified" else options.beta
            log_p = log_target(log_base, rewards.double(), beta)
            log_z = self._partition.update(torch.tensor(answers.numbers), log_p - log_pi)
            advantages, clamped = pseudo_rewards(log_pi, log_p, log_z, self._divergence)
            figures["log ratios clamped"] = float(clamped.double().mean())
        assert math.isfinite(float(advantages.abs().max()))
        return Credit(advantages.flatten().float(), pull.flatten().float(), figures)


def policy_loss(log_pi: Tensor, log_base: Tensor, advantage: Tensor, pull: Tensor) -> Tensor:
    """-A log pi + pull (log T - log pi)^2 / 2 at tokens that the student drew (t,), with the credit of their answers.

    Differentiated in log pi: the policy gradient, and the gradient of KL(pi || T) given each prefix (k2; KDRL,
    arXiv:2506.02208, Eq. 27). log_base (t,) is the teacher's.
    """
    return pull * (log_base - log_pi).square() / 2 - advantage * log_pi
