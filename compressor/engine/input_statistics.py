"""Moments of the inputs of a block's linears, and ranges of its keys and values, gathered while hidden states pass
through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calib.blockwise.attention_hooks import Edit, editing_attention
from calib.blockwise.hooks import See, observe_inputs
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.runtime.distributed import all_reduce_max_, rank, world_size
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
    start: dict[str, Moments] | None = None,
) -> dict[str, Moments]:
    """Moments of the inputs of block `index`'s linears, by site, over the real tokens of states (N, T, d).

    Those of all processes count. Where `advance`, the states become what the block makes of them. `mask` tells which
    tokens are real, of a decoder's where there are two. `start`: what this found of other states, which is taken out
    and added to.
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
            known = None if start is None else start.pop(linear.name)  # of all processes, which are added up again
            moments[linear.name] = known if known and rank() == 0 else Moments.zero(linear.shape[1], stream.device)
            watch[linear] = partial(see, linear)
    with runtime_transforms(stream, index, online), observe_inputs(block, watch):
        for rows, batch in states.batches:
            now = rows
            result = stream.run(index, params, states[rows].to(stream.device), batch)
            if advance:
                states[rows] = result
    return {name: m.everywhere() for name, m in moments.items()}


@torch.no_grad()
def key_value_ranges(
    stream: BlockwiseModel, index: int, params: Params, states: RowStates, mask: Tensor, online: RuntimeTransforms,
    heads: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """The largest magnitudes (2, heads) of keys, after the rotary embedding, and of values, over the real tokens of
    states (N, T, d) and those of all processes, by attention layer of block `index`; none of them is rounded meanwhile.
    `heads`: as many as keys have, or 1 for all of them together."""
    ranges = {name: torch.zeros(2, heads, device=stream.device) for name in stream.attention(index)}
    real, block, now = states.real(mask, sources=stream.reads_sources(index)), stream.blocks[index], slice(0)

    def seeing(found: Tensor) -> Edit:
        def see(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            most = [x.abs().amax(3).unflatten(1, (heads, -1)).amax(2).mT for x in (key, value)]  # (B, T, heads)
            torch.maximum(found, torch.stack(most)[:, real[now].to(found.device)].amax(1).float(), out=found)
            return query, key, value

        return see

    with ExitStack() as stack:
        stack.enter_context(runtime_transforms(stream, index, replace(online, kv=None)))
        for name, found in ranges.items():
            stack.enter_context(editing_attention(block.get_submodule(name), seeing(found)))
        for rows, batch in states.batches:
            now = rows
            stream.run(index, params, states[rows].to(stream.device), batch)
    for found in ranges.values():
        all_reduce_max_(found)
    return ranges


@torch.no_grad()
def advance(stream: BlockwiseModel, index: int, params: Params, states: RowStates, online: RuntimeTransforms) -> None:
    """Replace states (N, T, d) by what block `index` makes of them."""
    with runtime_transforms(stream, index, online):
        for rows, batch in states.batches:
            states[rows] = stream.run(index, params, states[rows].to(stream.device), batch)


def own_linears(linears: Sequence[Linear]) -> list[Linear]:
    """Linears that this process works on; the others are another process's."""
    return list(linears[rank() :: world_size()])
