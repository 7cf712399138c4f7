"""Moments of the inputs of a block's linears, gathered while hidden states pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from calib.blockwise.hooks import See, observe_inputs
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.runtime.distributed import rank, world_size
from calib.stats.moments import Moments
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms


@torch.no_grad()
def input_moments(
    stream: BlockwiseModel,
    index: int,
    params: Params,
    states: RowStates,
    mask: Tensor,
    online: RuntimeTransforms,
    *,
    advance: bool = False,
) -> dict[str, Moments]:
    """Moments of the inputs of block `index`'s linears, by site, over the real tokens of states (N, T, d).

    Those of all processes count. Where `advance`, the states become what the block makes of them. `mask` tells which
    tokens are real, of a decoder's where there are two.
    """
    linears, moments = stream.linears(index), dict[str, Moments]()
    now = slice(0)

    def see(linear: Linear, x: Tensor, tokens: Tensor | None) -> None:
        name, real = linear.name, states.real(mask, sources=stream.reads_sources(index, linear))[now].to(x.device)
        if not real.all():
            x = x[real] if tokens is None else x[real.flatten()[tokens]]
        moments[name] = moments[name].add(x)

    block, watch = stream.blocks[index], dict[Linear, See]()
    for linear in linears:
        if linear.name == linear.site:
            moments[linear.name] = Moments.zero(linear.shape[1], stream.device)
            watch[linear] = partial(see, linear)
    with runtime_transforms(stream, index, online), observe_inputs(block, watch):
        for rows, batch in states.batches:
            now = rows
            result = stream.run(index, params, states[rows].to(stream.device), batch)
            if advance:
                states[rows] = result
    return {name: m.everywhere() for name, m in moments.items()}


@torch.no_grad()
def advance(stream: BlockwiseModel, index: int, params: Params, states: RowStates, online: RuntimeTransforms) -> None:
    """Replace states (N, T, d) by what block `index` makes of them."""
    with runtime_transforms(stream, index, online):
        for rows, batch in states.batches:
            states[rows] = stream.run(index, params, states[rows].to(stream.device), batch)


def own_linears(linears: Sequence[Linear]) -> list[Linear]:
    """Linears that this process works on; the others are another process's."""
    return list(linears[rank() :: world_size()])
