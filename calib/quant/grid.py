"""Grids: integer codes, a scale, and a zero point where the grid is not symmetric.

A tensor (..., n) is cut along its last axis into groups of g (all n where g is None); scale and zero are (..., n/g),
never expanded. Codes are signed, -2^(b-1) .. 2^(b-1)-1, in both cases, as the files on disk want them:
x^ = (code - zero) * scale. Zero is always on the grid.

A grid whose levels are not evenly spaced (NF4, FP4, FP8) has a table of them: code c stands for table[c - low] * scale.
Those of NF4 and FP4 go from -1 to 1, so that the scale is the largest magnitude that is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.quant.scheme import Grid
from calib.runtime.device import elements_at_once

# Shrink factors tried by the clip search, as fractions of the full range: 1.00, 0.98, .. 0.40.
RATIOS = tuple(1 - 0.02 * i for i in range(31))
CELL = 0.996  # of a cell that counts as inside it: what float16 holds of an offset rounds to the same code


def fit_weights(x: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero) that cover `ratio` (broadcast to (..., n/g)) of the range of each group of x (..., n).

    Symmetric: the smallest scale that holds both ends, max(min/-2^(b-1), max/(2^(b-1)-1)), as in GPTQ and OSTQuant.
    """
    low, high = _ends(x, grid)
    return _between(low * ratio, high * ratio, grid)


def _ends(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    groups = grid.split(x)
    low, high = groups.amin(-1), groups.amax(-1)  # aminmax has no derivative before torch 2.12
    if grid.rows > 1:
        low, high = _over_rows(low, grid.rows, Tensor.amin), _over_rows(high, grid.rows, Tensor.amax)
    return low.clamp(max=0), high.clamp(min=0)


def _over_rows(ends: Tensor, rows: int, take: Callable[..., Tensor]) -> Tensor:
    """Ends (out, n/g) of every row's groups -> those of so many rows together; of the last ones there may be fewer."""
    return torch.cat([take(some, 0, keepdim=True).expand_as(some) for some in ends.split(rows)])


def _between(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    lowest, highest = grid.ends
    fits = torch.maximum(low / lowest, high / highest) if grid.symmetric else (high - low) / (2**grid.bits - 1)
    scale = _never_zero(fits)
    return scale, zero_point(low, scale, grid)


def fit_activations(x: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero) for values whose range is found anew for each token.

    Symmetric: max|x| / (2^b - 1) * 2, which is what the runtime of compressed-tensors computes, so that a model
    evaluated here answers as it will when it is served.  FP8: max|x| / 448.
    """
    groups = grid.split(x)
    if grid.table is not None:
        return fit_weights(x, grid, ratio)
    if grid.symmetric:
        scale = _never_zero(groups.abs().amax(-1) * ratio * 2 / (2**grid.bits - 1))
        return scale, torch.zeros_like(scale)
    return fit_weights(x, grid, ratio)


def zero_point(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The code of 0.0 where `low` is the smallest value a group must hold: an integer, held as a float."""
    if grid.symmetric:
        return torch.zeros_like(scale)
    return _round(grid.low - low / scale).clamp(grid.low, grid.high)


def encode(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes (..., n), int8."""
    return _codes(x, scale, zero, grid).flatten(-2).to(torch.int8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The values that codes (..., n) stand for, in the dtype of `scale`."""
    return _values(grid.split(codes).to(scale.dtype), scale, zero, grid)


def within_cell(offset: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Offsets from the levels of codes, in units of the scale, cut to where rounding to nearest gives these codes."""
    if grid.table is None:
        return offset.clamp(-CELL / 2, CELL / 2)
    table = offset.new_tensor(grid.table)
    halves = table.diff() * (CELL / 2)
    below, above = torch.cat([table.new_zeros(1), -halves]), torch.cat([halves, table.new_zeros(1)])
    place = (codes.long() - grid.low).flatten()  # which int8 has no room for where there are 253 levels
    low, high = (ends.index_select(0, place).view(offset.shape) for ends in (below, above))
    return offset.clamp(low, high)


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """decode(encode(x)), passing gradients straight through the rounding (d round(u)/du := 1)."""
    return _OnGrid.apply(x, scale, zero, grid)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """(..., n/g, g), as floats."""
    return grid.nearest_(grid.split(x) / scale[..., None], zero[..., None])


def _values(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    levels = grid.levels(codes)
    return ((levels if grid.symmetric else levels - zero[..., None]) * scale[..., None]).flatten(-2)


class _OnGrid(torch.autograd.Function):
    """As one step, so that what autograd keeps is the input alone.

    With u = x / s, c = clamp(round(u) + z), y = (c - z) s: inside the range dy/dx = 1, dy/ds = c - z - u, dy/dz = 0;
    outside dy/dx = 0, dy/ds = c - z, dy/dz = -s.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        return _values(_codes(x, scale, zero, grid), scale, zero, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Grid], output: Tensor) -> None:
        *tensors, ctx.grid = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (x, scale, zero), grid = ctx.saved_tensors, ctx.grid
        gradient = grid.split(gradient)
        u = grid.split(x) / scale[..., None]
        if grid.table is None:
            unclamped = u.round()
            if not grid.symmetric:
                unclamped += zero[..., None]
            inside = (unclamped >= grid.low) & (unclamped <= grid.high)
            levels = unclamped.clamp_(grid.low, grid.high)
            if not grid.symmetric:
                levels -= zero[..., None]
        else:
            inside = (u >= grid.ends[0]) & (u <= grid.ends[1])
            levels = grid.levels(grid.nearest_(u.clone()))
        d_scale = (levels.sub_(u.mul_(inside)).mul_(gradient)).sum(-1)
        d_zero = None if grid.symmetric else -(gradient * ~inside).sum(-1) * scale
        return (gradient * inside).flatten(-2), d_scale, d_zero, None


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def _round(x: Tensor) -> Tensor:
    return _StraightThrough.apply(x)


def _never_zero(scale: Tensor) -> Tensor:
    # A group of zeros has every code 0 under any scale; this one keeps the division finite.
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(torch.bfloat16).eps), scale)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded to the dtype it is kept in, where what underflows becomes the smallest normal number."""
    stored = scale.to(dtype)
    return torch.where(stored == 0, torch.full_like(stored, torch.finfo(dtype).tiny), stored)


@torch.no_grad()
def search_clip(x: Tensor, grid: Grid, ratios: tuple[float, ...] = RATIOS) -> Tensor:
    """The fraction of its range that each group of x (..., n) should cover, for least squares -> (..., n/g)."""
    rows = x.reshape(-1, x.shape[-1])
    room, tried = elements_at_once(x.device), torch.tensor(ratios, dtype=x.dtype, device=x.device)
    parts = rows.split(max(1, room // rows.shape[1]))
    found = torch.cat([_search_clip(part, grid, tried, max(1, room // max(part.numel(), 1))) for part in parts])
    return found.reshape(*x.shape[:-1], -1)


def fit_clipped(x: Tensor, grid: Grid, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale, zero) that fit each group of x (..., n) by least squares; the scale in the dtype that it is `stored` in,
    the zero point as that asks for.  FP8, whose levels are as far apart as they are large, covers all of a group."""
    ratio = torch.ones((), dtype=x.dtype, device=x.device) if grid.is_float else search_clip(x, grid)
    scale = as_stored(fit_weights(x, grid, ratio)[0], stored)
    low = grid.split(x).amin(-1).clamp(max=0) * ratio
    return scale, zero_point(low, scale.to(x.dtype), grid)


def _search_clip(x: Tensor, grid: Grid, ratios: Tensor, together: int) -> Tensor:
    """As `search_clip`, of x (rows, n); `together` ratios are tried at once, all of them on all values."""
    low, high = _ends(x, grid)
    best, choice = torch.full_like(low, torch.inf), torch.ones_like(low)
    groups = grid.split(x)
    for some in ratios.split(together):
        scale, zero = _between(low * some[:, None, None], high * some[:, None, None], grid)
        levels = grid.levels(grid.nearest_(torch.div(groups, scale[..., None]), zero[..., None]))
        if not grid.symmetric:
            levels.sub_(zero[..., None])
        errors = levels.mul_(scale[..., None]).sub_(groups).square_().sum(-1)
        error, which = (errors[0], 0) if len(some) == 1 else errors.min(0)
        better = error < best  # of equal errors the first counts, which leaves most of the range
        best, choice = torch.where(better, error, best), torch.where(better, some[which], choice)
    return choice
