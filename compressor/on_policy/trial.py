"""Held-out prompts that teacher and student answer, before the student learns and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from calib import BadInput
from calib.runtime.device import fork_rng
from calib.runtime.progress import stage
from compressor.on_policy.completions import Answering, Completions, RewardedPrompts, write_completions
from compressor.on_policy.measure import measure_policy, measure_teacher
from compressor.on_policy.options import OnPolicyOptions
from compressor.on_policy.sampling import continued, corrected, end_tokens, surprise
from compressor.on_policy.targets import beta_of_mean_reward

DRAWN_GROUPS = 2  # of answers to each held-out prompt, so that pass@k of a whole group is known better than once
TILTING_PROMPTS = 64  # training prompts whose answers by the teacher decide beta
COMPLETION_CURVES = ("reward", "prompts answered alike", "log ratios clamped")  # of a step, that are no losses


class Writer(Answering, Protocol):
    """A student, which may be in training."""

    def answering(self) -> AbstractContextManager[Any]:
        """Within it the student answers and learns nothing.  -> the library's model."""


class PolicyTrial:
    """How well a policy does on held-out prompts."""

    def __init__(
        self, prompts: tuple[RewardedPrompts, RewardedPrompts], options: OnPolicyOptions, loss: str | None,
        teacher: Answering, *, seed: int, at_once: int,
    ) -> None:  # fmt: skip
        """prompts of training and held-out rows; loss: grpo, kdrl, f-dpg or None; `at_once` tokens pass through the
        models together.  Raises BadInput where no beta gives the target the mean reward that is asked for."""
        self._prompts, self._loss, self._teacher = prompts[1], loss, teacher
        self._seed, self._at_once, self._numbers = seed, at_once, list(range(len(prompts[1].about)))
        self._draws = DRAWN_GROUPS * options.group
        self._theirs = self._answers(teacher.model, self._prompts, teacher.head)
        self.beta = options.beta
        if options.target_reward is not None:
            some = replace(
                prompts[0], beginnings=prompts[0].beginnings[:TILTING_PROMPTS], about=prompts[0].about[:TILTING_PROMPTS]
            )
            rewards = self._answers(teacher.model, some, teacher.head).rewards
            self.beta = beta_of_mean_reward(rewards.flatten(), options.target_reward)
        one = options.scale_rewards == "none" and options.kl_mask == "none" and not options.kl_by_difficulty
        tilted = loss == "f-dpg" and options.target == "tilted"
        still = loss == "kdrl" and one and options.beta_end is None
        self._aim = self.beta if tilted or still else None
        self._verified = loss == "f-dpg" and options.target == "verified"

    def _answers(self, model: Any, prompts: RewardedPrompts, head: Any) -> Completions:
        numbers = list(range(len(prompts.about)))
        with fork_rng(head.weight.device, self._seed), stage("answer prompts", len(numbers), "prompts") as done:
            answers = write_completions(model, prompts, numbers, self._draws, head)
            done(units=len(numbers))
        return answers

    def teacher(self) -> dict[str, Any]:
        """The teacher's own figures."""
        return measure_teacher(self._teacher, self._theirs, self._at_once).asdict()

    def student(self, student: Writer) -> dict[str, Any]:
        """A student's figures, as it is now.  Raises BadInput where neither it nor the teacher has written one answer
        that the target has mass on."""
        with student.answering() as model:
            own = self._answers(model, self._prompts, student.head)
            if self._verified and not (own.rewards > 0).any() and not (self._theirs.rewards > 0).any():
                raise BadInput(
                    f"target verified: none of {own.rewards.numel():,} answers of the student and as many of the "
                    "teacher has a reward above 0, so the target gives every one zero mass; train on answers first, or "
                    "mend --reward"
                )
            return measure_policy(student, self._teacher, own, self._theirs, self._aim, self._at_once).asdict()


def write_rows(
    student: Writer, teacher: Answering | None, beginnings: Sequence[Tensor], length: int, options: OnPolicyOptions
) -> tuple[Tensor, Tensor]:
    """Rows (n, length) that a student goes on with, corrected by the teacher where `options` say so, and what was
    written of them."""
    with student.answering() as model:
        device = student.head.weight.device
        write = partial(continued, model, length=length, device=device, vocab=student.head.vocab)
        ids, written = write(beginnings)
        if options.correct is None:
            return ids, written
        assert teacher is not None
        head, hidden = teacher.head, teacher.hidden

        def surprised(ids: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return surprise(head, hidden(ids.to(device)), ids)

        ids, written, _ = corrected(
            ids, written, surprised, write, ends=end_tokens(model), threshold=options.correct,
            times=options.corrections,
        )  # fmt: skip
    return ids, written
