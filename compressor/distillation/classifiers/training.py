"""Train a classifier, in memory, on rows with labels and on what a teacher answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.data.corpus import batch_order
from calib.jobs.journal import CheckpointSlot
from calib.jobs.training_loop import Group, MovingAverage, Parts, naming_rows, optimize, steps_done
from calib.losses.divergences import cross_entropy
from calib.runtime.device import fork_rng
from calib.runtime.distributed import all_reduce_sum_, rank, world_size
from calib.runtime.progress import stage
from compressor.distillation.auxiliary_modules import AuxiliaryModules, auxiliary_modules, errors_of
from compressor.distillation.classifiers.images import ImageClassifier
from compressor.distillation.classifiers.texts import TextClassifier
from compressor.distillation.loss_expression import SETS_LOSSES, of_problem, of_sets, parse_loss
from compressor.distillation.options import Distill
from compressor.distillation.train import optimizer_of

Classifier = TextClassifier | ImageClassifier


@dataclass(frozen=True)
class TaughtRows:
    """Training rows: what a classifier is given of each, labels as `calib.data.targets` has them, the teacher's logits
    (n, C), and the problem type."""

    inputs: Sequence[Any]
    labels: Tensor
    answers: Tensor
    problem: str


def train_classifier(
    student: Classifier, rows: TaughtRows, options: Distill, page: CheckpointSlot
) -> list[dict[str, float]]:
    """Train a student on its teacher's answers.  -> each loss of every step."""
    auxiliary = auxiliary_modules(
        parse_loss(options.loss), layers=0, student_width=0, teacher_width=0, seed=options.seed, device=student.device
    )
    params = [*(p for p in student.model.parameters() if p.requires_grad), *auxiliary.params]
    buffers = _Buffers(student.model)
    rows_of_step = batch_order(len(rows.labels), options.steps, options.batch, options.seed)
    average = MovingAverage([*params, *buffers.floats], options.ema)
    at = 0

    def gradients(step: int) -> Parts:
        nonlocal at
        at = step
        buffers.restore()
        auxiliary.errors.clear()
        parts = _step(student, rows, options, auxiliary, rows_of_step[step][rank() :: world_size()], step)
        return parts | errors_of(auxiliary)

    def after(step: int, parts: Parts) -> None:
        average.update(step)
        buffers.keep()
        done(", ".join(f"{name} {value:.4f}" for name, value in parts.items()))

    with (
        stage("distil", options.steps, "steps", steps_done(page)) as done,
        naming_rows(rows_of_step, lambda: at),
    ):
        curve = optimize(
            [Group(params, options.lr)], gradients, optimizer_of(options), after_step=after,
            keep=average.kept | buffers.kept, page=page,
        )  # fmt: skip
    buffers.restore()
    average.write_back()
    return curve


class _Buffers:
    """Buffers that a checkpoint has, such as a batch norm's running statistics.  A forward pass changes them, so what
    is kept of them is as of the last step that was taken whole."""

    def __init__(self, model: nn.Module) -> None:
        stored = model.state_dict()
        self._own = {f"buffer.{name}": buffer for name, buffer in model.named_buffers() if name in stored}
        self.kept = {name: buffer.clone() for name, buffer in self._own.items()}

    @property
    def floats(self) -> list[Tensor]:
        """Those that can be averaged."""
        return [buffer for buffer in self._own.values() if buffer.is_floating_point()]

    @torch.no_grad()
    def keep(self) -> None:
        """Keep them as they are."""
        for name, buffer in self._own.items():
            self.kept[name].copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Make them as they were kept."""
        for name, buffer in self._own.items():
            buffer.copy_(self.kept[name])


def _step(
    student: Classifier, rows: TaughtRows, options: Distill, auxiliary: AuxiliaryModules, chosen: list[int], step: int
) -> dict[str, float]:
    """Add up this process's gradients of a step's rows.  -> its share of every loss."""
    device, terms = student.device, auxiliary.terms
    own_measure = any(term.name == "uskd" for term in terms)  # the whole batch, of which this process has some rows
    if not chosen:
        if own_measure:
            all_reduce_sum_([torch.zeros((), device=device)])
        return {term.label: 0.0 for term in terms}
    with fork_rng(device, options.seed + 1_000_003 * step + rank()):  # of dropout
        student.model.train()
        q = student.logits([rows.inputs[row] for row in chosen])
    p, target = rows.answers[chosen].to(device), rows.labels[chosen].to(device)
    if own_measure:
        level = (-2 * cross_entropy(target, q.detach())).exp().sum() / options.batch
        all_reduce_sum_([level])
    parts: dict[str, Tensor] = {}
    for term in terms:
        if term.name in SETS_LOSSES:
            values, error = of_sets(term, p[None], q[None], options.temperature)
            value, auxiliary.errors[term.label] = values[0] * len(chosen), float(error) * len(chosen) / options.batch
        else:
            if term.name == "uskd":
                term = replace(term, loss=partial(term.loss, level=level))
            value = of_problem(term, rows.problem, p, q, target, options.temperature).sum()
        parts[term.label] = term.weight * value / options.batch
    torch.stack(list(parts.values())).sum().backward()
    return {name: float(value.detach()) for name, value in parts.items()}
