"""What is trained beside a student for the sake of a loss, and thrown away in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from calib.data.corpus import Corpus
from compressor.distillation.loss_expression import EXITS_LOSSES, LEARNED_LOSSES, SETS_LOSSES, LossTerm
from compressor.distillation.losses.aligned import AlignedStates
from compressor.distillation.losses.dac import ClipNet
from compressor.distillation.losses.representation import HiddenProjection
from compressor.distillation.models import Student, Teacher, at_targets, given_of, inputs_on

ALIGNED_TOKENS = 4096  # whose states a teacher's mixture is fitted to
LEAST_TOKENS = 16  # of a component


@dataclass(frozen=True)
class AuxiliaryModules:
    """The losses, those that need a net of their own with it; projections from the student's width to the teacher's,
    one for each state that is compared; maps (d, d) to what the student's head reads, one for each exit; and the spaces
    that states are aligned in, one for each that is compared."""

    terms: list[LossTerm]
    clips: list[ClipNet]
    bridges: list[HiddenProjection]
    exits: list[Tensor]
    aligned: list[AlignedStates] = field(default_factory=list)
    errors: dict[str, float] = field(
        default_factory=dict
    )  # share in the mean marginal error of a step's plans, by loss

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are trained beside the student."""
        modules = (*self.clips, *self.bridges, *self.aligned)
        return [*(p for module in modules for p in module.parameters()), *self.exits]


def errors_of(auxiliary: AuxiliaryModules) -> dict[str, float]:
    """Marginal errors of Sinkhorn's plans, named as parts of a loss curve."""
    sets = (term.label for term in auxiliary.terms if term.name in SETS_LOSSES)
    return {f"marginal error of {label}": auxiliary.errors.get(label, 0.0) for label in sets}


def auxiliary_modules(
    terms: Sequence[LossTerm], *, layers: int, student_width: int, teacher_width: int, seed: int, device: torch.device
) -> AuxiliaryModules:
    """Make what losses train beside the student: for `layers` compared states of widths `student_width` and
    `teacher_width`; the student's last state is no exit."""
    names = {term.name for term in terms}
    bound, clips = list[LossTerm](), list[ClipNet]()
    for term in terms:
        if term.name in LEARNED_LOSSES:
            clips.append(ClipNet(torch.Generator().manual_seed(seed)).to(device))
            term = replace(term, loss=partial(term.loss, clips[-1]))
        bound.append(term)
    bridges = [
        HiddenProjection(student_width, teacher_width).to(device) for _ in range(layers if "hidden" in names else 0)
    ]
    # At first as if the blocks that follow were not there.
    exits = [
        torch.eye(student_width, device=device).requires_grad_()
        for _ in range(layers - 1 if names & EXITS_LOSSES.keys() else 0)
    ]
    return AuxiliaryModules(bound, clips, bridges, exits)


def aligned_states(
    student: Student, teacher: Teacher, corpus: Corpus, targets: Tensor, terms: Sequence[LossTerm],
    layers: Sequence[tuple[int, int]], seed: int,
) -> list[AlignedStates]:  # fmt: skip
    """Fit the space of each of a teacher's states that `layers` compare (its number, the student's), on the first rows
    of a corpus at the positions (N, T - 1) that count: every process to the same ones."""
    collected: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    count = 0
    with student.answering():
        for row in range(len(corpus.ids)):
            given = inputs_on(given_of(corpus[row : row + 1]), student.device)
            counted = targets[row : row + 1].to(student.device)
            at = partial(at_targets, counted=counted, ahead=corpus.hidden is None)
            theirs, ours = teacher.states(given, every=True).hidden, student.states(given, every=True).hidden
            for pairs, (theirs_at, ours_at) in zip(collected, layers, strict=True):
                pairs.append((at(theirs[theirs_at]), at(ours[ours_at])))
            count += int(counted.sum())
            if count >= ALIGNED_TOKENS:
                break
    asked = next(int(term.arguments.get("k", 8)) for term in terms if term.name == "align")
    components = min(asked, max(1, count // LEAST_TOKENS))
    both = ((torch.cat(of) for of in zip(*pairs, strict=True)) for pairs in collected)
    return [AlignedStates(t, s, components, seed).to(student.device) for t, s in both]
