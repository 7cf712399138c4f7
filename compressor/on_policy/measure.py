"""What a policy is worth on held-out prompts, and how far it is from the distribution that it is trained to become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.on_policy.advantages import pass_at_k
from compressor.on_policy.completions import Answering, Completions, CompletionScores, score_completions
from compressor.on_policy.targets import log_target, mixture_log_partition


@dataclass(frozen=True)
class PolicyFigures:
    """Means over held-out prompts, and over `draws` answers to each at temperature 1.

    reward, with its standard error over prompts; pass_at: the chance that one of k answers is right (reward above 0),
    by k; length in tokens; of whole answers, in nats: the entropy of the policy, KL(policy || teacher) on its own
    answers, KL(teacher || policy) on the teacher's, and KL(policy || target) where the job has one target. What is
    none is None.
    """

    prompts: int
    draws: int
    reward: float
    reward_error: float | None
    pass_at: Mapping[str, float]
    length: float
    entropy: float
    reverse_kl: float | None = None
    forward_kl: float | None = None
    target_kl: float | None = None
    target_kl_error: float | None = None

    def asdict(self) -> dict[str, Any]:
        """The figures by name."""
        return {name: dict(value) if name == "pass_at" else value for name, value in vars(self).items()}


def measure_policy(
    student: Answering, teacher: Answering, own: Completions, theirs: Completions, beta: float | None, at_once: int
) -> PolicyFigures:
    """Figures of a student from its answers to some prompts and the teacher's to the same; `beta` is of the target
    T exp(r / beta), None where there is none."""
    scores = score_completions(student, teacher, own.ids, own.written, at_once)
    heard = score_completions(student, teacher, theirs.ids, theirs.written, at_once)
    kls = _by_prompt(scores.reverse_kl, own)
    figures = rewarded_figures(own, scores.entropy)
    target = error = None
    if beta is not None:
        apart = target_divergence(scores, heard, own, theirs, beta)
        target, error = float(apart.mean()), _error(apart)
    return PolicyFigures(
        **figures, reverse_kl=float(kls.mean()), forward_kl=float(_by_prompt(heard.forward_kl, theirs).mean()),
        target_kl=target, target_kl_error=error,
    )  # fmt: skip


def measure_teacher(teacher: Answering, answers: Completions, at_once: int) -> PolicyFigures:
    """Measure the teacher itself by its answers."""
    scores = score_completions(teacher, teacher, answers.ids, answers.written, at_once)
    return PolicyFigures(**rewarded_figures(answers, scores.entropy), reverse_kl=0.0, forward_kl=0.0)


def rewarded_figures(answers: Completions, entropy: Tensor) -> dict[str, Any]:
    """Reward, pass@1 and pass@k with k half of the draws, length and entropy (n,) of answers, by name."""
    draws, rewards = answers.rewards.shape[1], answers.rewards.double().mean(-1)
    right = (answers.rewards > 0).sum(-1).tolist()
    several = {str(k): sum(pass_at_k(draws, c, k) for c in right) / len(right) for k in sorted({1, max(1, draws // 2)})}
    return {
        "prompts": len(right), "draws": draws, "reward": float(rewards.mean()), "reward_error": _error(rewards),
        "pass_at": several, "length": float(answers.lengths.double().mean()), "entropy": float(entropy.mean()),
    }  # fmt: skip


def target_divergence(
    scores: CompletionScores, heard: CompletionScores, own: Completions, theirs: Completions, beta: float
) -> Tensor:
    """KL(pi || T exp(r / beta) / Z) of each prompt (P,), from answers of the student and as many of the teacher:
    E_pi[log pi - log T - r / beta] + log Z (arXiv:2205.11275, Eq. 4).

    The first two terms are exact given each prefix; log Z is the mean over both models' answers, weighted as draws of
    the even mixture. Its logarithm makes the estimate a little too small where few were drawn.
    """
    rewards = torch.cat([own.rewards, theirs.rewards], -1).double()
    log_pi, log_base = (
        torch.cat([mine.view(own.rewards.shape), other.view(theirs.rewards.shape)], -1)
        for mine, other in ((scores.log_pi, heard.log_pi), (scores.log_base, heard.log_base))
    )
    log_z = mixture_log_partition(log_target(log_base, rewards, beta), log_pi, log_base)
    return _by_prompt(scores.reverse_kl, own) - own.rewards.double().mean(-1) / beta + log_z


def _by_prompt(values: Tensor, answers: Completions) -> Tensor:
    """Means (P,) of what each answer (P G,) has."""
    return values.view(answers.rewards.shape).mean(-1)


def _error(values: Tensor) -> float | None:
    """Standard error of the mean of (n,); None of a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
