"""What each part of a model suffers from being rounded, and which bits it gets where not all can have the same.

A part is the linears of a block that read the same input: runtimes put these together, so they have the same bits. Of
llama.cpp's block types, which every tensor has for itself, it is one linear, and a width is such a type. Each part is
rounded alone, in each width, and what the model then answers is held against what it answers with no weight rounded, or
that is predicted (`compressor.quantization.precision.sensitivity`). Widths are allocated by an integer program that
takes these losses to add up.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from calib import BadInput, Failed
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.divergences import dense, forward_kl
from calib.quant.block_types import BLOCK_TYPES, fitting
from calib.quant.scheme import Scheme
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


Width = int | str  # bits of a code, or a block type of llama.cpp's


@dataclass(frozen=True)
class LayerGroup:
    """Linears, by name on disk, with `weights` weights together, and by width what rounding them alone does.

    kl: KL of the answers from those of the model whose weights are not rounded, in nats per token. wasserstein: the
    distance W1 of what the block puts out, mean over channels, as a share of the mean absolute deviation. types: of
    widths that are block types, the one that rows of such a length get.
    """

    linears: tuple[str, ...]
    weights: int
    kl: Mapping[Width, float]
    wasserstein: Mapping[Width, float]
    types: Mapping[Width, str] = field(default_factory=dict)

    @staticmethod
    def of(part: Sequence[Linear], kl: Mapping[Width, float], wasserstein: Mapping[Width, float]) -> LayerGroup:
        """The group of these linears."""
        weights = sum(math.prod(one.shape) for one in part)
        types: dict[Width, str] = {kind: type_for(kind, part[0]) for kind in kl if isinstance(kind, str)}
        return LayerGroup(tuple(one.name for one in part), weights, kl, wasserstein, types)

    def bits(self, width: Width) -> float:
        """Bits that a weight takes in a width: of its code, or of a block type with all that goes with it."""
        return BLOCK_TYPES[self.types[width]].bits_per_weight if isinstance(width, str) else float(width)

    def as_allocated(self, width: Width) -> dict[str, Any]:
        """The group in this width, as JSON has it."""
        by_bits = {kind: {str(b): v for b, v in getattr(self, kind).items()} for kind in ("kl", "wasserstein")}
        kind = {"type": self.types[width], "bits_per_weight": self.bits(width)} if self.types else {}
        return {"linears": list(self.linears), "weights": self.weights, **by_bits, "bits": width, **kind}


def type_for(kind: str, linear: Linear) -> str:
    """The block type that a linear gets where it is to have `kind`, which 256 has to divide its rows for."""
    found = fitting(kind, linear.shape[1])
    assert found is not None, "the scheme fits"
    return found


def layer_groups(linears: Iterable[Linear], *, apart: bool = False) -> list[tuple[Linear, ...]]:
    """The linears of a block, part by part: those that read the same input, or each `apart`; of experts, which lie in
    one tensor where they run, all that take the same step."""
    parts = dict[tuple[str, str], list[Linear]]()
    for linear in linears:
        key = (linear.name if apart else linear.site, "") if linear.step is None else (linear.module, linear.step)
        parts.setdefault(key, []).append(linear)
    return [tuple(part) for part in parts.values()]


def block_groups(stream: BlockwiseModel, scheme: Scheme, index: int) -> list[tuple[Linear, ...]]:
    """The linears of block `index`, part by part as a scheme allows bits to differ."""
    return layer_groups(stream.linears(index), apart=scheme.weights.is_block_type)


@torch.no_grad()
def profile_groups(
    model: QuantizedModel,
    calibration: Corpus,
    rows: int,
    widths: Sequence[Width],
    rounder: Rounder,
    context: RunContext,
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
        for part in block_groups(stream, model.scheme, layer):
            stored = tuple(one.name for one in part)
            losses = {bits: found[f"{stored[0]}.{bits}"] for bits in widths}
            if useless := [bits for bits, pair in losses.items() if not all(map(math.isfinite, pair))]:
                raise Failed(
                    f"{stored[0]}: in {width_name(useless[0])} the answers are no numbers; leave these out "
                    "(--candidate-bits)"
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
    widths: Sequence[Width]
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
        own = block_groups(stream, model.scheme, i)[rank() :: world_size()]
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
    model: QuantizedModel, index: int, part: Sequence[Linear], width: Width, params: Params,
    inputs: Mapping[str, Moments], rounder: Rounder,
) -> dict[str, Tensor]:  # fmt: skip
    """Round linears of block `index`, which has `params`, in a width, against the moments of their `inputs` by site.
    -> weights (out, in) by name, as the block runs with them."""
    stream, grid = model.stream, model.scheme.with_bits(bits_in(part, width)).grid
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


def bits_in(part: Iterable[Linear], width: Width) -> dict[str, Width]:
    """Bits of linears, or their block types, by name on disk, where all are to have one width."""
    return {one.name: type_for(width, one) if isinstance(width, str) else width for one in part}


def width_name(width: Width) -> str:
    """A width in words."""
    return width if isinstance(width, str) else f"{width} bits"


def least_and_most(parts: Sequence[LayerGroup]) -> tuple[float, float]:
    """The fewest mean bits of a weight that can be allocated, and the most."""
    whole = sum(part.weights for part in parts)
    spent = [[part.weights * part.bits(width) for width in part.kl] for part in parts]
    return sum(map(min, spent)) / whole, sum(map(max, spent)) / whole


def allocate_bits(parts: Sequence[LayerGroup], target: float) -> list[Width]:
    """A width for each part: the least sum of `kl` among all choices whose mean bits of a weight are at most
    `target`."""
    widths = list(parts[0].kl)
    losses = np.array([[part.kl[width] for width in widths] for part in parts])
    sizes = np.array([part.weights for part in parts], float)
    each = np.kron(np.eye(len(parts)), np.ones(len(widths)))
    bits = np.array([[part.bits(width) for width in widths] for part in parts])
    spent = ((sizes / sizes.sum())[:, None] * bits).reshape(1, -1)
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


def total_kl(parts: Sequence[LayerGroup], widths: Sequence[Width]) -> float:
    """The sum of what each part costs in its width."""
    return sum(part.kl[width] for part, width in zip(parts, widths, strict=True))


def mean_bits(parts: Sequence[LayerGroup], widths: Sequence[Width]) -> float:
    """Mean bits of a weight's code, or of a weight in its block type."""
    spent = sum(part.weights * part.bits(width) for part, width in zip(parts, widths, strict=True))
    return spent / sum(part.weights for part in parts)


def frontier(parts: Sequence[LayerGroup]) -> list[tuple[float, float]]:
    """(mean bits, sum of `kl`) of the best choices, for budgets a quarter of a bit apart, and for those of all parts in
    one width."""
    least, most = least_and_most(parts)
    budgets = {*np.arange(least, most + 0.01, 0.25).tolist(), *(bits for bits, _ in uniform(parts))}
    found = []
    for target in sorted(budgets):
        bits = allocate_bits(parts, target)
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


def uniform(parts: Sequence[LayerGroup]) -> list[tuple[float, float]]:
    """(mean bits, sum of `kl`) where all have the same width."""
    alike = ([width] * len(parts) for width in parts[0].kl)
    return [(mean_bits(parts, widths), total_kl(parts, widths)) for widths in alike]
