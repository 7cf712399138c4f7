"""Tuning of one block on its own outputs, right after it is rounded: codes, scales and norm gains.

The block gets the hidden states that the rounded blocks before it give, and is to answer as the float block does on
the float model's (as SignRound has it, arXiv:2309.05516). A token says as many numbers as the state is wide, where the
whole model's answers say one loss: few tokens will do, one block is held at a time, and this goes before what is
learned of the whole model. Codes move by rounding variables that begin at the rounding method's own values, and take
Adam's steps (arXiv:1412.6980, Algorithm 1) without its first moment: of one length at first, shorter where gradients
have become small. The more inputs a linear has, the shorter are they, as what they do to its outputs adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib import Diverged
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.row_states import RowStates
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus
from calib.jobs.training_loop import OptimizerConfig
from calib.probe.find import found_parts
from calib.quant.grid import within_cell
from calib.runtime.device import allow_tf32
from calib.runtime.distributed import all_reduce_sum_, local_indices, world_size
from calib.runtime.progress import stage
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms
from compressor.quantization.objective import kept_back
from compressor.quantization.rounding import RoundedBlock
from compressor.quantization.tuning.learned_rounding import ends_of, levels_of
from compressor.quantization.tuning.scale_factors import ScaleFactors
from compressor.storage.quantized_linear import Rounded

_DECAY = 0.95  # of the mean square of gradients
_LEAST = torch.finfo(torch.float32).tiny ** 0.5  # what has a square, and an inverse that can be multiplied
_Batches = Sequence[tuple[slice, RowBatch]]  # rows by those that pass through a block together


@dataclass(frozen=True, kw_only=True)
class BlockTuning:
    """How each block is tuned: how long, at which rates (of factors, in logarithms; of rounding, in distances between
    levels, divided by the root of a linear's inputs, 0 where codes stay), and the seed of the order of rows."""

    steps: int
    batch: int  # rows a step
    factors: float
    rounding: float
    seed: int


@dataclass(frozen=True)
class BlockStates:
    """Hidden states that a block is tuned on: those (N, T, d) that it gets and those that it is to give, which of
    their tokens are real (N, T), the rows learned from, by step, and those that tell which block is better."""

    inputs: RowStates
    targets: RowStates
    mask: Tensor
    learned: Sequence[_Batches]
    judged: _Batches


def tuned_states(
    stream: BlockwiseModel, corpus: Corpus, inputs: RowStates, targets: RowStates, config: BlockTuning
) -> BlockStates:
    """The states that blocks are tuned on, of this process's rows of `corpus` (N, T): the last are kept back to judge
    blocks by, or all of them judge where there are too few for that.

    `inputs` and `targets` change as blocks go by.
    """
    indices, rows = local_indices(len(corpus.ids)), len(corpus.ids)
    own, first = corpus[indices], sum(i < rows - kept_back(rows) for i in indices)

    def batches(start: int, stop: int) -> _Batches:
        found = stream.batches(own[start:stop].inputs) if start < stop else []
        return [(slice(some.start + start, some.stop + start), batch) for some, batch in found]

    share = -(-config.batch // world_size())  # each process takes its share of a step's rows
    learned = [batches(start, min(start + share, first)) for start in range(0, first, share)]
    return BlockStates(inputs, targets, own.mask, learned, batches(first if kept_back(rows) else 0, len(indices)))


def tune_block(
    stream: BlockwiseModel, index: int, block: RoundedBlock, online: RuntimeTransforms, states: BlockStates,
    config: BlockTuning,
) -> tuple[RoundedBlock, dict[str, Any]]:  # fmt: skip
    """Tune a rounded block.

    Args:
        stream: the model.
        index: the block's number.
        block: all of its linears, with offsets.
        online: what runs beside it.
        states: of this process's rows; gradients are summed over processes, so that all end with the same block.
        config: steps and rates.

    Returns:
        The block as it will be stored, with offsets of where its rounding variables ended; the one that was given,
        where that is better on the rows that judge. And notes: the loss there before and after, the squared error as a
        share of what the float block adds to the state, where every token counts in units of its target's energy (None
        where they have no tokens), and the share of codes that changed.

    Raises:
        Diverged: what was learned is no number.
    """
    work = _Work(stream, index, block, online, states, config)
    before = work.loss(states.judged)
    with allow_tf32(stream.device):
        work.descend()
    tuned, after = work.result(), work.loss(states.judged)
    if after is not None and not math.isfinite(after):
        raise Diverged(f"{stream.block_name(index)}: tuning ends with errors that are {after}; lower --lr-tune")
    kept = before is None or after is None or after <= before
    changed = sum(int((one.codes != block.linears[name].codes).sum()) for name, one in tuned.linears.items())
    count = sum(one.codes.numel() for one in tuned.linears.values())
    notes = {"before": before, "after": after, "codes_changed": changed / count if kept else 0.0, "kept": kept}
    return tuned if kept else block, notes


class _Work:
    """A block, and what is learned of it."""

    def __init__(
        self, stream: BlockwiseModel, index: int, block: RoundedBlock, online: RuntimeTransforms, states: BlockStates,
        config: BlockTuning,
    ) -> None:  # fmt: skip
        self._stream, self._index, self._block, self._online = stream, index, block, online
        self._states, self._config = states, config
        gains = found_parts(stream).blocks[index].gains
        self._factors = ScaleFactors(block, stream.linears(index), gains, stream.dtype, stream.device)
        self._variables = {} if not config.rounding else {
            name: _start(rounded, stream.dtype) for name, rounded in block.linears.items()
        }  # fmt: skip
        self._squares = {name: torch.zeros_like(v, requires_grad=False) for name, v in self._variables.items()}

    def _run(self, params: Mapping[str, Tensor], parts: _Batches) -> tuple[Tensor, Tensor]:
        """-> the squared error of the block's outputs at real tokens, and the energy of what it should add: of every
        token in units of its target's energy, by which the next norm divides, as few tokens have most of it."""
        stream, states, sums = self._stream, self._states, list[Tensor]()
        with runtime_transforms(stream, self._index, self._online):
            for some, batch in parts:
                before, target = (x[some].to(stream.device) for x in (states.inputs, states.targets))
                real = states.mask[some].to(stream.device)
                found = stream.run(self._index, dict(params), before, batch)
                aim = target[real]
                weights = aim.square().sum(-1).clamp(min=_LEAST).reciprocal()
                errors = [((x[real] - aim).square().sum(-1) * weights).sum() for x in (found, before)]
                sums.append(torch.stack(errors))
        total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=stream.dtype, device=stream.device)
        return total[0], total[1]

    @torch.no_grad()
    def loss(self, parts: _Batches) -> float | None:
        """Of the block as it will be stored, over all processes' rows; None of no rows."""
        params = self.result().params(self._stream.linears(self._index), self._stream.dtype)
        found = torch.stack(self._run(params, parts))
        all_reduce_sum_([found])
        return float(found[0] / found[1]) if found[1] > 0 else None

    def descend(self) -> None:
        """Take all steps."""
        config, schedule = self._config, OptimizerConfig(steps=self._config.steps)
        moved = [*self._factors.scales.values(), *self._factors.gains.values()]
        optimizer = torch.optim.AdamW(moved, betas=(0.9, 0.95), weight_decay=0.0)
        draw = torch.Generator().manual_seed(config.seed + 1_000_003 * self._index)
        order = list[int]()
        with stage("tune block", config.steps, "steps") as done:
            for step in range(config.steps):
                if not order and self._states.learned:
                    order = torch.randperm(len(self._states.learned), generator=draw).tolist()
                self._gradients(self._states.learned[order.pop()] if order else [])
                optimizer.param_groups[0]["lr"] = config.factors * schedule.rate(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self._move(config.rounding * schedule.rate(step), step)
                done()

    def _gradients(self, parts: _Batches) -> None:
        """Of the error on some rows of each process, summed over processes; of rows that pass together at a time."""
        learned = [*self._factors.scales.values(), *self._factors.gains.values(), *self._variables.values()]
        energy = torch.zeros((), dtype=self._stream.dtype, device=self._stream.device)
        for part in parts:
            with torch.enable_grad():
                error, added = self._run(self._factors.params(self._block, self._variables), [part])
                error.backward()
            energy += added.detach()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        all_reduce_sum_([energy, *gradients])
        energy = energy.clamp(min=torch.finfo(energy.dtype).tiny)  # of all, so that an error counts the same everywhere
        for p, gradient in zip(learned, gradients, strict=True):
            p.grad = gradient.div_(energy)

    @torch.no_grad()
    def _move(self, rate: float, step: int) -> None:
        """Take a step of all rounding variables down their gradients, as far as their grids go."""
        for name, v in self._variables.items():
            rounded = self._block.linears[name]
            grid, zero = rounded.grid, rounded.zero.to(v.dtype)
            assert v.grad is not None
            square = self._squares[name].mul_(_DECAY).addcmul_(v.grad, v.grad, value=1 - _DECAY)
            root = (square / (1 - _DECAY ** (step + 1))).sqrt_().clamp_(min=_LEAST)
            v.addcdiv_(v.grad, root, value=-rate * grid.spacing / math.sqrt(v.shape[-1]))
            v.grad = None
            low, high = ends_of(grid, zero)
            v.copy_(grid.split(v).clamp(low, high).flatten(-2))

    @torch.no_grad()
    def result(self) -> RoundedBlock:
        """The block with everything worked in, and offsets of where its rounding variables are."""
        made = self._factors.applied(self._block, self._variables)
        linears = {
            name: replace(one, offset=_offset(self._variables[name], one) if self._variables else one.offset)
            for name, one in made.linears.items()
        }
        return replace(made, linears=linears)


def _start(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """Rounding variables (out, in) of a linear, in units of its scale and counted from its zero point."""
    assert rounded.offset is not None, "this rounding kept no offsets"
    low, high = ends_of(rounded.grid, rounded.zero.to(dtype))
    start = levels_of(rounded, dtype) + rounded.grid.split(rounded.offset.to(dtype))
    return start.clamp(low, high).flatten(-2).requires_grad_()


def _offset(variables: Tensor, rounded: Rounded) -> Tensor:
    """How far variables lie from the levels of codes, inside their cells."""
    apart = (rounded.grid.split(variables.detach()) - levels_of(rounded, variables.dtype)).flatten(-2)
    return within_cell(apart, rounded.codes, rounded.grid).to(torch.float16)
