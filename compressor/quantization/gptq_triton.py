"""The columns of one block of GPTQ in one kernel (Triton): each program takes some rows of the weight through them all.

A program holds its part of the columns, 128 of them at most, in registers; what has no kernel of its own runs as on a
CPU. `compressor.quantization.gptq.gptq_columns` is the plain form, by which this one is checked.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from calib.quant.grid_types import Grid

ROWS = 32  # of the weight, in a program
FAR = tl.constexpr(1048576.0)  # units beyond which every code is clamped
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it and taken off again is rounded, halves to even


@triton.jit  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    columns, errors, codes, within, scale, zero, levels, midpoints, count, out, low, high,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    place = tl.arange(0, COLUMNS)
    at = place[:, None] * out + row[None, :]
    tile = tl.load(columns + at, mask=(place[:, None] < count) & inside[None, :], other=0.0)
    for i in range(count):
        value = tl.sum(tl.where(place[:, None] == i, tile, 0.0), axis=0)
        s = tl.load(scale + i * out + row, mask=inside, other=1.0)
        z = tl.load(zero + i * out + row, mask=inside, other=0.0)
        unit = tl.div_rn(value, s)
        if LEVELS == 0:
            unit = tl.minimum(tl.maximum(unit, -FAR), FAR)
            code = tl.minimum(tl.maximum((unit + z + ROUND) - ROUND, low), high)
            level = code
        else:
            index = tl.zeros([ROWS], dtype=tl.int32)
            for j in range(LEVELS - 1):
                index += (unit > tl.load(midpoints + j)).to(tl.int32)
            code = index.to(tl.float32) + low
            level = tl.load(levels + index)
        error = tl.div_rn(value - (level - z) * s, tl.load(within + i * count + i))
        tl.store(codes + i * out + row, code.to(tl.int8), mask=inside)
        tl.store(errors + i * out + row, error, mask=inside)
        later = tl.load(within + i * count + place, mask=(place < count) & (place > i), other=0.0)
        tile -= later[:, None] * error[None, :]


def columns_in_one(
    columns: Tensor, errors: Tensor, codes: Tensor, within: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> None:  # fmt: skip
    """Round columns in one kernel launch, as `compressor.quantization.gptq.gptq_columns` does, in float32; every tensor
    contiguous."""
    (count, out), table = columns.shape, list(grid.table or ())
    levels = torch.tensor(table or [0.0], dtype=torch.float64)
    midpoints = torch.tensor([(a + b) / 2 for a, b in pairwise(table)] or [0.0], dtype=torch.float64)
    _columns[(triton.cdiv(out, ROWS),)](
        columns, errors, codes, within, scale, zero, levels.to(columns), midpoints.to(columns), count, out,
        float(grid.low), float(grid.high), LEVELS=len(table), ROWS=ROWS, COLUMNS=triton.next_power_of_2(count),
    )  # fmt: skip
