"""What each part of a model suffers from being rounded, and which bits it gets where not all can have the same.

A part is the linears of a block that read the same input: runtimes put these together, so they have the same bits. Each
part is rounded alone, in each width, and what the model then answers is held against what it answers with no weight
rounded, or that is predicted (`compressor.quantization.precision.sensitivity`). Widths are allocated by an integer
program that takes these losses to add up.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from calib import BadInput, Failed
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import Params
from calib.blockwise.row_states import RowStates
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.divergences import dense, forward_kl
from calib.runtime.distributed import barrier, local_indices, rank, world_size
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.perplexity import LOGIT_COPIES
from calib.stats.scaling_law import fit
from compressor.engine.blockwise_runs import embed
from compressor.engine.input_statistics import advance, input_moments
from compressor.engine.runtime_transforms import runtime_transforms
from compressor.quantization.calibrate import rounded_linears, transformed
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import Rounder

GROUPS_TOGETHER = (
    8  # blocks whose variants walk to the end together; what they found is kept before the next ones start
)


@dataclass(frozen=True)
class LayerGroup:
    """Linears, by name on disk, with `weights` weights together, and by bits what rounding them alone does.

    kl: KL of the answers from those of the model whose weights are not rounded, in nats per token. wasserstein: the
    distance W1 of what the block puts out, mean over channels, as a share of the mean absolute deviation.
    """

    linears: tuple[str, ...]
    weights: int
    kl: Mapping[int, float]
    wasserstein: Mapping[int, float]

    @staticmethod
    def of(part: Sequence[Linear], kl: Mapping[int, float], wasserstein: Mapping[int, float]) -> LayerGroup:
        """The group of these linears."""
        weights = sum(math.prod(one.shape) for one in part)
        return LayerGroup(tuple(one.name for one in part), weights, kl, wasserstein)

    def asdict(self) -> dict[str, Any]:
        """The group as JSON has it."""
        by_bits = {kind: {str(b): v for b, v in getattr(self, kind).items()} for kind in ("kl", "wasserstein")}
        return {"linears": list(self.linears), "weights": self.weights, **by_bits}


def layer_groups(linears: Iterable[Linear]) -> list[tuple[Linear, ...]]:
    """The linears of a block, part by part: those that read the same input; of experts, which lie in one tensor where
    they run, all that take the same step."""
    parts = dict[tuple[str, str], list[Linear]]()
    for linear in linears:
        key = (linear.site, "") if linear.step is None else (linear.module, linear.step)
        parts.setdefault(key, []).append(linear)
    return [tuple(part) for part in parts.values()]


@torch.no_grad()
def profile_groups(
    model: QuantizedModel, calibration: Corpus, rows: int, widths: Sequence[int], rounder: Rounder, context: RunContext
) -> list[LayerGroup]:
    """Measure what each width costs each group of linears of every block.  The first `rows` rows of `calibration` (N,
    T) are answered; all are calibrated on.

    Processes share the parts; what is found of a few blocks goes into the journal together.
    """
    stream, journal = model.stream, context.journal
    layers, shown = range(stream.layers), calibration[:rows]
    with stage("share out bits", len(layers), "blocks") as done:
        for start in layers[::GROUPS_TOGETHER]:
            page, some = f"profile-{start}", layers[start : start + GROUPS_TOGETHER]
            known = all(f"{page}-{process}" in journal for process in range(world_size()))
            if not known:
                runs = _PerturbedRuns(model, calibration, shown, widths, rounder)
                journal.write_own(f"{page}-{rank()}", {}, runs.run(some, context))
            barrier()
            done(units=len(some), again=known)
    found: dict[str, Any] = {}
    for start in layers[::GROUPS_TOGETHER]:
        for process in range(world_size()):
            found |= journal.notes(f"profile-{start}-{process}")
    result = []
    for layer in layers:
        for part in layer_groups(stream.linears(layer)):
            stored = tuple(one.name for one in part)
            losses = {bits: found[f"{stored[0]}.{bits}"] for bits in widths}
            if useless := [bits for bits, pair in losses.items() if not all(map(math.isfinite, pair))]:
                raise Failed(
                    f"{stored[0]}: in {useless[0]} bits the answers are no numbers; leave these out (--candidate-bits)"
                )
            kl, far = ({bits: pair[i] for bits, pair in losses.items()} for i in (0, 1))
            result.append(LayerGroup.of(part, kl, far))
    return result


@dataclass(frozen=True)
class _PerturbedRuns:
    """From the first block to the last, with all variants of some blocks."""

    model: QuantizedModel
    calibration: Corpus
    shown: Corpus
    widths: Sequence[int]
    rounder: Rounder

    def run(self, some: range, context: RunContext) -> dict[str, list[float]]:
        """-> (KL, W1) of each variant, by block, part and bits."""
        model, stream, mask = (
            self.model,
            self.model.stream,
            self.calibration.mask[local_indices(len(self.calibration.ids))],
        )
        share = replace(context, memory_budget=context.memory_budget // (len(some) + 2))
        calibration = self._states(self.calibration[local_indices(len(self.calibration.ids))], share)
        shown = self._states(self.shown, share)
        variants: list[tuple[list[str], RowStates]] = []
        far: dict[str, float] = {}
        with stage("profile", stream.layers, "blocks") as done:
            for i in range(stream.layers):
                params = transformed(stream, i, model.transforms)
                for _, states in variants:
                    advance(stream, i, params, states, model.online[i])
                if i in some:
                    moments = input_moments(stream, i, params, calibration, mask, model.online[i], advance=True)
                    variants.append(self._varied(i, params, moments, shown, share))
                    del moments
                elif i < some.start:
                    advance(stream, i, params, calibration, model.online[i])
                advance(stream, i, params, shown, model.online[i])
                if i in some:
                    names, states = variants[-1]
                    real = shown.real(self.shown.mask, sources=stream.reads_sources(i))
                    far |= {name: _distance(shown, states, n, real) for n, name in enumerate(names)}
                del params
                trim_heap()
                done("")
                stop_if_asked()
        starts = {n: (states, at * len(shown)) for names, states in variants for at, n in enumerate(names)}
        nats = answers_kl(model, self.shown, shown, starts)
        return {name: [nats[name], far[name]] for name in nats}

    def _states(self, rows: Corpus, context: RunContext) -> RowStates:
        return embed(self.model.stream, rows, self.model.outer, context)

    def _varied(
        self, i: int, params: Params, moments: dict[str, Moments], shown: RowStates, context: RunContext
    ) -> tuple[list[str], RowStates]:
        """This process's variants of block i: their names, and what they make of `shown`, one after the other."""
        model, stream = self.model, self.model.stream
        own = layer_groups(stream.linears(i))[rank() :: world_size()]
        names = [f"{part[0].name}.{bits}" for part in own for bits in self.widths]
        count, batches = len(shown), list[tuple[slice, RowBatch]]()
        store = context.store((len(names) * count, *shown.shape[1:]), stream.dtype, stream.room)
        for n in range(len(names)):
            part, bits = own[n // len(self.widths)], self.widths[n % len(self.widths)]
            weights = {one.name: one.of(params) for one in stream.linears(i)}
            weights |= rounded_group(model, i, part, bits, params, moments, self.rounder)
            varied = {**params, **put_together(stream.linears(i), weights)}
            with runtime_transforms(stream, i, model.online[i]):
                for rows, batch in shown.batches:
                    place, after = slice(n * count + rows.start, n * count + rows.stop), batch.copy()
                    store[place] = stream.run(i, varied, shown[rows].to(stream.device), after)
                    batches.append((place, after))
        return names, RowStates(store, batches)


def rounded_group(
    model: QuantizedModel, index: int, part: Sequence[Linear], bits: int, params: Params, inputs: Mapping[str, Moments],
    rounder: Rounder,
) -> dict[str, Tensor]:  # fmt: skip
    """Round linears of block `index`, which has `params`, to `bits`, against the moments of their `inputs` by site.  ->
    weights (out, in) by name, as the block runs with them."""
    stream, grid = model.stream, model.scheme.with_bits(dict.fromkeys((one.name for one in part), bits)).grid
    stored, found = stream.entry(f"{stream.block_name(index)}.{part[0].parameter}").dtype, dict[str, Tensor]()
    for site in dict.fromkeys(one.site for one in part):
        some = {one.name: one.of(params) for one in part if one.site == site}
        made = rounded_linears(some, inputs[site], {name: grid(name) for name in some}, rounder, stored)
        found |= {name: one.weight().to(stream.dtype) for name, (one, _) in made.items()}
    return found


def answers_kl(
    model: QuantizedModel, shown: Corpus, plain: RowStates, variants: Mapping[str, tuple[RowStates, int]]
) -> dict[str, float]:
    """KL of each variant's answers from the plain model's, nats per real token of the rows `shown` (N, T).

    From hidden states after the last block: of the plain model, and of each variant by name, where its rows begin.
    """
    stream, nats = model.stream, dict.fromkeys(variants, 0.0)
    end = stream.prepared(model.outer, stream.walk.leaving)

    def logits(states: RowStates, row: int, positions: slice, real: Tensor) -> Tensor:
        return stream.logits(states[row : row + 1][0, positions][real].to(stream.device), end)

    with stage("profile answers", len(plain), "rows") as done:
        for row in range(len(plain)):
            for positions in chunks(plain.shape[1], LOGIT_COPIES * stream.vocab):
                real = shown.mask[row, positions]
                p = logits(plain, row, positions, real)
                for name, (states, start) in variants.items():
                    q = logits(states, start + row, positions, real)
                    nats[name] += float(dense(forward_kl, p, q).double().sum())
            done("")
    return {name: value / int(shown.mask.sum()) for name, value in nats.items()}


def _distance(shown: RowStates, states: RowStates, n: int, real: Tensor) -> float:
    """W1 of each channel's values over the tokens that are `real`, of variant n and of none."""
    count = len(shown)
    return wasserstein(shown[0:count][real], states[slice(n * count, (n + 1) * count)][real])


def wasserstein(a: Tensor, b: Tensor) -> float:
    """W1 of the values of each channel of a and b (n, d), mean over channels, over the mean absolute deviation of a.

    In one dimension the best plan keeps the order: the distance is the mean of |sorted a - sorted b|.
    """
    far = (a.double().sort(0).values - b.double().sort(0).values).abs().mean()
    spread = (a - a.mean(0)).double().abs().mean()
    return float(far / spread.clamp(min=torch.finfo(a.dtype).tiny))


def allocate_bits(parts: Sequence[LayerGroup], target: float) -> list[int]:
    """Bits for each part: the least sum of `kl` among all choices whose mean bits of a weight are at most `target`."""
    widths = sorted(parts[0].kl)
    losses = np.array([[part.kl[bits] for bits in widths] for part in parts])
    sizes = np.array([part.weights for part in parts], float)
    each = np.kron(np.eye(len(parts)), np.ones(len(widths)))
    spent = np.kron(sizes / sizes.sum(), widths)[None]
    with _stdout_closed():
        solved = milp(
            (losses / max(losses.max(), np.finfo(float).tiny)).ravel(),
            integrality=np.ones(losses.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(each, 1, 1), LinearConstraint(spent, -np.inf, target + 1e-9)],
            options={"mip_rel_gap": 1e-6},
        )
    return [widths[place] for place in solved.x.reshape(losses.shape).argmax(1)]


@contextmanager
def _stdout_closed() -> Iterator[None]:
    """The solver (HiGHS in scipy 1.17) sometimes prints a line of its own, past Python, amid what a pipeline reads."""
    sys.stdout.flush()
    with Path(os.devnull).open("wb") as nowhere:
        kept = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def total_kl(parts: Sequence[LayerGroup], bits: Sequence[int]) -> float:
    """The sum of what each part costs in its bits."""
    return sum(part.kl[b] for part, b in zip(parts, bits, strict=True))


def mean_bits(parts: Sequence[LayerGroup], bits: Sequence[int]) -> float:
    """Mean bits of a weight's code."""
    return sum(part.weights * b for part, b in zip(parts, bits, strict=True)) / sum(part.weights for part in parts)


def frontier(parts: Sequence[LayerGroup]) -> list[tuple[float, float]]:
    """(mean bits, sum of `kl`) of the best choices, for budgets a quarter of a bit apart."""
    widths = sorted(parts[0].kl)
    found = []
    for target in np.arange(widths[0], widths[-1] + 0.01, 0.25):
        bits = allocate_bits(parts, float(target))
        found.append((mean_bits(parts, bits), total_kl(parts, bits)))
    return found


WANTED = (0.1, 0.01)  # nats per token, for which the report says how many bits they take


def law_of_bits(losses: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Fit a power law in the levels 2^bits to (bits, loss): how many bits a loss takes, with a 95% band.

    An end of a band that is nowhere is None; so is all of it where widths are too few, or losses do not fall.
    """
    try:
        law = fit([2.0**bits for bits, _ in losses], [loss for _, loss in losses])
    except BadInput:
        return None
    bits = {str(loss): [max(0.0, math.log2(size)) if 0 < size < math.inf else None for size in law.needed(loss)]
            for loss in WANTED}  # fmt: skip
    return {"exponent": law.exponent, "exponent_error": law.exponent_error, "bits": bits}


def uniform(parts: Sequence[LayerGroup]) -> list[tuple[int, float]]:
    """(bits, sum of `kl`) where all have the same."""
    return [(bits, sum(part.kl[bits] for part in parts)) for bits in sorted(parts[0].kl)]
