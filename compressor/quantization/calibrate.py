"""The two walks of a quantization: the float model as it is, then each block transformed, rounded and handed on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel, Params, micro_batches
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal, stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.top_k import TopK, top_k
from calib.model.pooling import pooling_of
from calib.quant.grid import fixed_scale, outer_scale
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.runtime.distributed import barrier, local_indices, rank, world_size
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.perplexity import Quality, compare
from calib.stats.similarity import Similarity, similarity
from compressor.engine.blockwise_runs import embed, embed_rows, logits_at, run_blocks
from compressor.engine.input_statistics import advance, input_moments, key_value_ranges, own_linears
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.embedding.tables import head_inputs
from compressor.quantization.float_target import PairedMoments, Passing, least_squares, one_after_the_other
from compressor.quantization.gptq import NotPositive
from compressor.quantization.learn_transforms import Transforms
from compressor.quantization.options import UNROUNDED
from compressor.quantization.qsur import qsur_of, qsur_of_rows
from compressor.quantization.quantized_model import Profile, QuantizedModel, Splits
from compressor.quantization.rounding import (
    RoundedBlock,
    RoundedBlocks,
    Rounder,
    RoundingFailed,
    nearest_linear,
    output_error,
    round_linears,
)
from compressor.quantization.tuning.block_tuning import BlockTuning, tune_block, tuned_states
from compressor.storage.key_value_scales import scale_dtype, scale_shape
from compressor.storage.quantized_linear import Rounded
from compressor.transforms.fold import BlockFold, DenseTurn, folded_block, folded_outer
from compressor.transforms.proof import Proof

RANGE_POINTS = 17  # quantiles kept of the channels' ranges: enough for a chart, the same few for any width
TOKENS_A_CHANNEL = 4  # that a profile is taken of, at least, so that a covariance is not one of chance


@torch.no_grad()
def calibration_pass(
    stream: BlockwiseModel, rows: Splits, k: int, context: RunContext, proof: Proof | None = None, *,
    profiled: bool = True, squares: bool = False,
) -> tuple[list[Profile], Tensor]:  # fmt: skip
    """Run the model as stored.  -> a profile of every block, none where not `profiled`, and this process's held-out
    rows (m, T, d) at the end.

    The k most likely tokens at every calibration position go into the journal's teacher cache; k = 0 keeps none, and
    runs no more calibration rows than profiles are taken of. `proof` sees every block's weights, and the others, as
    they are read. With `squares` all rows are run, and the journal keeps sums of the squared inputs of all linears.
    """
    journal = context.journal
    layers, teacher = range(stream.layers), TeacherCache(journal)
    final, whole = "float-states", stream.without(()) if squares else stream
    few = len(rows.calibration.ids) if squares else profiled_rows(stream, rows.calibration) * profiled
    own = local_indices(len(rows.calibration.ids))[: None if k else few]

    def everywhere(page: str) -> bool:
        """Sums are taken over all processes, so all must do again what one of them lacks."""
        return all(f"{page}-{process}" in journal for process in range(world_size()))

    taught = not k or all(row in teacher for row in range(len(rows.calibration.ids)))
    if not (taught and everywhere(final)):
        missing = [row for row in own if k and row not in teacher]
        start = stream.read_start(images=bool(rows.calibration.beside or rows.held_out.beside))
        if proof:
            proof.start(journal, start)
            proof.end(journal, stream.read_end())
        calibration = embed(stream, rows.calibration[own], start, context)
        held_out = embed_rows(stream, rows.held_out, start, context.without(calibration.bytes_in_ram))
        looked_at, others, mask = *calibration.parted(few), rows.calibration.mask[own]
        del start
        with stage("float model", len(layers), "blocks") as done:
            for i, params in stream.reading(layers):
                if proof:
                    proof.block(journal, i, params)
                if known := not few or everywhere(f"float-{i}"):
                    advance(stream, i, params, looked_at, RuntimeTransforms())
                else:
                    moments = input_moments(whole, i, params, looked_at, mask, RuntimeTransforms(), advance=True)
                    sums = _squares(own_linears(whole.linears(i)), moments) if squares else {}
                    notes = _profiles(whole.linears(i), params, moments) if profiled else {}
                    journal.write_own(f"float-{i}-{rank()}", sums, notes)
                    del moments
                for states in (others, held_out):
                    advance(stream, i, params, states, RuntimeTransforms())
                done(again=known and few > 0)
                stop_if_asked()
        if missing:
            logits = logits_at(stream, stream.read_end(), calibration, own)
        taught_rows = len(own) if k else 0
        with stage("teacher", taught_rows, "rows", taught_rows - len(missing)) as done:
            for row in missing:
                some = [top_k(logits(row, p), k) for p in chunks(calibration.shape[1], stream.vocab)]
                parts = zip(*((t.index, t.log_p, t.log_tail) for t in some), strict=True)
                teacher.write(row, TopK(*(torch.cat(part) for part in parts)))
                done("")
        journal.write_own(f"{final}-{rank()}", {"hidden": held_out[:]}, {})
    barrier()
    return [_merged(journal, stream, i) for i in layers if profiled], journal.read(f"{final}-{rank()}")[0]["hidden"]


def _squares(linears: Iterable[Linear], inputs: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Sums of the squared inputs (in,) of linears, and how many tokens (1,) they are of, as a page keeps them."""
    squares = {f"squares.{one.name}": inputs[one.site].gram.diagonal().clone() for one in linears}
    return squares | {f"count.{one.name}": torch.tensor([float(inputs[one.site].count)]) for one in linears}


def profiled_rows(stream: BlockwiseModel, calibration: Corpus) -> int:
    """Count the rows of each process that profiles are taken of: the first that have tokens enough for the widest
    input, and those that pass through a block together with them."""
    widest = max(one.shape[1] for i in range(stream.layers) for one in stream.linears(i))
    tokens = calibration.mask.sum(1).cumsum(0)
    rows = int((tokens < TOKENS_A_CHANNEL * widest).sum()) + 1
    own, length = -(-len(tokens) // world_size()), calibration.ids.shape[1]
    few = -(-min(rows, len(tokens)) // world_size())
    return few if calibration.beside else next(some.stop for some in micro_batches(own, length) if some.stop >= few)


def _merged(journal: Journal, stream: BlockwiseModel, index: int) -> Profile:
    """Notes of a block from all processes, in the order of its linears."""
    profile: Profile = {}
    for process in range(world_size()):
        profile |= journal.notes(f"float-{index}-{process}")
    return {one.name: profile[one.name] for one in stream.linears(index)}


def _by_site(linears: Iterable[Linear]) -> list[tuple[str, list[Linear]]]:
    """Linears that read the same input together, in order."""
    found = dict[str, list[Linear]]()
    for linear in linears:
        found.setdefault(linear.site, []).append(linear)
    return list(found.items())


def transformed_outer(stream: BlockwiseModel, transforms: Transforms | None) -> dict[str, Tensor]:
    """Transform what is no block's to what will be stored; without a rotation it stays as it is, one tensor under two
    names if it was."""
    outer = stream.read_outer()
    if transforms is not None and transforms.residual is not None:
        turn, dtypes = DenseTurn(transforms.residual.to(stream.device)), {n: stream.entry(n).dtype for n in outer}
        outer = folded_outer(outer, transforms.parts, turn, dtypes)
    stored = {id(t): t.to(stream.entry(name).dtype) for name, t in outer.items()}
    return {name: stored[id(t)] for name, t in outer.items()}


@torch.no_grad()
def quantization_pass(
    model: QuantizedModel, rows: Splits, blocks: RoundedBlocks, rounder: Rounder, context: RunContext,
    tuning: BlockTuning | None = None,
) -> tuple[RowStates, Moments | None]:  # fmt: skip
    """Transform and round block after block into `blocks`, each fed by the rounded ones before it, and with `tuning`
    tuned on its own outputs before it is stored.

    Everything is rounded to the dtype it is stored in before it is used, so that what is measured is what is loaded.
    -> this process's held-out rows (m, T, d) at the end, and moments of what the head reads, where it is rounded.
    """
    stream = model.stream
    calibration = embed_rows(stream, rows.calibration, model.outer, context)
    context = context.without(calibration.bytes_in_ram)
    held_out = embed_rows(stream, rows.held_out, model.outer, context)
    context = context.without(held_out.bytes_in_ram)
    aims = rounder.float_target or tuning is not None
    floats = transformed_outer(stream, model.transforms) if aims and model.tables else model.outer
    exact = embed_rows(stream, rows.calibration, floats, context) if aims else None
    begins = replace(rounder, offsets=True) if tuning is not None and tuning.rounding else rounder
    if tuning is not None and exact is not None:
        tuned_on = tuned_states(stream, rows.calibration, calibration, exact, tuning)
    with stage(f"round ({rounder.method})", stream.layers, "blocks") as done:
        for i in range(stream.layers):
            note, known = "", i in blocks
            if not known:
                part, notes = _rounded(model, i, rows.calibration, calibration, exact, begins)
                if tuning is not None and exact is not None:
                    whole = blocks.gathered(i, part)
                    whole, tuned = tune_block(stream, i, whole, whole.served(model.online[i]), tuned_on, tuning)
                    part = whole.of(part) if rounder.offsets else whole.of(part).without_offsets()
                    notes = {name: {**of, "block": tuned} for name, of in notes.items()}
                blocks.write(i, part, notes)
                note = f"output error {max((n['output_error'] or 0 for n in notes.values()), default=0):.2e}"
                del part
            elif exact is not None:
                passing = Passing(transformed(stream, i, model.transforms), model.online[i], exact).unrounded()
                advance(stream, i, passing.params, exact, passing.online)
            barrier()
            block = blocks.read(i)
            params, online = block.params(stream.linears(i), stream.dtype), block.served(model.online[i])
            for states in (calibration, held_out):
                advance(stream, i, params, states, online)
            del block, params
            trim_heap()
            done(note, again=known)
            stop_if_asked()
    if model.scheme.head is None:
        return held_out, None
    mask = rows.calibration.mask[local_indices(len(rows.calibration.ids))]
    return held_out, head_inputs(stream, model.outer, calibration, mask)


def _rounded(
    model: QuantizedModel,
    index: int,
    corpus: Corpus,
    calibration: RowStates,
    exact: RowStates | None,
    rounder: Rounder,
) -> tuple[RoundedBlock, dict[str, dict[str, Any]]]:
    """This process's linears of a block (the first's also all that is not quantized), and notes on each.

    `exact` are the float model's states, which become those after the block; where the rounder aims at them, linears
    are rounded one after the other. `corpus`: the rows that `calibration` has this process's states of.
    """
    stream, scheme = model.stream, model.scheme
    params, linears = transformed(stream, index, model.transforms), stream.linears(index)
    trim_heap()
    dtypes = {one.name: stream.entry(f"{stream.block_name(index)}.{one.parameter}").dtype for one in linears}
    quantized = {one.parameter for one in linears}  # with several processes some are another's
    part, notes = RoundedBlock({}, {}), dict[str, dict[str, Any]]()
    mask = corpus.mask[local_indices(len(corpus.ids))]
    online = replace(model.online[index], keys=_key_value_scales(model, index, params, calibration, mask))
    few, start, again = profiled_rows(stream, corpus), None, calibration
    if apart := few < -(-len(corpus.ids) // world_size()):  # in some process, and then all go this way
        profiled, again = calibration.parted(few)
        start = input_moments(stream, index, params, profiled, mask, online)
        notes = _profiles(linears, params, start)
    groups: Iterable[tuple[Sequence[Linear], dict[str, Moments] | dict[str, PairedMoments]]]
    if exact is None or not rounder.float_target:
        groups = [(linears, input_moments(stream, index, params, again, mask, online, start=start))]
        if exact is not None:
            passing = Passing(params, online, exact).unrounded()
            advance(stream, index, passing.params, exact, passing.online)
    else:
        start = None  # its sums are gathered anew, in pairs
        groups = one_after_the_other(stream, index, Passing(params, online, exact), calibration, mask, part)
    for some, sums in groups:
        for site, own in _by_site(own_linears(some)):
            gathered, weights = sums.pop(site), {one.name: one.of(params) for one in own}
            inputs = gathered.rounded if isinstance(gathered, PairedMoments) else gathered
            notes |= {} if apart else _profile(weights, inputs)
            if rounder.method == UNROUNDED:
                part.unrounded.update({name: w.to(dtypes[name]) for name, w in weights.items()})
                errors = {n: output_error(w, part.unrounded[n].to(w.dtype), inputs) for n, w in weights.items()}
            else:
                reads, stored, grids = scheme.activations, dtypes[own[0].name], {n: scheme.grid(n) for n in weights}
                outer = outer_scale((one.of(params) for one in some if one.site == site), scheme.weights)
                made = rounded_linears(weights, gathered, grids, rounder, stored, outer)
                scale = None if reads is None else fixed_scale(inputs.absmax, reads, stored)
                part.linears.update({name: replace(one, inputs=scale) for name, (one, _) in made.items()})
                errors = {name: error for name, (_, error) in made.items()}
            for name in weights:  # of no input there is no error
                notes[name] |= {"tokens": inputs.count, "output_error": errors[name] if inputs.count else None}
            del gathered, inputs, weights
            trim_heap()
    if rank() == 0:
        rest = {name: p for name, p in params.items() if name not in quantized}
        part.rest.update({n: p.to(stream.entry(f"{stream.block_name(index)}.{n}").dtype) for n, p in rest.items()})
        part.keys.update(online.keys)
    return part, notes


def _key_value_scales(
    model: QuantizedModel, index: int, params: Params, states: RowStates, mask: Tensor
) -> dict[str, Tensor]:
    """Scales (2, 1 or heads) of keys and of values of a block's attention layers, rounded to the dtype that they are
    stored in, where calibration finds them."""
    stream, grid = model.stream, model.scheme.kv
    if grid is None or not grid.is_fixed:
        return {}
    dtype, found, heads = scale_dtype(stream), dict[str, Tensor](), math.prod(scale_shape(stream, model.scheme))
    for name, ranges in key_value_ranges(stream, index, params, states, mask, model.online[index], heads).items():
        scales = [fixed_scale(most, grid, dtype) for most in ranges.flatten()]
        found[name] = torch.cat([one for one in scales if one is not None]).view_as(ranges)
    return found


def rounded_linears(
    weights: Mapping[str, Tensor],
    inputs: Moments | PairedMoments,
    grids: Mapping[str, Grid],
    rounder: Rounder,
    stored: torch.dtype,
    outer: Tensor | None = None,
) -> dict[str, tuple[Rounded, float]]:
    """`round_linears` for linears by their names on disk, which aim at the float model where `inputs` have its share.
    Raises RoundingFailed."""
    try:
        if isinstance(inputs, PairedMoments):
            weights, inputs = least_squares(weights, inputs, rounder.damping), inputs.rounded
        return round_linears(weights, inputs, grids, rounder, stored, outer)
    except NotPositive as error:
        where = ", ".join(weights)
        raise RoundingFailed(f"{where}: {error}; try --damping {max(rounder.damping * 10, 0.01):g}") from error


@torch.no_grad()
def round_to_nearest_pass(
    stream: BlockwiseModel, corpus: Corpus, outer: Params, scheme: Scheme, context: RunContext
) -> RowStates:
    """This process's rows of `corpus` at the end of the model whose linears are rounded to nearest as they are, without
    calibration or transforms: what every method has to beat.  Activations and keys are rounded as the scheme says;
    `outer` is what is no block's."""

    def reading(indices: Iterable[int]) -> Iterator[tuple[int, Params]]:
        for i, params in stream.reading(indices):
            linears, rounded, left = stream.linears(i), dict[str, Tensor](), dict(params)
            for one in linears:
                stored = stream.entry(f"{stream.block_name(i)}.{one.parameter}").dtype
                nearest = nearest_linear(one.of(params), scheme.grid(one.name), stored)
                rounded[one.name] = nearest.weight().to(stream.dtype)
            yield i, left | put_together(linears, rounded)
            trim_heap()
            stop_if_asked()

    online = [RuntimeTransforms(scheme.activations, scheme.kv)] * stream.layers
    return run_blocks(stream, corpus, outer, reading, online, context, "nearest")


def quality(
    stream: BlockwiseModel, corpus: Corpus, outer: Params, final: RowStates, reference: Tensor, *, exact: bool = False
) -> Quality | Similarity:
    """The rounded model, by its final hidden states on the held-out rows `corpus`, against the float one's; `exact`:
    what is no block's is the float model's own, whose head is then held once."""
    own, end = local_indices(len(corpus.ids)), stream.prepared(outer, stream.walk.leaving)
    models = logits_at(stream, end, final, own), logits_at(stream, end if exact else stream.read_end(), reference, own)
    if stream.task.embeds:
        return similarity(corpus, pooling_of(stream.weights.folder), *models)
    return compare(corpus, stream.vocab, *models)


def transformed(stream: BlockwiseModel, index: int, transforms: Transforms | None) -> dict[str, Tensor]:
    """Block `index`'s parameters, transformed in float64: one linear after the other, to hold little at a time."""
    params = stream.read_block(index)
    if transforms is None:
        return params
    block = transforms.blocks[index].to(torch.float64).to(stream.device)
    turn = None if transforms.residual is None else DenseTurn(transforms.residual.to(stream.device))
    fold, hadamard = BlockFold(transforms.parts.blocks[index]), transforms.online[index].hadamard
    return folded_block(params, fold, block, turn, stream.linears(index), hadamard=hadamard)


def _profiles(linears: Sequence[Linear], params: Params, inputs: Mapping[str, Moments]) -> Profile:
    """Of this process's linears of a block."""
    profile: Profile = {}
    for site, own in _by_site(own_linears(linears)):
        profile |= _profile({one.name: one.of(params) for one in own}, inputs[site])
    return profile


def _profile(weights: Mapping[str, Tensor], inputs: Moments) -> Profile:
    """Of linears that share their inputs."""
    if not weights:
        return {}
    shared = _summary(qsur_of(inputs), inputs.absmax)
    return {
        name: {"activations": shared, "weights": _summary(qsur_of_rows(w), w.abs().amax(0).double())}
        for name, w in weights.items()
    }


def _summary(filled: dict[str, float | bool | None], absmax: Tensor) -> dict[str, Any]:
    ranges = absmax.quantile(torch.linspace(0, 1, RANGE_POINTS, dtype=torch.float64, device=absmax.device))
    few = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in filled.items()}
    return {**few, "channel_range": [float(f"{x:.4g}") for x in ranges.tolist()]}
