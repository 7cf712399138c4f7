"""From transformed weights to integer codes: the grid by clip search, then nearest rounding or GPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calib import Failed
from calib.anatomy import Anatomy
from calib.grid import decode, encode, fit_clipped
from calib.journal import Journal
from calib.memory import release
from calib.parallel import processes, rank
from calib.scheme import Grid, Scheme
from calib.states import States
from calib.stats import Moments
from calib.stream import Params, Stream, micro_batches
from calib.tap import watching
from compressor.gptq import gptq
from compressor.online import Online, running


class RoundingFailed(Failed):
    """A layer's statistics do not allow GPTQ; says which layer, and what damping to try."""


@dataclass(frozen=True)
class Rounded:
    """A linear's weight on its grid: codes (out, in) int8; scale (out, in/g) in its stored dtype; zero (out, in/g)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return decode(self.codes, self.scale.float(), self.zero, self.grid)


def stacked(parts: Sequence[Rounded]) -> Rounded:
    """One linear of the rows of several that share their input."""
    codes, scale, zero = (torch.cat([getattr(p, kind) for p in parts]) for kind in ("codes", "scale", "zero"))
    return Rounded(codes, scale, zero, parts[0].grid)


@dataclass(frozen=True)
class RoundedBlock:
    """A block as it will be stored: linears on their grids, and all else (norm gains, biases; linears too where weights
    are only transformed) as `kept` has it."""

    linears: dict[str, Rounded]
    rest: dict[str, Tensor]

    def params(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the block runs with."""
        return {f"{name}.weight": rounded.weight().to(dtype) for name, rounded in self.linears.items()} | {
            name: tensor.to(dtype) for name, tensor in self.rest.items()
        }


class RoundedBlocks:
    """The rounded blocks of a job, in its journal: a page for each block and process, of the linears it rounded."""

    def __init__(self, journal: Journal, scheme: Scheme, stream: Stream) -> None:
        self._journal, self._scheme, self._stream = journal, scheme, stream

    def __contains__(self, index: int) -> bool:
        return all(self._page(index, r) in self._journal for r in range(processes()))

    def _page(self, index: int, process: int) -> str:
        return f"block-{index}-{process}"

    def write(self, index: int, part: RoundedBlock, notes: Mapping[str, Any]) -> None:
        tensors = {f"rest.{name}": tensor for name, tensor in part.rest.items()}
        for name, r in part.linears.items():
            tensors |= {f"codes.{name}": r.codes, f"scale.{name}": r.scale, f"zero.{name}": r.zero}
        self._journal.write_own(self._page(index, rank()), tensors, notes)

    def read(self, index: int) -> RoundedBlock:
        linears: dict[str, Rounded] = {}
        rest: dict[str, Tensor] = {}
        for process in range(processes()):
            tensors, _ = self._journal.read(self._page(index, process))
            placed = {name: t.to(self._stream.device) for name, t in tensors.items()}
            rest |= {n.removeprefix("rest."): t for n, t in placed.items() if n.startswith("rest.")}
            for name in (n.removeprefix("codes.") for n in placed if n.startswith("codes.")):
                codes, scale, zero = (placed[f"{kind}.{name}"] for kind in ("codes", "scale", "zero"))
                linears[name] = Rounded(codes, scale, zero, self._scheme.grid(self._stream.stored_linear(index, name)))
        return RoundedBlock(linears, rest)

    def reading(self, indices: Iterable[int]) -> Iterator[tuple[int, RoundedBlock]]:
        for i in indices:
            yield i, self.read(i)
            release()

    def notes(self, index: int) -> dict[str, dict[str, Any]]:
        """By linear, from all processes."""
        notes: dict[str, dict[str, Any]] = {}
        for process in range(processes()):
            notes |= self._journal.notes(self._page(index, process))
        return notes


def kept(value: Tensor, name: str, stored: torch.dtype, anatomy: Anatomy) -> Tensor:
    """A parameter that is not quantized, rounded to what its stored dtype can hold: gains less their offset."""
    if anatomy.gain_offset and name.removesuffix(".weight") in anatomy.norms:
        return (value - anatomy.gain_offset).to(stored).to(value.dtype) + anatomy.gain_offset
    return value.to(stored)


def sites(anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """A linear where each distinct input of a block can be seen -> all linears that share that input."""
    a = anatomy
    attention: dict[str, tuple[str, ...]] = {a.q: (a.q, a.k, a.v), a.o: (a.o,)}
    for gate, up, down in zip(a.gates, a.ups, a.downs, strict=True):
        attention |= {gate: (gate, up), down: (down,)}
    return attention


@torch.no_grad()
def input_moments(
    stream: Stream, index: int, params: Params, states: States, mask: Tensor, online: Online, *, advance: bool = False
) -> dict[str, Moments]:
    """Moments of the inputs of block `index`'s linears, by site, over the real tokens of states (N, T, d).

    Those of all processes count. Where `advance`, the states become what the block makes of them.
    """
    widths = dict(stream.sizes.inputs(stream.anatomy))
    moments = {name: Moments.zero(widths[name], stream.device) for name in sites(stream.anatomy)}
    real: Tensor = mask

    def see(name: str, x: Tensor, tokens: Tensor | None) -> None:
        if not real.all():
            x = x[real] if tokens is None else x[real.flatten()[tokens]]
        moments[name] = moments[name].add(x)

    block = stream.blocks[index]
    watch = {name: partial(see, name) for name in moments}
    with running(block, online, stream.anatomy), watching(block, stream.anatomy, watch):
        for rows in micro_batches(*states.shape[:2]):
            real = mask[rows].to(stream.device)
            result = stream.run(index, params, states[rows].to(stream.device))
            if advance:
                states[rows] = result
    return {name: m.everywhere() for name, m in moments.items()}


@torch.no_grad()
def advance(stream: Stream, index: int, params: Params, states: States, online: Online) -> None:
    """Replace states (N, T, d) by what block `index` makes of them."""
    with running(stream.blocks[index], online, stream.anatomy):
        for rows in micro_batches(*states.shape[:2]):
            states[rows] = stream.run(index, params, states[rows].to(stream.device))


def round_linear(
    weight: Tensor, inputs: Moments, grid: Grid, rounding: str, damp: float, stored: torch.dtype
) -> tuple[Rounded, float]:
    """Round weight (out, in).  -> the result, and its relative output error |(W - W^) X|^2 / |W X|^2 on `inputs`.

    Scales are rounded to `stored`, the dtype they have on disk, before any code is chosen. Raises NotPositive.
    """
    if rounding == "gptq":
        scale, zero = fit_clipped(weight, grid, stored)
        codes, _ = gptq(weight, inputs.gram, scale.to(weight.dtype), zero, grid, damp)
        rounded = Rounded(codes, scale, zero, grid)
    else:
        rounded = nearest(weight, grid, stored)
    return rounded, output_error(weight, rounded.weight().to(weight.dtype), inputs)


def nearest(weight: Tensor, grid: Grid, stored: torch.dtype) -> Rounded:
    """Round weight (out, in) to nearest: what `round_linear` does where no inputs are asked."""
    scale, zero = fit_clipped(weight, grid, stored)
    return Rounded(encode(weight, scale.to(weight.dtype), zero, grid), scale, zero, grid)


def output_error(weight: Tensor, instead: Tensor, inputs: Moments) -> float:
    """|(W - W^) X|^2 / |W X|^2 of weight W (out, in) and of W^ in its place."""
    gram = inputs.gram.to(weight.dtype)

    def energy(w: Tensor) -> float:
        """|w X|^2."""
        return float(((w @ gram) * w).sum(dtype=torch.float64))

    return energy(instead - weight) / max(energy(weight), torch.finfo().tiny)


def own_linears(anatomy: Anatomy) -> list[tuple[str, str]]:
    """(linear, its site) of those that this process works on; the others are another's."""
    pairs = [(name, site) for site, sharing in sites(anatomy).items() for name in sharing]
    return pairs[rank() :: processes()]
