"""Grids as values: how many levels, where they lie, which values share a scale, and what scales there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from calib.quant.codebooks import e2m1, e4m3

if TYPE_CHECKING:  # grids are known before anything heavy is imported
    import torch
    from torch import Tensor

FOUND_ONCE = ("tensor", "head")  # scales of activations that are numbers found by calibration, and nothing else


@dataclass(frozen=True)
class Grid:
    """bits per value, symmetric or with a zero point, values that share a scale (None: the whole row).

    `table` has the levels of a symmetric grid, 2^bits or fewer, ascending; None: they are the codes. `rows`: how
    many rows, one after another, share their scales. `scales`: what a scale may be, a number of the type it is
    stored in, a power of two (e8m0), FP8 times one number of all linears that read the same input (e4m3), one such
    number itself (tensor), one for each head of keys or values (head), or as a block type of llama.cpp's keeps
    them, by its name (`calib.quant.block_types`).
    """

    bits: int
    symmetric: bool = True
    group: int | None = None
    table: tuple[float, ...] | None = None
    rows: int = 1
    scales: str = "any"

    @property
    def is_block_type(self) -> bool:
        """Whether it is a block type of llama.cpp's."""
        return self.scales not in ("any", "e8m0", "e4m3", *FOUND_ONCE)

    @property
    def is_fixed(self) -> bool:
        """Whether activations are rounded by a number that is found once, by calibration."""
        return self.scales in ("e4m3", *FOUND_ONCE)

    @property
    def is_even(self) -> bool:
        """Whether it is one of evenly spaced levels, with whole zero points, of any bits and groups."""
        return self.table is None and self.scales == "any"

    @property
    def is_float8(self) -> bool:
        """Whether levels are those of FP8 (E4M3)."""
        return self.table == e4m3()

    @property
    def is_float4(self) -> bool:
        """Whether levels are those of FP4 (E2M1)."""
        return self.table == e2m1()

    @property
    def is_float(self) -> bool:
        """Whether levels are of floating point, as they are."""
        return self.is_float8 or self.is_float4

    @property
    def kind(self) -> str:
        """How a scheme's name says it: a number of bits, fp8, fp8-head, nvfp4, mxfp4 or mxfp8; or a block type's."""
        if self.is_block_type:
            return self.scales
        if self.scales == "head":
            return "fp8-head"
        alike = (kind for kind, grid in GROUPED.items() if (grid.table, grid.scales) == (self.table, self.scales))
        return next(alike, "fp8" if self.is_float8 else str(self.bits))

    @property
    def low(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1)) if self.table is None else -(len(self.table) // 2)

    @property
    def high(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1 if self.table is None else self.low + len(self.table) - 1

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return (self.low, self.high) if self.table is None else (self.table[0], self.table[-1])

    @property
    def spacing(self) -> float:
        """The mean distance between neighbouring levels, in units of the scale."""
        return (self.ends[1] - self.ends[0]) / (self.high - self.low)

    def levels(self, codes: Tensor) -> Tensor:
        """Values that codes, held as floats, stand for, in units of the scale and before a zero point is subtracted."""
        if self.table is None:
            return codes
        table = codes.new_tensor(self.table)
        return table.index_select(0, (codes - self.low).long().flatten()).view(codes.shape)

    def nearest_(self, units: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes, held as floats, for values in units of the scale; `units` becomes them."""
        if self.is_float:
            from calib.quant.floating import as_float8, codes_of_float4, codes_of_float8

            numbers = units.nan_to_num_(0)
            return units.copy_(codes_of_float8(as_float8(numbers)) if self.is_float8 else codes_of_float4(numbers))
        if self.table is not None:
            below, bound = _bins(self.table, units.dtype, units.device)
            low, high = self.ends
            place = ((units - low) * (LOOKUP_BINS / (high - low))).nan_to_num_(0)
            place = place.clamp_(0, LOOKUP_BINS - 1).long().flatten()
            above = units > bound.index_select(0, place).view(units.shape)
            return units.copy_(below.index_select(0, place).view(units.shape)).add_(above).add_(self.low)
        if not self.symmetric and zero is not None:  # which is no whole number where levels start anywhere
            units.add_(zero)
        return units.round_().clamp_(self.low, self.high)

    def groups(self, width: int) -> int:
        """Count the scales in a row of `width` values."""
        return 1 if self.group is None else width // self.group

    def split(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n/g, g)."""
        return x.unflatten(-1, (self.groups(x.shape[-1]), -1))


GROUPED = {
    "nvfp4": Grid(4, group=16, table=e2m1(), scales="e4m3"),
    "mxfp4": Grid(4, group=32, table=e2m1(), scales="e8m0"),
    "mxfp8": Grid(8, group=32, table=e4m3(), scales="e8m0"),
}

LOOKUP_BINS = 2048  # so narrow that no two of a table's midpoints share one


@cache
def _bins(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of BINS equal parts between the ends: how many midpoints between levels lie below it, and the next one.

    What is nearest is found by one comparison; a search among the midpoints takes five times as long.
    """
    import torch

    levels = torch.tensor(table, dtype=torch.float64)
    midpoints = (levels[1:] + levels[:-1]) / 2
    below = torch.searchsorted(
        midpoints, torch.linspace(table[0], table[-1], LOOKUP_BINS + 1, dtype=torch.float64)[:-1]
    )
    bound = torch.cat([midpoints, midpoints.new_tensor([torch.inf])])[below]
    return below.to(device, dtype), bound.to(device, dtype)
