"""Grids: integer codes, a scale, and a zero point where the grid is not symmetric.

A tensor (..., n) is cut along its last axis into groups of g (all n where g is None); scale and zero are (..., n/g),
never expanded. Codes are signed, -2^(b-1) .. 2^(b-1)-1, in both cases, as the files on disk want them:
x^ = (code - zero) * scale. Zero is on every grid but those of block types.

A grid whose levels are not evenly spaced (NF4, FP4, FP8) has a table of them: code c stands for table[c - low] * scale.
Those of bitsandbytes' NF4 and FP4 go from -1 to 1, so that the scale is the largest magnitude that is held.

Scales of some grids are few: powers of two, or FP8 numbers times an `outer` scale of a whole tensor. Those are float32,
and exact in it. Where a grid has one scale for a whole tensor, that is the outer one itself. Those of llama.cpp's block
types, whose zero points are no whole numbers, are found in `kquants`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from calib.quant.floating import (
    E4M3_LEAST,
    E4M3_MOST,
    as_float8,
    codes_of_float8,
    float8_of_codes,
    power_above,
    power_of_two,
)
from calib.quant.grid_types import FOUND_ONCE, Grid
from calib.quant.kquants import fit_blocks
from calib.runtime.device import elements_at_once

# Shrink factors tried by the clip search, as fractions of the full range: 1.00, 0.98, .. 0.40.
RATIOS = tuple(1 - 0.02 * i for i in range(31))
CELL = 0.996  # of a cell that counts as inside it: what float16 holds of an offset rounds to the same code


def fit_weights(x: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero) that cover `ratio` (broadcast to (..., n/g)) of the range of each group of x (..., n).

    Symmetric: the smallest scale that holds both ends, max(min/-2^(b-1), max/(2^(b-1)-1)), as in GPTQ and OSTQuant; of
    scales that are few the nearest, past which gradients pass straight.
    """
    low, high = _ends(x, grid)
    return _between(low * ratio, high * ratio, grid)


def _ends(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    groups = grid.split(x)
    low, high = groups.amin(-1), groups.amax(-1)  # aminmax has no derivative before torch 2.12
    if grid.scales == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    elif grid.rows > 1:
        low, high = _over_rows(low, grid.rows, Tensor.amin), _over_rows(high, grid.rows, Tensor.amax)
    return low.clamp(max=0), high.clamp(min=0)


def _over_rows(ends: Tensor, rows: int, take: Callable[..., Tensor]) -> Tensor:
    """Ends (out, n/g) of every row's groups -> those of so many rows together; of the last ones there may be fewer."""
    return torch.cat([take(some, 0, keepdim=True).expand_as(some) for some in ends.split(rows)])


def _between(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    lowest, highest = grid.ends
    fits = torch.maximum(low / lowest, high / highest) if grid.symmetric else (high - low) / (2**grid.bits - 1)
    scale = _never_zero(fits)
    if grid.scales in NEIGHBOURS:
        with torch.no_grad():
            away = storable(scale, grid, outer_scale([high, low], grid)) - scale
        scale = scale + away
    return scale, zero_point(low, scale, grid)


def fit_activations(
    x: Tensor, grid: Grid, ratio: Tensor | float = 1.0, outer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, zero) for values whose range is found anew for each token.

    Symmetric: max|x| / (2^b - 1) * 2, which is what the runtime of compressed-tensors computes, so that a model
    evaluated here answers as it will when it is served.  FP8: max|x| / 448.  MXFP4 and MXFP8: the power of two of
    `power_of_two`.  NVFP4: max|x| / 6 as an FP8 multiple of `outer`, by default what these values would have; FP8 with
    one scale for all, or for each head: `outer` itself, broadcast.
    """
    groups = grid.split(x)
    if grid.scales in FOUND_ONCE:
        outer = outer_scale([x], grid) if outer is None else outer
        assert outer is not None
        scale = (outer.to(x.device, x.dtype) * ratio).expand(*x.shape[:-1], 1)
        return scale, torch.zeros_like(scale)
    if grid.scales == "e4m3":
        outer = outer_scale([x], grid, E4M3_MOST) if outer is None else outer
        assert outer is not None
        outer = outer.to(x.device, x.dtype)
        held = as_float8(groups.abs().amax(-1) * ratio / grid.ends[1] / outer).to(x.dtype)
        scale = torch.where(held == 0, 0.125, held) * outer  # what readers put in the place of nothing
        return scale, torch.zeros_like(scale)
    if grid.scales == "e8m0":
        scale = power_of_two(groups.detach().abs().amax(-1) * ratio, grid.ends[1])
        return scale, torch.zeros_like(scale)
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
            unclamped = (u if grid.symmetric else u + zero[..., None]).round()
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


def outer_scale(values: Iterable[Tensor], grid: Grid, most: float = 256) -> Tensor | None:
    """The number (1,) that FP8 scales of all groups of some values are multiples of, or that is the scale of them all;
    None where a grid has no such scales. Linears that read the same input share it, as runtimes multiply by them at
    once.

    That of all is max|x| / 448, or 1 where all is zero. What others are multiples of is a power of two, so that
    products with it are exact, and such that the largest group's scale is at most `most`, and more than half of that:
    half again as large a one as 256, which often serves weights better, fits as well (arXiv:2512.02010).
    """
    if not grid.is_fixed:
        return None
    largest = torch.stack([x.detach().abs().amax().float() for x in values]).amax()
    if grid.scales in FOUND_ONCE:
        return torch.where(largest > 0, largest / grid.ends[1], 1.0)[None]
    return torch.where(largest > 0, power_above(largest / (grid.ends[1] * most)), 1.0)[None]


def fixed_scale(absmax: Tensor, grid: Grid, stored: torch.dtype) -> Tensor | None:
    """The number (1,) by which activations of magnitudes up to `absmax` are rounded for good: the scale itself, rounded
    to the dtype it is `stored` in, or what FP8 scales are multiples of; None where a grid has neither."""
    outer = outer_scale([absmax], grid, E4M3_MOST)
    return outer if outer is None or grid.scales == "e4m3" else as_stored(outer, stored)


def storable(scale: Tensor, grid: Grid, outer: Tensor | None = None) -> Tensor:
    """The nearest of the scales that a grid of few may have; of powers of two, the next above, which holds as much."""
    if grid.scales == "e8m0":
        return power_above(scale)
    assert outer is not None
    least = outer.new_tensor(E4M3_LEAST)
    return (as_float8((scale / outer).clamp(min=least)).to(outer.dtype) * outer).to(scale.dtype)


# The storable scales that are tried, counted from the one that holds all of a group.
NEIGHBOURS = {"e4m3": range(-4, 7), "e8m0": range(-1, 2)}


def _neighbours(scale: Tensor, grid: Grid, outer: Tensor | None) -> Iterable[Tensor]:
    """Scales (out, n/g) around the given ones, storable."""
    first = storable(scale, grid, outer)
    if outer is None:
        return (first * 2.0**k for k in (NEIGHBOURS["e8m0"] if grid.is_float4 else range(1)))
    codes = codes_of_float8(as_float8(first / outer))
    return (float8_of_codes((codes + k).clamp(1, 126)).to(outer.dtype) * outer for k in NEIGHBOURS["e4m3"])


def _fit_few(x: Tensor, grid: Grid, outer: Tensor | None, importance: Tensor | None) -> Tensor:
    """The scales (out, n/g), float32, among those near the range of each group of x (out, n), that give the least
    squared error, of columns by their `importance` (n,)."""
    outer = outer_scale([x], grid) if outer is None else outer
    weights = None if importance is None else grid.split(importance.to(x.dtype))
    made = list[Tensor]()
    for part in x.split(max(1, elements_at_once(x.device) // x.shape[1])):
        low, high = _ends(part, grid)
        groups = grid.split(part)
        best = torch.full_like(low, torch.inf)
        choice = torch.ones_like(low)
        for scale in _neighbours(_never_zero(torch.maximum(low / grid.ends[0], high / grid.ends[1])), grid, outer):
            tried = scale.to(part.dtype)
            wrong = grid.levels(grid.nearest_(groups / tried[..., None])).mul_(tried[..., None]).sub_(groups).square_()
            error = (wrong if weights is None else wrong.mul_(weights)).sum(-1)
            choice, best = torch.where(error < best, tried, choice), torch.minimum(error, best)
        made.append(choice)
    return torch.cat(made).float()


@torch.no_grad()
def search_clip(x: Tensor, grid: Grid, ratios: tuple[float, ...] = RATIOS) -> Tensor:
    """The fraction of its range that each group of x (..., n) should cover, for least squares -> (..., n/g)."""
    rows = x.reshape(-1, x.shape[-1])
    room, tried = elements_at_once(x.device), torch.tensor(ratios, dtype=x.dtype, device=x.device)
    parts = rows.split(max(1, room // rows.shape[1]))
    found = torch.cat([_search_clip(part, grid, tried, max(1, room // max(part.numel(), 1))) for part in parts])
    return found.reshape(*x.shape[:-1], -1)


@torch.no_grad()
def fit_clipped(
    x: Tensor, grid: Grid, stored: torch.dtype, outer: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, zero) that fit each group of x (..., n) by least squares; the scale in the dtype that it is `stored` in,
    the zero point as that asks for.  FP8, whose levels are as far apart as they are large, covers all of a group.

    Where scales are few they are float32, multiples of `outer` if given, and columns count by their `importance` (n,).
    """
    if grid.is_block_type:
        return fit_blocks(x, grid, importance)
    if grid.scales == "tensor":
        outer = outer_scale([x], grid) if outer is None else outer
        assert outer is not None
        scale = as_stored(outer, stored).expand(*x.shape[:-1], 1).contiguous()
        return scale, torch.zeros_like(scale, dtype=x.dtype)
    if grid.scales != "any":
        few = _fit_few(x.reshape(-1, x.shape[-1]), grid, outer, importance).reshape(*x.shape[:-1], -1)
        return few, torch.zeros_like(few)
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
