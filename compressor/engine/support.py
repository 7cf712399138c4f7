"""What can be done with a model: how it runs, which of its weights are quantized, which transforms it admits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calib.blockwise.model import BlockwiseModel
from calib.model.checkpoint import find_model
from calib.model.config import read_config
from calib.model.task import ALL_TASKS
from calib.model.weights import Weights


@dataclass(frozen=True)
class Support:
    """Facts about a model, found from its config and the names and shapes of its tensors.

    Args:
        model_type: as config.json has it.
        blocks: how many there are.
        kinds: how many of them differ in more than their weights.
        width: numbers in a token's hidden state.
        tied: whether embedding and head are one table.
        quantized: linears that are quantized.
        quantized_share: of all weights of blocks that are matrices, the share that is quantized.
        kept: what of the blocks stays in 16 bits and is a matrix: its name from the block, and its share of them all.
        keys_and_values: whether they can be rounded.
        gradients: whether transforms and scales can be learned, and rows attributed.
        left_out: transform, and why the model does not admit it.
    """

    model_type: str
    blocks: int
    kinds: int
    width: int
    tied: bool
    quantized: int
    quantized_share: float
    kept: dict[str, float]
    keys_and_values: bool
    gradients: bool
    left_out: dict[str, str]

    def asdict(self) -> dict[str, Any]:
        """The facts as JSON has them."""
        return asdict(self)


def support_of(model: str | Path, left_out: Callable[[BlockwiseModel], dict[str, str]]) -> Support:
    """Find out what can be done with a model, without reading its weights.

    Args:
        model: a directory, or a name on the hub.
        left_out: says which transforms a model does not admit, and why.

    Raises:
        BadInput: the model cannot be used at all; the message says why.
    """
    folder = find_model(model)
    stream = BlockwiseModel(read_config(folder, ALL_TASKS), Weights(folder), torch.device("cpu"))
    total, linears, kept = 0, 0, dict[str, int]()
    for i in range(stream.layers):
        linear = {one.parameter for one in stream.linears(i)}
        linears += len(stream.linears(i))
        for name, p in stream.blocks[i].named_parameters():
            if p.dim() >= 2:
                total += p.numel()
                if name not in linear:
                    kept[name] = kept.get(name, 0) + p.numel()
    return Support(
        stream.config.model_type, stream.layers, len({_kind(block) for block in stream.blocks}), stream.hidden,
        stream.is_tied, linears, 1 - sum(kept.values()) / max(1, total),
        {name: count / total for name, count in sorted(kept.items(), key=lambda item: -item[1])},
        bool(math.prod(len(stream.attention(i)) for i in range(stream.layers))),
        stream.walk.static, left_out(stream),
    )  # fmt: skip


def _kind(block: torch.nn.Module) -> Any:
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())
