"""What is trained beside a student for the sake of a loss, and thrown away in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from compressor.distillation.loss_expression import EXITS_LOSSES, LEARNED_LOSSES, SETS_LOSSES, LossTerm
from compressor.distillation.losses.dac import ClipNet
from compressor.distillation.losses.representation import HiddenProjection


@dataclass(frozen=True)
class AuxiliaryModules:
    """The losses, those that need a net of their own with it; projections from the student's width to the teacher's,
    one for each state that is compared; and maps (d, d) to what the student's head reads, one for each exit."""

    terms: list[LossTerm]
    clips: list[ClipNet]
    bridges: list[HiddenProjection]
    exits: list[Tensor]
    errors: dict[str, float] = field(
        default_factory=dict
    )  # share in the mean marginal error of a step's plans, by loss

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are trained beside the student."""
        return [*(p for module in (*self.clips, *self.bridges) for p in module.parameters()), *self.exits]


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
