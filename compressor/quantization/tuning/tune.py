"""Tuning, after rounding: codes, scales and norm gains are learned together.

The objective is that of the transforms: the whole model's answers, the rounding method's error included. Codes move by
rounding variables, or stay, where only factors are learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.blockwise.backward import BlockSequence
from calib.blockwise.model import Params
from calib.blockwise.walk import RowBatch
from calib.jobs.context import RunContext
from calib.jobs.training_loop import Group, OptimizerConfig
from calib.probe.find import found_parts
from calib.runtime.device import allow_tf32
from compressor.engine.runtime_transforms import runtime_transforms
from compressor.quantization.objective import CalibrationData, LearnedFunction, LearningResult, Objective, minimize
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks
from compressor.quantization.tuning.learned_rounding import LearnedRounding
from compressor.quantization.tuning.scale_factors import ScaleFactors, Variables


@dataclass(frozen=True, kw_only=True)
class TuningRates:
    """Learning rates: of factors, in logarithms per step; of rounding, in distances between levels per step, None where
    codes stay."""

    factors: float
    rounding: float | None


@dataclass(frozen=True)
class TunedBlocks:
    """The rounded blocks of a job, and what tuning found for each."""

    blocks: RoundedBlocks
    factors: list[ScaleFactors]
    rounding: LearnedRounding | None

    def variables(self, index: int, block: RoundedBlock) -> Variables:
        """Rounding variables of a block; none where codes stay."""
        if self.rounding is None:
            return {}
        return self.rounding.variables(index, block)

    @torch.no_grad()
    def applied(self, index: int, block: RoundedBlock) -> RoundedBlock:
        """A block with everything worked in, as it will be stored."""
        return self.factors[index].applied(block, self.variables(index, block))

    def read(self, index: int) -> RoundedBlock:
        """Read a block as it will be stored."""
        return self.applied(index, self.blocks.read(index))

    def codes_changed(self) -> float:
        """The share of all codes that are others than they were rounded to."""
        changed = count = 0
        for i, block in self.blocks.reading(range(len(self.factors))):
            for name, linear in self.applied(i, block).linears.items():
                changed += int((linear.codes != block.linears[name].codes).sum())
                count += linear.codes.numel()
        return changed / count

    @property
    def parameters(self) -> int:
        """Count the factors that were learned."""
        kinds = [kind for one in self.factors for kind in (one.scales, one.gains)]
        return sum(factor.numel() for kind in kinds for factor in kind.values())


def tune(
    model: QuantizedModel,
    data: CalibrationData,
    blocks: RoundedBlocks,
    config: Objective,
    context: RunContext,
    rates: TuningRates,
) -> tuple[TunedBlocks, LearningResult]:
    """-> the tuned blocks, and how it went: where that says so, the rounded ones are better.

    `blocks` are the rounded blocks of `model`, with offsets where rounding is to be learned.
    """
    stream, online, parts = model.stream, model.online, found_parts(model.stream)
    moves, rounding = rates.rounding is not None, None
    if moves:
        rounding = LearnedRounding(model, blocks, context)
        context = context.without(rounding.bytes_in_ram).keeping({"offsets": rounding.offsets})
    factors = [
        ScaleFactors(block, stream.linears(i), parts.blocks[i].gains, stream.dtype, stream.device)
        for i, block in blocks.reading(range(stream.layers))
    ]
    tuned = TunedBlocks(blocks, factors, rounding)
    start, end = (stream.prepared(model.outer, names) for names in (stream.walk.entering, stream.walk.leaving))

    def prepare(i: int, block: RoundedBlock) -> Params:
        return factors[i].params(block, tuned.variables(i, block))

    def stored(i: int, block: RoundedBlock) -> Params:
        return tuned.applied(i, block).params(stream.linears(i), stream.dtype)

    def run(i: int, params: Params, hidden: Tensor, batch: RowBatch) -> Tensor:
        with runtime_transforms(stream, i, online[i]):
            return stream.run(i, params, hidden, batch)

    def finish(i: int) -> None:
        if rounding is not None:
            rounding.finish(i)

    def after_step(step: int) -> None:
        if rounding is not None and rates.rounding is not None:
            rounding.step(rates.rounding * OptimizerConfig(steps=config.steps).rate(step))

    walk, shipped = (
        BlockSequence(stream.layers, blocks.reading, ready, run, stream.room, finish) for ready in (prepare, stored)
    )
    function = LearnedFunction(
        stream,
        walk,
        lambda batch: stream.start(batch, start),
        lambda hidden: stream.logits(hidden, end),
        stored=shipped,
    )
    groups = [Group([f for block in factors for f in (*block.scales.values(), *block.gains.values())], rates.factors)]
    with allow_tf32(stream.device):
        result = minimize(function, data, groups, config, context, after_step=after_step)
    return tuned, replace(result, codes_changed=tuned.codes_changed()) if moves else result
