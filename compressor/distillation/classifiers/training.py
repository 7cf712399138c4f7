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
from compressor.distillation.classifiers.features import (
    ExitBranch,
    drawn_branches,
    matching_modules,
    states_of,
    watched_states,
)
from compressor.distillation.classifiers.images import ImageClassifier
from compressor.distillation.classifiers.online import TEACHER_LOSSES, teacher_losses
from compressor.distillation.classifiers.texts import TextClassifier
from compressor.distillation.loss_expression import (
    EXITS_LOSSES,
    SETS_LOSSES,
    STATES_LOSSES,
    LossTerm,
    of_problem,
    of_sets,
    parse_loss,
)
from compressor.distillation.losses.representation import HiddenProjection
from compressor.distillation.options import Distill
from compressor.distillation.train import optimizer_of

Classifier = TextClassifier | ImageClassifier


@dataclass(frozen=True)
class TaughtRows:
    """Training rows: what a classifier is given of each, labels as `calib.data.targets` has them, the teacher's logits
    (n, C), the problem type, and the teacher's states (n, D) at the modules that are compared."""

    inputs: Sequence[Any]
    labels: Tensor
    answers: Tensor
    problem: str
    states: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Exits:
    """Places where a student's states are read: names of modules, branches that answer from them, and maps to the
    widths of the teacher's states, one each."""

    names: Sequence[str] = ()
    branches: Sequence[ExitBranch] = ()
    bridges: Sequence[HiddenProjection] = ()

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are trained beside the student."""
        return [p for module in (*self.branches, *self.bridges) for p in module.parameters()]


def exits_of(student: Classifier, rows: TaughtRows, options: Distill) -> Exits:
    """Make what losses need at the modules that options name."""
    if options.exits is None or not isinstance(student, ImageClassifier):
        return Exits()
    names = matching_modules(student.model, options.exits, "exits")
    widths = [state.shape[1] for state in states_of(student, rows.inputs[:1], names)]
    losses = {term.name for term in parse_loss(options.loss)}
    answering = names if "ofa-exits" in losses else names[-1:] if "uskd" in losses else []
    branches = drawn_branches(
        widths[len(names) - len(answering) :], rows.answers.shape[1], options.seed, student.device
    )
    pairs = zip(widths, rows.states, strict=True) if "hidden" in losses else ()
    return Exits(names, branches, [HiddenProjection(own, t.shape[1]).to(student.device) for own, t in pairs])


def train_classifier(
    student: Classifier, teacher: Classifier, rows: TaughtRows, options: Distill, page: CheckpointSlot
) -> list[dict[str, float]]:
    """Train a student on its teacher's answers, and the teacher where it moves (online BD-KD, arXiv:2212.12965).

    A step is one batch: both models answer it before either moves, each descends on its own losses with AdamW, at its
    own rate, its gradient clipped on its own. The teacher answers in evaluation mode, without dropout and by the
    running statistics of its norms, so that what the student hears is what it says.

    Returns:
        Each loss of every step.
    """
    auxiliary = auxiliary_modules(
        parse_loss(options.loss), layers=0, student_width=0, teacher_width=0, seed=options.seed, device=student.device
    )
    exits = exits_of(student, rows, options)
    params = [*(p for p in student.model.parameters() if p.requires_grad), *auxiliary.params, *exits.params]
    buffers = _Buffers(student.model)
    rows_of_step = batch_order(len(rows.labels), options.steps, options.batch, options.seed)
    average = MovingAverage([*params, *buffers.floats], options.ema)
    groups, at, moving = [Group(params, options.rate)], 0, teacher if options.moved_at else None
    if moving is not None:
        moving.model.eval()
        groups += [Group([p for p in moving.model.parameters() if p.requires_grad], options.moved_at, model=1)]

    def gradients(step: int) -> Parts:
        nonlocal at
        at = step
        buffers.restore()
        auxiliary.errors.clear()
        chosen = rows_of_step[step][rank() :: world_size()]
        parts = _step(_Models(student, moving, exits, auxiliary), rows, options, chosen, step)
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
            groups, gradients, optimizer_of(options), after_step=after,
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


@dataclass(frozen=True)
class _Models:
    """What is trained together: the student, its teacher where that moves, and what losses need beside them."""

    student: Classifier
    teacher: Classifier | None
    exits: Exits
    auxiliary: AuxiliaryModules


def _step(models: _Models, rows: TaughtRows, options: Distill, chosen: list[int], step: int) -> dict[str, float]:
    """Add up this process's gradients of a step's rows.  -> its share of every loss."""
    student, exits, device = models.student, models.exits, models.student.device
    own_measure = any(term.name == "uskd" for term in models.auxiliary.terms)  # of a batch that processes share
    if not chosen:
        if own_measure:
            all_reduce_sum_([torch.zeros((), device=device)])
        return dict.fromkeys(
            (*(t.label for t in models.auxiliary.terms), *(TEACHER_LOSSES if models.teacher else ())), 0.0
        )
    with (
        fork_rng(device, options.seed + 1_000_003 * step + rank()),  # of dropout
        watched_states(student.model, exits.names) as found,
    ):
        student.model.train()
        q = student.logits([rows.inputs[row] for row in chosen])
    p, target = rows.answers[chosen].to(device), rows.labels[chosen].to(device)
    parts = dict[str, Tensor]()
    if models.teacher is not None:
        moved = models.teacher.logits([rows.inputs[row] for row in chosen])
        p = moved.detach()
        for name, values in teacher_losses(moved, q, target, rows.problem, options.temperature).items():
            parts[name] = values.sum() / options.batch
    states = [found[name] for name in exits.names]
    theirs = [state[chosen].to(device) for state in rows.states]
    level = None
    if own_measure:
        level = (-2 * cross_entropy(target, q.detach())).exp().sum() / options.batch
        all_reduce_sum_([level])
    own = dict[str, Tensor]()
    for term in models.auxiliary.terms:
        if term.name in SETS_LOSSES:
            values, error = of_sets(term, p[None], q[None], options.temperature)
            value = values[0] * len(chosen)
            models.auxiliary.errors[term.label] = float(error) * len(chosen) / options.batch
        elif term.name in STATES_LOSSES:
            value = _of_states(term, theirs, states, exits) * len(chosen)
        elif term.name in EXITS_LOSSES:
            answers = [branch(state) for branch, state in zip(exits.branches, states, strict=True)]
            each = [of_problem(term, rows.problem, p, answer, target, options.temperature) for answer in answers]
            value = torch.stack(each).mean(0).sum()
        else:
            if term.name == "uskd":
                weak = exits.branches[-1](states[-1]) if exits.branches else None
                term = replace(term, loss=partial(term.loss, level=level, weak_logits=weak))
            value = of_problem(term, rows.problem, p, q, target, options.temperature).sum()
        own[term.label] = term.weight * value / options.batch
    parts = own | parts
    torch.stack(list(parts.values())).sum().backward()
    return {name: float(value.detach()) for name, value in parts.items()}


def _of_states(term: LossTerm, theirs: Sequence[Tensor], own: Sequence[Tensor], exits: Exits) -> Tensor:
    """The mean over pairs of states, of the teacher and of the student, and over rows."""
    pairs = [*zip(theirs, own, strict=True)]
    if term.name == "hidden":
        pairs = [(t, bridge(s)) for (t, s), bridge in zip(pairs, exits.bridges, strict=True)]
    return torch.stack([term.loss(t, s) for t, s in pairs]).mean()
