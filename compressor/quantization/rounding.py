"""From transformed weights to integer codes: the grid by clip search, then nearest rounding or GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from calib import Failed
from calib.blockwise.block_store import BlockStore
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel
from calib.jobs.journal import Journal
from calib.quant.grid import decode, encode, fit_clipped, outer_scale, within_cell
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.runtime.device import is_accelerator
from calib.runtime.distributed import barrier, rank, world_size
from calib.runtime.memory import trim_heap
from calib.stats.moments import Moments
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.gptq import columns_of
from compressor.quantization.options import ROUNDINGS
from compressor.storage.quantized_linear import Rounded

# Weights (out, in) of linears that share their inputs, by name; moments of these inputs; grids by name; the dtype of
# scales on disk; what scales are multiples of; whether offsets are kept; how much columns count, by name; and options
# of the method's own -> codes, scales and zero points by name.
RoundingFunction = Callable[..., dict[str, Rounded]]


def rounding_function(method: str) -> RoundingFunction:
    """Look up a rounding method."""
    module = import_module(f"compressor.quantization.{ROUNDINGS[method].module}")
    return cast(RoundingFunction, module.ENTRIES[method])


@dataclass(frozen=True)
class Rounder:
    """A rounding method: "gptq" with a ridge of `damping` times the mean diagonal of X^T X, "rtn" (round to nearest) or
    "none"; `offsets`: whether to keep how far what was rounded lay from its level, which learned rounding starts at;
    `float_target`: whether linears follow each other within a block, and aim at what the float model gives;
    `importance`: how much columns (in,) count as scales are searched for, by name on disk, in place of X^T X."""

    method: str
    damping: float
    offsets: bool = False
    float_target: bool = False
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, float]:
        """Options that the method reads."""
        return {name: getattr(self, name) for name in ROUNDINGS[self.method].options}


class RoundingFailed(Failed):
    """A layer's statistics do not allow GPTQ; says which layer, and what damping to try."""


@dataclass(frozen=True)
class RoundedBlock:
    """A block as it will be stored: linears on their grids (or not, where weights are only transformed), and all else,
    such as norm gains and biases, in the dtypes it is stored in."""

    linears: dict[str, Rounded]  # by their names on disk
    rest: dict[str, Tensor]  # by the names of the library's block
    unrounded: dict[str, Tensor] = field(default_factory=dict)  # linears that are not on a grid, by their names on disk
    keys: dict[str, Tensor] = field(default_factory=dict)  # attention layers' scales (2,) of keys and of values

    def of(self, part: RoundedBlock) -> RoundedBlock:
        """Copy those linears and other tensors of this whole block that `part`, one process's, has."""
        linears, rest = {n: self.linears[n] for n in part.linears}, {n: self.rest[n] for n in part.rest}
        return RoundedBlock(linears, rest, keys=dict(part.keys))

    def served(self, online: RuntimeTransforms) -> RuntimeTransforms:
        """Copy what runs beside the block, with the scales that calibration found for inputs of its linears, and for
        keys and values."""
        found = {name: one.inputs for name, one in self.linears.items() if one.inputs is not None}
        return replace(online, inputs=found, keys=self.keys) if found or self.keys else online

    def without_offsets(self) -> RoundedBlock:
        """A copy that nothing is to be learned of any more."""
        return replace(self, linears={name: replace(one, offset=None) for name, one in self.linears.items()})

    def params(self, linears: Sequence[Linear], dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters that the block, which has these `linears`, runs with."""
        weights = {name: rounded.weight().to(dtype) for name, rounded in self.linears.items()}
        weights |= {name: weight.to(dtype) for name, weight in self.unrounded.items()}
        return put_together(linears, weights) | {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.rest.items()
        }


class RoundedBlocks:
    """The rounded blocks of a job, in its journal: a page for each block and process, of the linears it rounded."""

    def __init__(self, journal: Journal, scheme: Scheme, stream: BlockwiseModel) -> None:
        self._journal, self._scheme, self._stream = journal, scheme, stream
        self._resident = BlockStore(stream.room)

    def __contains__(self, index: int) -> bool:
        return all(self._page(index, r) in self._journal for r in range(world_size()))

    def _page(self, index: int, process: int) -> str:
        return f"block-{index}-{process}"

    def write(self, index: int, part: RoundedBlock, notes: Mapping[str, Any]) -> None:
        """Store the linears of a block that this process rounded."""
        self._journal.write_own(self._page(index, rank()), self._tensors(part), notes)

    def gathered(self, index: int, part: RoundedBlock) -> RoundedBlock:
        """The whole of a block of which each process has its part, for all of them."""
        if world_size() == 1:
            return part
        pages = [f"part-{index}-{process}" for process in range(world_size())]
        self._journal.write_own(pages[rank()], self._tensors(part), {})
        barrier()
        whole = self._block(index, {n: t for page in pages for n, t in self._journal.read(page)[0].items()})
        barrier()
        self._journal.remove(pages[rank()])
        return whole

    @staticmethod
    def _tensors(part: RoundedBlock) -> dict[str, Tensor]:
        tensors = {f"rest.{name}": tensor for name, tensor in part.rest.items()}
        tensors |= {f"unrounded.{name}": tensor for name, tensor in part.unrounded.items()}
        tensors |= {f"keys.{name}": tensor for name, tensor in part.keys.items()}
        for name, r in part.linears.items():
            tensors |= {f"codes.{name}": r.codes, f"scale.{name}": r.scale, f"zero.{name}": r.zero}
            more = {"offset": r.offset, "outer": r.outer, "inputs": r.inputs}
            for kind, tensor in more.items():
                if tensor is not None:  # which several linears may share
                    tensors[f"{kind}.{name}"] = tensor.clone() if kind != "offset" else tensor
        return tensors

    def read(self, index: int) -> RoundedBlock:
        """Read a whole rounded block."""
        return self._block(index, self._resident.block(index, self._read_pages, self._bytes))

    def reading(self, indices: Iterable[int]) -> Iterator[tuple[int, RoundedBlock]]:
        """Read rounded blocks one after another, ahead of their use where there is room."""
        ahead = is_accelerator(self._stream.device)
        for i, tensors in self._resident.reading(indices, self._read_pages, self._bytes, ahead=ahead):
            yield i, self._block(i, tensors)
            del tensors
            trim_heap()

    def _block(self, index: int, tensors: Mapping[str, Tensor]) -> RoundedBlock:
        placed = {name: t.to(self._stream.device, non_blocking=True) for name, t in tensors.items()}
        linears: dict[str, Rounded] = {}
        for name in (n.removeprefix("codes.") for n in placed if n.startswith("codes.")):
            codes, scale, zero = (placed[f"{kind}.{name}"] for kind in ("codes", "scale", "zero"))
            more = (placed.get(f"{kind}.{name}") for kind in ("offset", "outer", "inputs"))
            linears[name] = Rounded(codes, scale, zero, self._scheme.grid(name), *more)
        rest, unrounded, keys = (
            {n.removeprefix(kind): t for n, t in placed.items() if n.startswith(kind)}
            for kind in ("rest.", "unrounded.", "keys.")
        )
        return RoundedBlock(linears, rest, unrounded, keys)

    def _read_pages(self, index: int) -> dict[str, Tensor]:
        """Of all processes."""
        pages = [self._journal.read(self._page(index, process))[0] for process in range(world_size())]
        return {name: tensor for tensors in pages for name, tensor in tensors.items()}

    def _bytes(self) -> int:
        """About what all blocks take: a byte for each code, and scales and all else a quarter of that."""
        stream = self._stream
        return stream.layers * stream.block_bytes // stream.dtype.itemsize * 5 // 4

    def notes(self, index: int) -> dict[str, dict[str, Any]]:
        """Notes of a block by linear, from all processes."""
        notes: dict[str, dict[str, Any]] = {}
        for process in range(world_size()):
            notes |= self._journal.notes(self._page(index, process))
        return notes


def round_linears(
    weights: Mapping[str, Tensor], inputs: Moments, grids: Mapping[str, Grid], rounder: Rounder, stored: torch.dtype,
    outer: Tensor | None = None,
) -> dict[str, tuple[Rounded, float]]:  # fmt: skip
    """Round linears that share their inputs: weights (out, in) and grids by name; `outer`: what their scales are
    multiples of, where grids have such, and others are rounded elsewhere that share it.

    -> for each the result, and its relative output error |(W - W^) X|^2 / |W X|^2 on `inputs`. Scales are rounded to
    `stored`, the dtype they have on disk, before any code is chosen. Linears of one grid are worked on together.
    Raises NotPositive.
    """
    if weights and outer is None:
        outer = outer_scale(weights.values(), next(iter(grids.values())))
    options = {"offsets": rounder.offsets, "importance": rounder.importance, **rounder.options}
    method = rounding_function(rounder.method)
    made = method(weights, inputs, grids, stored, outer=outer, **options) if weights else {}
    return {
        name: (made[name], output_error(weight, made[name].weight().to(weight.dtype), inputs))
        for name, weight in weights.items()
    }


def nearest_linear(
    weight: Tensor, grid: Grid, stored: torch.dtype, *, outer: Tensor | None = None, offsets: bool = False,
    importance: Tensor | None = None,
) -> Rounded:  # fmt: skip
    """Round weight (out, in) to nearest; `outer` is of all linears that read the same input, or of this one alone;
    `importance` (in,) says how much columns count as scales are searched for."""
    outer = outer_scale([weight], grid) if outer is None else outer
    scale, zero = fit_clipped(weight, grid, stored, outer, importance)
    unit = scale.to(weight.dtype)
    rounded = Rounded(encode(weight, unit, zero, grid), scale, zero, grid, outer=outer)
    if not offsets:
        return rounded
    apart = grid.split(weight - decode(rounded.codes, unit, zero, grid)).div_(unit[..., None]).flatten(-2)
    return replace(rounded, offset=within_cell(apart, rounded.codes, grid).to(torch.float16))


def _round_nearest(
    weights: Mapping[str, Tensor], inputs: Moments, grids: Mapping[str, Grid], stored: torch.dtype, *,
    outer: Tensor | None, offsets: bool, importance: Mapping[str, Tensor],
) -> dict[str, Rounded]:  # fmt: skip
    return {
        name: nearest_linear(
            w, grids[name], stored, outer=outer, offsets=offsets, importance=columns_of(importance, name)
        )
        for name, w in weights.items()
    }


ENTRIES: dict[str, RoundingFunction] = {"rtn": _round_nearest}


def output_error(weight: Tensor, instead: Tensor, inputs: Moments) -> float:
    """|(W - W^) X|^2 / |W X|^2 of weight W (out, in) and of W^ in its place."""
    gram = inputs.gram.to(weight.dtype)

    def energy(w: Tensor) -> float:
        """|w X|^2."""
        return float(((w @ gram) * w).sum(dtype=torch.float64))

    return energy(instead - weight) / max(energy(weight), torch.finfo().tiny)
