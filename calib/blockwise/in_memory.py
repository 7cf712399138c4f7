"""The parts of blocks of a model that is held in memory whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from calib.blockwise.linears import Linear, linears_of
from calib.blockwise.skeleton import sample_of, skeleton
from calib.blockwise.stored_names import Piece
from calib.blockwise.walk import Walk


@dataclass(frozen=True)
class BlockParts:
    """A block of a model in memory: its name, its linears by the names of the library's class, and its attention layers
    that can be edited, named from it."""

    name: str
    linears: tuple[Linear, ...]
    attention: tuple[str, ...]


def block_parts(config: PretrainedConfig) -> list[BlockParts]:
    """The parts of a model of this config that is held in memory.  Raises BadInput."""
    cpu = torch.device("cpu")
    walk = Walk(skeleton(config, cpu), sample_of(config, cpu))
    return [
        BlockParts(
            call.name,
            linears_of(block, call.name, call.products, call.elsewhere, lambda name: [Piece(name)]),
            call.attention,
        )
        for call, block in zip(walk.calls, walk.modules, strict=True)
    ]  # fmt: skip
