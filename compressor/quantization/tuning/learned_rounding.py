"""Learned rounding: a variable per weight decides which code it gets.

V says where a weight lies on its grid, in units of the scale; its code is that of the nearest level. It starts at the
value that the rounding method had before it rounded, inside the code's cell, so that no code is another at first. The
gradient goes straight through the rounding, and V takes a step of one length along its sign (as in SignRound,
arXiv:2309.05516, whose V starts at zero beside the weight), which needs no moments.

Kept are 2 bytes a weight, how far V lies from the first code's level, and one for the sign of the gradient: on the
device or in RAM where there is room for those of all blocks, else on disk. V itself exists for one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calib.blockwise.activation_store import ActivationStore
from calib.jobs.context import RunContext
from calib.quant.grid import CELL
from calib.quant.grid_types import Grid
from calib.runtime.distributed import all_reduce_sum_
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks
from compressor.storage.quantized_linear import Rounded


class LearnedRounding:
    """The rounding variables of all blocks of a model."""

    def __init__(self, model: QuantizedModel, blocks: RoundedBlocks, context: RunContext) -> None:
        """`blocks` have the offsets that variables start from."""
        stream, self._dtype, self._spacing = model.stream, model.stream.dtype, model.scheme.weights.spacing
        self._linears = [stream.linears(i) for i in range(stream.layers)]
        most = max(sum(torch.Size(one.shape).numel() for one in linears) for linears in self._linears)
        self.offsets = context.store((stream.layers, most), torch.float16, stream.room)
        self._signs = context.without(self.offsets.bytes_in_ram).store((stream.layers, most), torch.int8, stream.room)
        self._learned = dict[int, dict[str, Tensor]]()  # variables whose gradients are on their way
        for i, block in blocks.reading(range(stream.layers)):
            row = self._row(self.offsets, i)
            for name, place, _ in self._places(i):
                offset = block.linears[name].offset
                assert offset is not None, "this rounding kept no offsets"
                row[place] = offset.flatten()
            self.offsets[slice(i, i + 1)] = row[None]

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of what is kept in memory, not in a file."""
        return self.offsets.bytes_in_ram + self._signs.bytes_in_ram

    def variables(self, index: int, block: RoundedBlock) -> dict[str, Tensor]:
        """V (out, in) of every linear of a block, in units of its scale and counted from its zero point.  With
        gradients on they wait for theirs, which `finish` takes."""
        row, made = self._row(self.offsets, index), dict[str, Tensor]()
        for name, place, shape in self._places(index):
            rounded = block.linears[name]
            grid, first = rounded.grid, levels_of(rounded, self._dtype)
            low, high = ends_of(grid, rounded.zero.to(self._dtype))
            v = (first + grid.split(row[place].view(shape).to(first))).clamp(low, high)
            row[place] = (v - first).flatten().to(row)  # what has left the grid waits at its edge
            made[name] = v.flatten(-2)
        if torch.is_grad_enabled():
            self.offsets[slice(index, index + 1)] = row[None]
            self._learned[index] = {name: v.requires_grad_() for name, v in made.items()}
        return made

    @torch.no_grad()
    def finish(self, index: int) -> None:
        """Note which way the gradients of a block's variables point, summed over processes."""
        learned, row = self._learned.pop(index, {}), self._row(self._signs, index)
        for name, place, shape in self._places(index):
            found = learned[name].grad if name in learned else None
            gradient = torch.zeros(shape, dtype=self._dtype, device=row.device) if found is None else found
            all_reduce_sum_([gradient])
            row[place] = gradient.flatten().sign().to(row)
        self._signs[slice(index, index + 1)] = row[None]

    @torch.no_grad()
    def step(self, length: float) -> None:
        """Move all variables by `length`, in parts of the mean distance between levels, down their gradients."""
        for i in range(len(self._linears)):
            row, signs = self._row(self.offsets, i), self._row(self._signs, i)
            self.offsets[slice(i, i + 1)] = row.add_(signs, alpha=-length * self._spacing)[None]

    def _places(self, index: int) -> Iterator[tuple[str, slice, tuple[int, int]]]:
        """Names of a block's linears, where they lie in its row, and their shapes."""
        start = 0
        for one in self._linears[index]:
            out, width = one.shape
            yield one.name, slice(start, start + out * width), one.shape
            start += out * width

    @staticmethod
    def _row(store: ActivationStore, index: int) -> Tensor:
        return store[slice(index, index + 1)][0]


def levels_of(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """Levels (out, in/g, g) that codes stand for, in units of the scale and counted from the zero point."""
    levels = rounded.grid.split(rounded.grid.levels(rounded.codes.to(dtype)))
    return levels if rounded.grid.symmetric else levels - rounded.zero.to(dtype)[..., None]


def ends_of(grid: Grid, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest V that count as on the grid, each (out, in/g, 1): halfway past the levels at its ends,
    or, where levels are a table, these."""
    beyond = 0.0 if grid.table else CELL / 2
    low, high = (end + side * beyond - zero[..., None] for end, side in zip(grid.ends, (-1, 1), strict=True))
    return low, high
