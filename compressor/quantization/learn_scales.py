"""After rounding: codes stay, what is 16-bit anyway gives way.

Scales of the grids and gains of the norms are factors that a quantized checkpoint stores in 16 bits whatever their
value, so they may be chosen freely. Here they are learned, with every code fixed, on the same objective as the
transforms: the whole model's answers, GPTQ's error included (the idea of PEQA, arXiv:2305.14152, with a teacher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calib.jobs.context import RunContext
from calib.jobs.training_loop import Group
from calib.model.architectures import Architecture
from calib.model.blockwise import Params
from calib.model.blockwise_backward import BlockSequence
from calib.quant.grid import as_stored, decode
from calib.runtime.device import allow_tf32
from compressor.engine.runtime_transforms import runtime_transforms
from compressor.quantization.objective import CalibrationData, LearnedFunction, LearningResult, Objective, minimize
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks, as_kept


class ScaleFactors:
    """Learned factors of one block: logarithms of what grids' scales and norms' gains are multiplied by.  Signs
    stay."""

    def __init__(
        self, block: RoundedBlock, architecture: Architecture, dtype: torch.dtype, device: torch.device
    ) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=device, requires_grad=True)

        self._dtype, self._architecture = dtype, architecture
        self.scales = {name: zeros(rounded.scale) for name, rounded in block.linears.items()}
        self.gains = {f"{norm}.weight": zeros(block.rest[f"{norm}.weight"]) for norm in architecture.norms}

    def params(self, block: RoundedBlock) -> dict[str, Tensor]:
        """Parameters that the block runs with, differentiable in the factors."""
        params = {name: tensor.to(self._dtype) for name, tensor in block.rest.items()}
        for name, log in self.gains.items():
            params[name] = params[name] * log.exp()
        for name, log in self.scales.items():
            rounded = block.linears[name]
            scale = rounded.scale.to(self._dtype) * log.exp()
            params[f"{name}.weight"] = decode(rounded.codes, scale, rounded.zero.to(self._dtype), rounded.grid)
        return params

    @torch.no_grad()
    def applied(self, block: RoundedBlock, stored: Callable[[str], torch.dtype]) -> RoundedBlock:
        """The block with the factors worked in, everything as it will be stored."""
        rest, linears = dict(block.rest), dict(block.linears)
        for name, log in self.gains.items():
            rest[name] = as_kept(rest[name].to(self._dtype) * log.exp(), name, stored(name), self._architecture)
        for name, log in self.scales.items():
            scale = linears[name].scale
            linears[name] = replace(linears[name], scale=as_stored(scale.to(self._dtype) * log.exp(), scale.dtype))
        return RoundedBlock(linears, rest)


def learn_scales(
    model: QuantizedModel,
    data: CalibrationData,
    blocks: RoundedBlocks,
    config: Objective,
    context: RunContext,
    *,
    lr: float,
) -> tuple[list[ScaleFactors], LearningResult]:
    """-> the factors of every block, and how it went: where that says so, none are better.

    `blocks` are the rounded blocks of `model`; lr is in logarithms of factors per step.
    """
    stream, ends, online = model.stream, model.ends, model.online
    factors = [
        ScaleFactors(block, stream.architecture, stream.dtype, stream.device)
        for _, block in blocks.reading(range(stream.sizes.layers))
    ]
    embedding = ends.embedding.to(stream.dtype)
    head = embedding if ends.head is None else ends.head.to(stream.dtype)

    def prepare(i: int, block: RoundedBlock) -> Params:
        return factors[i].params(block)

    def stored(i: int, block: RoundedBlock) -> Params:
        return factors[i].applied(block, lambda name: stream.stored_dtype(i, name)).params(stream.dtype)

    def run(i: int, params: Params, hidden: Tensor) -> Tensor:
        with runtime_transforms(stream.blocks[i], online[i], stream.architecture):
            return stream.run(i, params, hidden)

    walk, shipped = (
        BlockSequence(stream.sizes.layers, blocks.reading, ready, run, stream.room) for ready in (prepare, stored)
    )
    function = LearnedFunction(
        walk,
        lambda ids: stream.embed(embedding, ids),
        lambda hidden: stream.logits(stream.final_norm(hidden, ends.final_gain), head),
        stream.sizes.vocab,
        stored=shipped,
    )
    groups = [Group([f for block in factors for f in (*block.scales.values(), *block.gains.values())], lr)]
    with allow_tf32(stream.device):
        return factors, minimize(function, data, groups, config, context)
