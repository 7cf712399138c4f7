"""Moments of the inputs of a block's linears, gathered while hidden states pass through it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from calib.model.activation_store import ActivationStore
from calib.model.architectures import Architecture
from calib.model.blockwise import BlockwiseModel, Params, micro_batches
from calib.model.hooks import observe_inputs
from calib.runtime.distributed import rank, world_size
from calib.stats.moments import Moments
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms


def sites(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """A linear where each distinct input of a block can be seen -> all linears that share that input."""
    a = architecture
    attention: dict[str, tuple[str, ...]] = {a.q: (a.q, a.k, a.v), a.o: (a.o,)}
    for gate, up, down in zip(a.gates, a.ups, a.downs, strict=True):
        attention |= {gate: (gate, up), down: (down,)}
    return attention


@torch.no_grad()
def input_moments(
    stream: BlockwiseModel,
    index: int,
    params: Params,
    states: ActivationStore,
    mask: Tensor,
    online: RuntimeTransforms,
    *,
    advance: bool = False,
) -> dict[str, Moments]:
    """Moments of the inputs of block `index`'s linears, by site, over the real tokens of states (N, T, d).

    Those of all processes count. Where `advance`, the states become what the block makes of them.
    """
    widths = dict(stream.sizes.inputs(stream.architecture))
    moments = {name: Moments.zero(widths[name], stream.device) for name in sites(stream.architecture)}
    real: Tensor = mask

    def see(name: str, x: Tensor, tokens: Tensor | None) -> None:
        if not real.all():
            x = x[real] if tokens is None else x[real.flatten()[tokens]]
        moments[name] = moments[name].add(x)

    block = stream.blocks[index]
    watch = {name: partial(see, name) for name in moments}
    with runtime_transforms(block, online, stream.architecture), observe_inputs(block, stream.architecture, watch):
        for rows in micro_batches(*states.shape[:2]):
            real = mask[rows].to(stream.device)
            result = stream.run(index, params, states[rows].to(stream.device))
            if advance:
                states[rows] = result
    return {name: m.everywhere() for name, m in moments.items()}


@torch.no_grad()
def advance(
    stream: BlockwiseModel, index: int, params: Params, states: ActivationStore, online: RuntimeTransforms
) -> None:
    """Replace states (N, T, d) by what block `index` makes of them."""
    with runtime_transforms(stream.blocks[index], online, stream.architecture):
        for rows in micro_batches(*states.shape[:2]):
            states[rows] = stream.run(index, params, states[rows].to(stream.device))


def own_linears(architecture: Architecture) -> list[tuple[str, str]]:
    """(linear, its site) of those that this process works on; the others are another's."""
    pairs = [(name, site) for site, sharing in sites(architecture).items() for name in sharing]
    return pairs[rank() :: world_size()]
