"""Attribution by gradients: what each training row adds to each output, without training anything.

To leave rows F out moves the parameters, to first order, by H^-1 sum_{i in F} grad l_i, H the curvature of the whole
loss (arXiv:1703.04730); outputs then change by their gradients along that direction. So the summed attributions of F to
all logits of all points are one directional derivative, and no gradient of an output is ever made alone.

Gradients are projected per layer (`calib.model.per_example_gradients`) and H is their second moment under labels that
the model itself draws (Fisher's information: an estimate of the Gauss-Newton matrix), or under the labels that came,
plus damping. Of large models only layers that follow each other are curved together: memory grows with their number,
not its square. Published TRAK divides its scores by a constant that no one can undo (MadryLab/trak,
`score_computers.py`); these have the scale that theory gives them, and what is left of an error is measured on
deletions that were held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import cross_entropy

from calib import Failed
from calib.model.per_example_gradients import GradientProjection, LinearModule, lifted, project_gradients
from unlearn.model.ensemble import Forward
from unlearn.model.examples import Examples
from unlearn.model.margins import margins
from unlearn.model.model import CHUNK_TOKENS

CURVATURE_BLOCK = 4096  # projected numbers of layers whose curvature is one matrix: 134 MB
Outputs = Callable[[Tensor, Tensor], Tensor]  # logits (d, C), labels (d,) -> something of each target position (d,)


@dataclass(frozen=True)
class Seen:
    """A model as attribution sees it: its parameters and buffers, its linears, and how their gradients are
    projected."""

    forward: Forward
    params: Mapping[str, Tensor]
    linears: Mapping[str, LinearModule]
    projected: Mapping[str, GradientProjection]
    smooth: Forward  # `forward`, as it can be differentiated forwards
    at_once: int = CHUNK_TOKENS  # tokens that pass through the model together

    @property
    def blocks(self) -> list[int]:
        """Sizes of the blocks of layers whose curvature is taken together; a layer is never divided."""
        return [sum(group) for group in curvature_groups([one.size for one in self.projected.values()])]

    def chunks(self, rows: Examples) -> list[slice]:
        """Split rows into chunks that pass through the model together."""
        size = max(1, self.at_once // rows.labels[0].numel())
        return [slice(i, i + size) for i in range(0, len(rows), size)]

    def gradients(self, rows: Examples, seed: int) -> tuple[Tensor, Tensor]:
        """Projected gradients of each row's nats (n, D), and the same under labels drawn with the seed."""

        def run() -> list[Tensor]:
            logits = self.forward(self.params, rows)
            generator = torch.Generator(logits.device).manual_seed(seed)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            return [cross_entropy(logits, labels, reduction="sum") for labels in (rows.targets, drawn)]

        own, drawn = project_gradients(self.linears, self.projected, run, rows.row_index, len(rows))
        return own, drawn

    def of_outputs(self, rows: Examples, outputs: Outputs = margins) -> Tensor:
        """Projected gradients of what `outputs` makes of each row's target positions, summed over them.  -> (n, D)."""

        def run() -> list[Tensor]:
            return [outputs(self.forward(self.params, rows), rows.targets).sum()]

        return project_gradients(self.linears, self.projected, run, rows.row_index, len(rows))[0]

    def along(self, direction: Tensor, rows: Examples) -> Tensor:
        """The derivative of all logits along a direction (D,) of projected parameters.  -> (d, C)."""
        lift = lifted(direction, self.linears, self.projected)
        begun = {n: p for n, p in self.params.items() if n in lift}
        tangents = {n: lift[n].to(p) for n, p in begun.items()}
        parts = []
        for some in self.chunks(rows):
            part = rows[some]
            moved = jvp(lambda p, part=part: self.smooth({**self.params, **p}, part), (begun,), (tangents,))[1]
            parts.append(moved.detach())
        return torch.cat(parts)


@dataclass(frozen=True)
class Attribution:
    """gradients (n, D) of training rows, and `inverse`, of the damped curvature of the sum of their losses: square
    blocks along a diagonal of D."""

    gradients: Tensor
    inverse: tuple[Tensor, ...]

    @staticmethod
    def of(gradients: Tensor, curvature: Sequence[Tensor], damping: float) -> Attribution:
        """curvature: blocks, sums over rows; damping as a share of their mean diagonal.  Raises Failed where one is
        singular all the same."""
        mean = torch.cat([block.diagonal() for block in curvature]).mean()
        factors = (damped_cholesky_(block.to(torch.float64, copy=True), mean, damping) for block in curvature)
        return Attribution(gradients, tuple(torch.cholesky_inverse(factor) for factor in factors))

    def direction(self, deleted: Tensor) -> Tensor:
        """Direction that parameters move in when rows go: bool (n,) -> (D,)."""
        return self._solved(self.gradients[deleted].double().sum(0)[:, None])[:, 0]

    def scores(self, outputs: Tensor) -> Tensor:
        """Influence of each training row on each output, from gradients of outputs (m, D).  -> (n, m)."""
        return -self.gradients.double() @ self._solved(outputs.double().mT)

    def _solved(self, columns: Tensor) -> Tensor:
        parts = columns.split([len(block) for block in self.inverse])
        return torch.cat([block @ part for block, part in zip(self.inverse, parts, strict=True)])


def damped_cholesky_(curvature: Tensor, mean: Tensor, damping: float) -> Tensor:
    """The lower factor of one block (k, k), float64, to whose diagonal `damping` times the mean diagonal of all blocks
    is added in place.  Raises Failed where it is singular all the same."""
    curvature.diagonal().add_((damping * mean.clamp(min=1e-30)).to(curvature.device))
    factor, failed = torch.linalg.cholesky_ex(curvature)
    if failed:
        raise Failed(f"attribution: the curvature is singular at damping {damping:g}; raise --damping")
    return factor


def curvature_groups(sizes: Sequence[int]) -> list[list[int]]:
    """Projected sizes of linears in order, those together that are curved together."""
    groups = list[list[int]]()
    for size in sizes:
        if groups and sum(groups[-1]) + size <= CURVATURE_BLOCK:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def second_moment(gradients: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """(n, D) -> square matrices of the sizes `blocks`, float64: sums over rows, which add up over parts of them."""
    return [g.double().mT @ g.double() for g in gradients.split(list(blocks), 1)]
