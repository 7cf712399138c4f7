"""After rounding: codes stay, what is 16-bit anyway gives way.

Scales of the grids and gains of the norms are factors that a quantized checkpoint stores in 16 bits whatever their
value, so they may be chosen freely. Here they are learned, with every code fixed, on the same objective as the
transforms: the whole model's answers, GPTQ's error included (the idea of PEQA, arXiv:2305.14152, with a teacher).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calib.blockwise.backward import BlockSequence
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import Params
from calib.blockwise.walk import RowBatch
from calib.jobs.context import RunContext
from calib.jobs.training_loop import Group
from calib.probe.find import found_parts
from calib.quant.grid import as_stored, decode
from calib.runtime.device import allow_tf32
from compressor.engine.runtime_transforms import runtime_transforms
from compressor.quantization.objective import CalibrationData, LearnedFunction, LearningResult, Objective, minimize
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks


class ScaleFactors:
    """Learned factors of one block: logarithms of what grids' scales and norms' gains are multiplied by.  Signs
    stay."""

    def __init__(
        self,
        block: RoundedBlock,
        linears: Sequence[Linear],
        gains: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`gains`: names of norms' weights, and what is added to a weight where it multiplies."""

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=device, requires_grad=True)

        self._dtype, self._linears, self._offsets = dtype, linears, dict(gains)
        self.scales = {name: zeros(rounded.scale) for name, rounded in block.linears.items()}
        self.gains = {name: zeros(block.rest[name]) for name in gains}

    def params(self, block: RoundedBlock) -> dict[str, Tensor]:
        """Parameters that the block runs with, differentiable in the factors."""
        params = {name: tensor.to(self._dtype) for name, tensor in block.rest.items()}
        for name, log in self.gains.items():
            params[name] = self._scaled(params[name], name, log)
        weights = dict[str, Tensor]()
        for name, log in self.scales.items():
            rounded = block.linears[name]
            scale = rounded.scale.to(self._dtype) * log.exp()
            weights[name] = decode(rounded.codes, scale, rounded.zero.to(self._dtype), rounded.grid)
        return params | put_together(self._linears, weights)

    def _scaled(self, weight: Tensor, name: str, log: Tensor) -> Tensor:
        offset = self._offsets[name]
        return weight * log.exp() if not offset else (weight + offset) * log.exp() - offset

    @torch.no_grad()
    def applied(self, block: RoundedBlock) -> RoundedBlock:
        """The block with the factors worked in, everything as it will be stored."""
        rest, linears = dict(block.rest), dict(block.linears)
        for name, log in self.gains.items():
            rest[name] = self._scaled(rest[name].to(self._dtype), name, log).to(rest[name].dtype)
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
    stream, online, parts = model.stream, model.online, found_parts(model.stream)
    factors = [
        ScaleFactors(block, stream.linears(i), parts.blocks[i].gains, stream.dtype, stream.device)
        for i, block in blocks.reading(range(stream.layers))
    ]
    start, end = (stream.prepared(model.outer, names) for names in (stream.walk.entering, stream.walk.leaving))

    def prepare(i: int, block: RoundedBlock) -> Params:
        return factors[i].params(block)

    def stored(i: int, block: RoundedBlock) -> Params:
        return factors[i].applied(block).params(stream.linears(i), stream.dtype)

    def run(i: int, params: Params, hidden: Tensor, batch: RowBatch) -> Tensor:
        with runtime_transforms(stream, i, online[i]):
            return stream.run(i, params, hidden, batch)

    walk, shipped = (
        BlockSequence(stream.layers, blocks.reading, ready, run, stream.room) for ready in (prepare, stored)
    )
    function = LearnedFunction(
        stream,
        walk,
        lambda batch: stream.start(batch, start),
        lambda hidden: stream.logits(hidden, end),
        stored=shipped,
    )
    groups = [Group([f for block in factors for f in (*block.scales.values(), *block.gains.values())], lr)]
    with allow_tf32(stream.device):
        return factors, minimize(function, data, groups, config, context)
