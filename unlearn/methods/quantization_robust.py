"""Forgetting that lasts in fewer bits (arXiv:2410.16454; straight-through training, arXiv:1308.3432).

Unlearning moves weights by less than half a step of a coarse grid, so that rounding undoes it. Two ways out, both maps
from the weights that are trained to those that the model runs with, with gradients straight through: the model that is
moved is the rounded one, or each weight either stays where it was or moves by no less than a part of a step. What the
map gives is what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from calib.quant.grid import fit_clipped, on_grid
from calib.quant.grid_types import Grid
from unlearn.model.ensemble import StackedParams

Through = Callable[[StackedParams], StackedParams]


def unchanged(params: StackedParams) -> StackedParams:
    """Run models with the weights that are trained."""
    return params


def rounded(before: Mapping[str, Tensor], names: Iterable[str], grid: Grid) -> Through:
    """Weights `names` (M, out, in) on the grids that fit them as they are before."""
    grids = {name: _fitted(before[name], grid) for name in names}

    def through(params: StackedParams) -> StackedParams:
        return {**params, **{name: on_grid(params[name], *grids[name], grid) for name in grids}}

    return through


def stepwise(before: Mapping[str, Tensor], names: Iterable[str], grid: Grid, least: float) -> Through:
    """Weights `names` (M, out, in) as they were before, or at least `least` halves of a step of their grid away.

    A change of less than half of that is none; what lies between is the least. From 2 on, each weight that changes
    within its grid gets another code there.
    """
    floors = dict[str, Tensor]()
    for name in names:
        scale, _ = _fitted(before[name], grid)
        whole = scale[..., None].expand(*scale.shape, before[name].shape[-1] // scale.shape[-1]).flatten(-2)
        floors[name] = whole * (least / 2)
    start = {name: before[name].detach().clone() for name in floors}

    def through(params: StackedParams) -> StackedParams:
        moved = dict(params)
        for name, floor in floors.items():
            change = params[name].detach() - start[name]
            far = change.sign() * torch.maximum(change.abs(), floor)
            rounded = start[name] + torch.where(change.abs() < floor / 2, 0.0, far)
            # A sum that carries the gradient is not exactly what is wanted; where none is asked for, that is given.
            graph = params[name] - params[name].detach() if torch.is_grad_enabled() else 0.0
            moved[name] = rounded + graph
        return moved

    return through


@torch.no_grad()
def _fitted(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(scale, zero), as `parewell quantize` begins too."""
    return fit_clipped(weight, grid, weight.dtype)


def mean(ways: Sequence[StackedParams]) -> StackedParams:
    """A soup: the mean of weights that began alike and went different ways (arXiv:2203.05482); whole numbers, which
    only buffers are, stay as they were."""
    first = ways[0]
    return {
        name: torch.stack([way[name] for way in ways]).mean(0) if p.is_floating_point() else p
        for name, p in first.items()
    }
