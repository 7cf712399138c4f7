"""From transformed weights to integer codes: the grid by clip search, then nearest rounding or GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.anatomy import Anatomy
from calib.stats import Moments
from calib.stream import Stream, micro_batches
from calib.tap import watching
from compressor.gptq import NotPositive, gptq
from compressor.grid import Grid, as_stored, decode, encode, fit_weights, search_clip, zero_point
from compressor.online import Online, running

ROUNDINGS = ("gptq", "rtn")
MICRO_BATCH = 8  # rows that pass through a block together


class RoundingFailed(RuntimeError):
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


@dataclass(frozen=True)
class RoundedBlock:
    """A block as it will be stored: linears on their grids, and all else (norm gains, biases) in its own dtype."""

    linears: dict[str, Rounded]
    rest: dict[str, Tensor]

    def params(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the block runs with."""
        return {f"{name}.weight": rounded.weight().to(dtype) for name, rounded in self.linears.items()} | {
            name: tensor.to(dtype) for name, tensor in self.rest.items()
        }


def sites(anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """A linear where each distinct input of a block can be seen -> all linears that share that input."""
    a = anatomy
    return {a.q: (a.q, a.k, a.v), a.o: (a.o,), a.gate: (a.gate, a.up), a.down: (a.down,)}


@torch.no_grad()
def input_moments(
    stream: Stream,
    index: int,
    params: Mapping[str, Tensor],
    hidden: Tensor,
    mask: Tensor,
    online: Online,
    keep: Tensor | None = None,
) -> dict[str, Moments]:
    """Moments of the inputs of block `index`'s linears, by site, over the real tokens of hidden (N, T, d).

    What the block makes of `hidden` goes into `keep`, which may be `hidden` itself.
    """
    moments: dict[str, Moments] = {}
    real: Tensor = mask

    def see(name: str, x: Tensor) -> None:
        moments[name] = moments.get(name, Moments.zero(x.shape[-1], x.device)).add(x[real])

    block = stream.blocks[index]
    watch = {name: (lambda x, name=name: see(name, x)) for name in sites(stream.anatomy)}
    with running(block, online, stream.anatomy), watching(block, watch):
        for rows in micro_batches(len(hidden), MICRO_BATCH):
            real = mask[rows].to(stream.device)
            result = stream.run(index, params, hidden[rows].to(stream.device))
            if keep is not None:
                keep[rows] = result.to(keep.device)
    return moments


@torch.no_grad()
def advance(stream: Stream, index: int, params: Mapping[str, Tensor], hidden: Tensor, online: Online) -> None:
    """Replace hidden (N, T, d) by what block `index` makes of it, in place."""
    block = stream.blocks[index]
    with running(block, online, stream.anatomy):
        for rows in micro_batches(len(hidden), MICRO_BATCH):
            hidden[rows] = stream.run(index, params, hidden[rows].to(stream.device)).to(hidden.device)


def round_linear(
    weight: Tensor, inputs: Moments, grid: Grid, rounding: str, damp: float, stored: torch.dtype
) -> tuple[Rounded, float]:
    """Round weight (out, in).  -> the result, and its relative output error |(W - W^) X|^2 / |W X|^2 on `inputs`.

    Scales are rounded to `stored`, the dtype they have on disk, before any code is chosen. Raises NotPositive.
    """
    gram = inputs.gram / max(inputs.count, 1)
    ratio = search_clip(weight, grid)
    scale, _ = fit_weights(weight, grid, ratio)
    scale = as_stored(scale, stored)
    usable = scale.to(weight.dtype)
    low = grid.split(weight).amin(-1).clamp(max=0) * ratio
    zero = zero_point(low, usable, grid)
    if rounding == "gptq":
        codes, _ = gptq(weight, gram, usable, zero, grid, damp)
    else:
        codes = encode(weight, usable, zero, grid)
    rounded = Rounded(codes, scale, zero, grid)
    error = (rounded.weight() - weight).double()
    energy = ((weight.double() @ gram) * weight.double()).sum()
    return rounded, float(((error @ gram) * error).sum() / energy.clamp(min=torch.finfo(torch.float64).tiny))


def round_block(
    params: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    anatomy: Anatomy,
    grid: Grid,
    *,
    rounding: str,
    damp: float,
    stored: torch.dtype,
    where: str,
) -> tuple[dict[str, Rounded], dict[str, float]]:
    """All linears of a block: results and relative output errors, by name.

    `moments` are those of the block's inputs, by site; `where` names the block in errors.
    """
    rounded, errors = {}, {}
    for site, sharing in sites(anatomy).items():
        for name in sharing:
            try:
                rounded[name], errors[name] = round_linear(
                    params[f"{name}.weight"], moments[site], grid, rounding, damp, stored
                )
            except NotPositive as error:
                raise RoundingFailed(f"{where}.{name}: {error}; try --damp {max(damp * 10, 0.01):g}") from error
    return rounded, errors
