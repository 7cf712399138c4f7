"""The objective that learning and tuning share: say what the float model says, on the calibration rows.

A few of the rows are kept back from the descent and tell what it has done: one that ends worse than it began is not to
be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.backward import BlockSequence, backward
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus, batch_order
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot
from calib.jobs.training_loop import Group, OptimizerConfig, Parts, optimize, totals
from calib.losses.chunked_head import by_chunks, chunks
from calib.losses.divergences import cross_entropy
from calib.losses.top_k import KL_TOP, TopK
from calib.runtime.distributed import all_reduce_sum_, barrier, rank, world_size

_Raw = TypeVar("_Raw")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss that is descended on, and for how long."""

    steps: int
    batch: int  # rows a step
    loss: str  # a key of KL_TOP
    cross_entropy: float  # weight of the data's own next tokens beside the teacher's
    seed: int
    at_once: int = 2048  # tokens that pass through a block together
    chunk: int | None = None  # positions whose logits exist together; None: as many as CHUNK_BYTES hold


@dataclass(frozen=True)
class CalibrationData:
    """Rows (N, T), and the float model's answers on them."""

    corpus: Corpus
    teacher: TeacherCache


@dataclass(frozen=True)
class LearnedFunction(Generic[_Raw]):
    """`stream` from token ids to logits, differentiable in what is learned.  `stored`: its blocks as they will be
    stored, where those are not quite the blocks that are learned; rows kept back are measured on them."""

    stream: BlockwiseModel
    blocks: BlockSequence[_Raw]
    embed: Callable[[RowBatch], Tensor]  # -> (B, T, d)
    logits: Callable[[Tensor], Tensor]  # (t, d) -> (t, V)
    end: Callable[[], None] = lambda: None  # after the gradients of a step are in
    stored: BlockSequence[_Raw] | None = None


MOST_KEPT_BACK = 8  # rows


def kept_back(rows: int) -> int:
    """Count the calibration rows, the last ones of so many, that are not descended on but tell what the descent has
    done."""
    return min(MOST_KEPT_BACK, rows // 4)


@dataclass(frozen=True)
class LearningResult:
    """The loss of every step; and before and after all of them the loss on `rows` rows kept back with `tokens` tokens,
    None where there are too few rows to keep any back.  `best`: after how many steps the state is taken, where that is
    not the last; `codes_changed`: the share of codes that became others, where they could."""

    curve: list[float]
    rows: int
    tokens: int
    before: float | None
    after: float | None
    best: int | None = None
    codes_changed: float | None = None

    @property
    def kept(self) -> bool:
        """Whether what was learned is to be used."""
        if self.before is None or self.after is None:
            return True
        return math.isfinite(self.after) and not self.after > self.before

    def asdict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        found = {name: vars(self)[name] for name in ("rows", "tokens", "before", "after")}
        found |= {name: value for name in ("best", "codes_changed") if (value := vars(self)[name]) is not None}
        return found | {"kept": self.kept}


@dataclass(frozen=True)
class CalibrationBatch:
    """Some rows on the device that computes: what the model reads, which positions count, which token each tells and
    whether it is asked to (all (B, T)), and the teacher's answers (B, T, k)."""

    inputs: Mapping[str, Tensor]
    mask: Tensor
    targets: Tensor
    asked: Tensor
    top: TopK

    @staticmethod
    def read(data: CalibrationData, rows: Sequence[int], device: torch.device) -> CalibrationBatch:
        """Read rows, at least one, with the float model's answers, moved to the device together."""
        tops = [data.teacher.read(row) for row in rows]
        top = TopK(*(torch.stack([vars(one)[name] for one in tops]) for name in ("index", "log_p", "log_tail")))
        corpus = data.corpus[list(rows)]
        (targets, asked), hidden = corpus.targets, corpus.hidden
        mask = corpus.mask if hidden is None else hidden  # what is not hidden is told, not predicted
        inputs = {name: value.to(device) for name, value in corpus.inputs.items()}
        mask, targets, asked = (x.to(device) for x in (mask, targets, asked))
        return CalibrationBatch(inputs, mask, targets, asked, top.to(device))


def row_loss(
    model: LearnedFunction[_Raw], batch: CalibrationBatch, config: Objective, place: int, count: int
) -> Callable[[slice, Tensor], Tensor]:
    """-> from positions and hidden states there (t, d) to their share of the mean over `count` rows, of which one is
    that at `place` in `batch`."""
    top, mask = batch.top[place], batch.mask[place]
    weight = mask.double() / (mask.sum().clamp(min=1) * count)
    following, is_real = batch.targets[place], batch.asked[place]
    next_weight = config.cross_entropy * is_real.double() / (is_real.sum().clamp(min=1) * count)

    def loss(positions: slice, x: Tensor) -> Tensor:
        logits = model.logits(x)
        value = (KL_TOP[config.loss](top[positions], logits) * weight[positions]).sum()
        if config.cross_entropy:
            value = value + (cross_entropy(following[positions], logits) * next_weight[positions]).sum()
        return value

    return loss


@torch.no_grad()
def loss_of(
    model: LearnedFunction[_Raw],
    blocks: BlockSequence[_Raw],
    data: CalibrationData,
    config: Objective,
    rows: Sequence[int],
    context: RunContext,
) -> float:
    """Mean over `rows` of what is descended on, with `blocks` between the model's ends."""
    own = list(rows[rank() :: world_size()])
    total = torch.zeros((), dtype=torch.float64, device=blocks.device)
    if own:
        inputs = data.corpus[own].inputs
        first = model.embed(model.stream.batch(inputs))
        states = context.store(tuple(first.shape), first.dtype, blocks.room)
        states[slice(0, len(own))] = first
        for i, raw in blocks.reading(range(blocks.layers)):
            params = blocks.prepare(i, raw)
            for some, batch in model.stream.batches(inputs, at_once=config.at_once):
                states[some] = blocks.run(i, params, states[some].to(blocks.device), batch)
            del raw, params  # before the next is read
        for place, row in enumerate(own):
            hidden = states[slice(place, place + 1)][0].to(blocks.device)
            read = CalibrationBatch.read(data, [row], blocks.device)
            loss = row_loss(model, read, config, 0, len(rows))
            for positions in chunks(len(hidden), model.stream.vocab, config.chunk):
                total += loss(positions, hidden[positions])
    all_reduce_sum_([total])
    return float(total)


def calibration_gradients(
    model: LearnedFunction[_Raw], data: CalibrationData, config: Objective, context: RunContext
) -> Callable[[list[int]], float]:
    """-> a function of a batch's rows that adds this process's share of the gradients and gives its share of the loss.

    The loss is the mean over rows of the mean KL-Top over a row's tokens.
    """
    share, blocks = -(-config.batch // world_size()), model.blocks
    inputs: list[ActivationStore] = []

    def gradients(batch: list[int]) -> float:
        rows = batch[rank() :: world_size()]
        if not rows:  # a process among several may have none
            for i in reversed(range(blocks.layers)):
                blocks.finish(i)
            model.end()
            return 0.0
        here = CalibrationBatch.read(data, rows, blocks.device)
        first = model.embed(model.stream.batch(here.inputs))
        if not inputs:
            inputs.append(context.store((blocks.layers * share, *first.shape[1:]), first.dtype, blocks.room))

        def last(some: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
            results = [
                by_chunks(
                    h, row_loss(model, here, config, some.start + i, config.batch), model.stream.vocab, config.chunk
                )
                for i, h in enumerate(hidden)
            ]
            return torch.stack([loss for loss, _ in results]).sum(), torch.stack([given for _, given in results])

        loss = backward(blocks, first, last, inputs[0], model.stream.batches(here.inputs, at_once=config.at_once))
        model.end()
        return loss

    return gradients


class BestState:
    """The best of the states of a descent that were looked at on the way: that of the least loss on rows kept back."""

    def __init__(self, page: CheckpointSlot, params: Sequence[Tensor]) -> None:
        """params: what is learned; the page keeps them, and stores of its own."""
        self._page, self._state = page, {f"param.{i}": p for i, p in enumerate(params)}
        self.loss, self.steps = math.inf, 0
        if (found := page.notes()) is not None:  # by a run that was killed, maybe further on than this one is yet
            self.loss, self.steps = found["loss"], found["steps"]

    def offer(self, loss: float, steps: int) -> None:
        """Keep the state as it is now, after so many steps, if it is the best so far."""
        if loss < self.loss:
            self._page.write(self._state, {"loss": loss, "steps": steps})
            self.loss, self.steps = loss, steps

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state in place of the present one."""
        barrier()  # the process that writes has written
        found = self._page.read()
        assert found is not None, "nothing was looked at"
        for name, tensor in self._state.items():
            tensor.copy_(found[0][name])


LOOKS = 4  # times that rows kept back are looked at on the way


def minimize(
    model: LearnedFunction[_Raw],
    data: CalibrationData,
    groups: Sequence[Group],
    config: Objective,
    context: RunContext,
    *,
    keep: Mapping[str, Tensor] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> LearningResult:
    """Descend on the mean KL-Top to the teacher, every row but those kept back taken as often as any other.

    What the rows kept back tell is written beside the context's slot, so that a job that is resumed decides as it did.
    Where blocks are measured as they will be stored, rows kept back are looked at on the way too, and the state that is
    best on them is what parameters end at.
    """
    count = len(data.corpus.ids)
    check = range(count)[count - kept_back(count) :]
    rows_of_step = batch_order(count - len(check), config.steps, config.batch, config.seed)
    gradients = calibration_gradients(model, data, config, context)
    outcome = None if context.slot is None else context.slot.sibling("outcome")
    found = None if outcome is None else outcome.read()
    best, each = None, max(1, config.steps // (LOOKS + 1))
    if context.slot is not None and model.stored is not None and check:
        best = BestState(context.slot.sibling("best", stores=True), [p for group in groups for p in group.params])

    def step_gradients(step: int) -> Parts:
        before_step(step)
        return {config.loss: gradients(rows_of_step[step])}

    def done(step: int, parts: Parts) -> None:
        after_step(step)
        context.after_step(step, sum(parts.values()))
        if best is not None and (step + 1) % each == 0 and step + 1 < config.steps:
            best.offer(checked(), step + 1)

    def checked() -> float:
        before_step(0)
        return loss_of(model, model.stored or model.blocks, data, config, check, context)

    before = checked() if found is None and check else None
    curve = totals(
        optimize(
            groups, step_gradients, OptimizerConfig(steps=config.steps), after_step=done, keep=keep, page=context.slot
        )
    )
    after, steps = checked() if found is None and check else None, None
    if best is not None and after is not None and best.loss < math.inf and not after <= best.loss:  # which may be nan
        after, steps = best.loss, best.steps
    if found is not None:
        before, after, steps = found[1]["before"], found[1]["after"], found[1].get("best")
    elif outcome is not None:
        outcome.write({}, {"before": before, "after": after, "best": steps})
        barrier()
    if best is not None and steps is not None:
        best.restore()
    tokens = int(data.corpus.mask[check.start :].sum()) if check else 0
    return LearningResult(curve, len(check), tokens, before, after, steps)
