"""The two walks of a quantization: the float model as it is, then each block transformed, rounded and handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal, stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.top_k import TopK, top_k
from calib.model.activation_store import ActivationStore
from calib.model.blockwise import BlockwiseModel, Params, micro_batches
from calib.quant.scheme import Grid, Scheme
from calib.runtime.distributed import barrier, local_indices, rank, world_size
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.perplexity import Quality, compare
from compressor.engine.blockwise_runs import (
    EmbeddingAndHead,
    embed_rows,
    logits_at,
    output_head,
    read_embedding_and_head,
    run_blocks,
)
from compressor.engine.input_statistics import advance, input_moments, own_linears, sites
from compressor.engine.runtime_transforms import RuntimeTransforms
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
    as_kept,
    nearest_linear,
    output_error,
    round_linears,
)
from compressor.quantization.transforms import fold_block, fold_embedding, fold_head, with_gain
from compressor.storage.quantized_linear import Rounded

RANGE_POINTS = 17  # quantiles kept of the channels' ranges: enough for a chart, the same few for any width


@torch.no_grad()
def calibration_pass(stream: BlockwiseModel, rows: Splits, k: int, context: RunContext) -> tuple[list[Profile], Tensor]:
    """Run the model as stored.  -> a profile of every block, and this process's held-out rows (m, T, d) at the end.

    The k most likely tokens at every calibration position go into the journal's teacher cache; k = 0 keeps none.
    """
    journal = context.journal
    a, layers, teacher = stream.architecture, range(stream.sizes.layers), TeacherCache(journal)
    own, final = local_indices(len(rows.calibration.ids)), "float-states"

    def everywhere(page: str) -> bool:
        """Sums are taken over all processes, so all must do again what one of them lacks."""
        return all(f"{page}-{process}" in journal for process in range(world_size()))

    taught = not k or all(row in teacher for row in range(len(rows.calibration.ids)))
    if not (taught and everywhere(final)):
        missing = [row for row in own if k and row not in teacher]
        embedding = stream.read_embedding()
        calibration = embed_rows(stream, rows.calibration, embedding, context)
        held_out = embed_rows(stream, rows.held_out, embedding, context.without(calibration.bytes_in_ram))
        del embedding
        with stage("float model", len(layers), "blocks") as done:
            for i, params in stream.reading(layers):
                if known := everywhere(f"float-{i}"):
                    advance(stream, i, params, calibration, RuntimeTransforms())
                else:
                    mask = rows.calibration.mask[own]
                    moments = input_moments(stream, i, params, calibration, mask, RuntimeTransforms(), advance=True)
                    profile: Profile = {}
                    for site in list(moments):
                        own_names = [name for name, of in own_linears(a) if of == site]
                        profile |= _profile(params, own_names, moments.pop(site))
                    journal.write_own(f"float-{i}-{rank()}", {}, profile)
                advance(stream, i, params, held_out, RuntimeTransforms())
                done(again=known)
                stop_if_asked()
        if missing:
            logits = logits_at(stream, stream.read_head(), stream.read_final_gain(), calibration, own)
        taught_rows = len(own) if k else 0
        with stage("teacher", taught_rows, "rows", taught_rows - len(missing)) as done:
            for row in missing:
                some = [top_k(logits(row, p), k) for p in chunks(calibration.shape[1], stream.sizes.vocab)]
                parts = zip(*((t.index, t.log_p, t.log_tail) for t in some), strict=True)
                teacher.write(row, TopK(*(torch.cat(part) for part in parts)))
                done("")
        journal.write_own(f"{final}-{rank()}", {"hidden": held_out[:]}, {})
    barrier()
    profiles = [_merged(journal, i) for i in layers]
    hidden = journal.read(f"{final}-{rank()}")[0]["hidden"]
    return [{name: profile[name] for name in a.linears} for profile in profiles], hidden


def _merged(journal: Journal, index: int) -> Profile:
    """Notes of a block from all processes."""
    profile: Profile = {}
    for process in range(world_size()):
        profile |= journal.notes(f"float-{index}-{process}")
    return profile


def transformed_ends(stream: BlockwiseModel, transforms: Transforms | None) -> EmbeddingAndHead:
    """Embedding, final gain and head as they will be stored; without a rotation as they are, tied if they were."""
    dtype = stream.weights.entries[f"{stream.architecture.embed}.weight"].dtype
    ends = read_embedding_and_head(stream)
    if transforms is None or transforms.residual is None:
        return EmbeddingAndHead(
            ends.embedding.to(dtype), ends.final_gain, None if ends.head is None else ends.head.to(dtype)
        )
    residual = transforms.residual.to(stream.device)
    head = ends.embedding if ends.head is None else ends.head

    def by_rows(fold: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
        """In float64 for a few rows at a time: the whole table would be twice as large again."""
        result = torch.empty_like(table, dtype=dtype)
        for some in micro_batches(len(table), 1):
            result[some] = fold(table[some].double()).to(dtype)
        return result

    return EmbeddingAndHead(
        by_rows(lambda e: fold_embedding(e, residual), ends.embedding),
        torch.ones_like(ends.final_gain),
        by_rows(lambda h: fold_head(h, ends.final_gain.double(), residual), head),
    )


@torch.no_grad()
def quantization_pass(
    model: QuantizedModel, rows: Splits, blocks: RoundedBlocks, rounder: Rounder, context: RunContext
) -> ActivationStore:
    """Transform and round block after block into `blocks`, each fed by the rounded ones before it.

    Everything is rounded to the dtype it is stored in before it is used, so that what is measured is what is loaded.
    -> this process's held-out rows (m, T, d) at the end.
    """
    stream = model.stream
    embedding = model.ends.embedding.to(stream.dtype)
    calibration = embed_rows(stream, rows.calibration, embedding, context)
    held_out = embed_rows(stream, rows.held_out, embedding, context.without(calibration.bytes_in_ram))
    mask = rows.calibration.mask[local_indices(len(rows.calibration.ids))]
    del embedding
    with stage(f"round ({rounder.method})", stream.sizes.layers, "blocks") as done:
        for i in range(stream.sizes.layers):
            note, known = "", i in blocks
            if not known:
                part, notes = _rounded(model, i, calibration, mask, rounder)
                blocks.write(i, part, notes)
                note = f"output error {max((n['output_error'] or 0 for n in notes.values()), default=0):.2e}"
                del part
            barrier()
            params = blocks.read(i).params(stream.dtype)
            for states in (calibration, held_out):
                advance(stream, i, params, states, model.online[i])
            del params
            trim_heap()
            done(note, again=known)
            stop_if_asked()
    return held_out


def _rounded(
    model: QuantizedModel, index: int, calibration: ActivationStore, mask: Tensor, rounder: Rounder
) -> tuple[RoundedBlock, dict[str, dict[str, Any]]]:
    """This process's linears of a block (the first's also all that is not quantized), and notes on each."""
    stream, scheme, a = model.stream, model.scheme, model.stream.architecture
    params = transformed(stream, index, model.transforms)
    trim_heap()
    moments = input_moments(stream, index, params, calibration, mask, model.online[index])
    linears: dict[str, Rounded] = {}
    unrounded: dict[str, Tensor] = {}
    notes: dict[str, dict[str, Any]] = {}
    for site in sites(a):
        gathered, own = moments.pop(site), [name for name, of in own_linears(a) if of == site]
        notes |= _profile(params, own, gathered)
        weights = {name: params.pop(f"{name}.weight") for name in own}  # what is rounded is not needed again
        if rounder.method == UNROUNDED:
            errors = dict[str, float]()
            for name, weight in weights.items():
                unrounded[f"{name}.weight"] = weight.to(stream.stored_dtype(index, f"{name}.weight"))
                errors[name] = output_error(weight, unrounded[f"{name}.weight"].to(weight.dtype), gathered)
        else:
            grids = {name: scheme.grid(stream.stored_linear(index, name)) for name in own}
            rounded = rounded_linears(stream, index, weights, gathered, grids, rounder)
            linears |= {name: one for name, (one, _) in rounded.items()}
            errors = {name: error for name, (_, error) in rounded.items()}
        for name in own:  # of no input there is no error
            notes[name] |= {"tokens": gathered.count, "output_error": errors[name] if gathered.count else None}
        del gathered, weights
        trim_heap()
    quantized = {f"{name}.weight" for name in a.linears}  # with several processes some are another's
    rest = {n: as_kept(p, n, stream.stored_dtype(index, n), a) for n, p in params.items() if n not in quantized}
    return RoundedBlock(linears, (rest if rank() == 0 else {}) | unrounded), notes


def rounded_linears(
    stream: BlockwiseModel, index: int, weights: Mapping[str, Tensor], inputs: Moments, grids: Mapping[str, Grid],
    rounder: Rounder,
) -> dict[str, tuple[Rounded, float]]:  # fmt: skip
    """`round_linears` for linears of block `index`.  Raises RoundingFailed."""
    stored = stream.stored_dtype(index, f"{stream.architecture.q}.weight")
    try:
        return round_linears(weights, inputs, grids, rounder, stored)
    except NotPositive as error:
        where = f"{stream.architecture.blocks}.{index}.{', '.join(weights)}"
        raise RoundingFailed(f"{where}: {error}; try --damping {max(rounder.damping * 10, 0.01):g}") from error


@torch.no_grad()
def round_to_nearest_pass(
    stream: BlockwiseModel, corpus: Corpus, scheme: Scheme, context: RunContext
) -> ActivationStore:
    """This process's rows of `corpus` at the end of the model whose linears are rounded to nearest as they are, without
    calibration or transforms: what every method has to beat.  Activations and keys are rounded as the scheme says."""
    a, stored = stream.architecture, stream.stored_dtype(0, f"{stream.architecture.q}.weight")

    def reading(indices: Iterable[int]) -> Iterator[tuple[int, Params]]:
        for i, params in stream.reading(indices):
            rounded = dict(params)
            for name in a.linears:
                weight = rounded.pop(f"{name}.weight")
                grid = scheme.grid(stream.stored_linear(i, name))
                rounded[f"{name}.weight"] = nearest_linear(weight, grid, stored).weight().to(stream.dtype)
                del weight
            yield i, rounded
            trim_heap()
            stop_if_asked()

    online = [RuntimeTransforms(scheme.activations, scheme.kv)] * stream.sizes.layers
    return run_blocks(stream, corpus, read_embedding_and_head(stream), reading, online, context, "nearest")


def quality(
    stream: BlockwiseModel, corpus: Corpus, ends: EmbeddingAndHead, final: ActivationStore, reference: Tensor
) -> Quality:
    """The rounded model, by its final hidden states on the held-out rows `corpus`, against the float one's."""
    own = local_indices(len(corpus.ids))
    float_head = stream.read_head() if ends.head is not None else ends.embedding  # still tied: nothing was turned
    as_float = logits_at(stream, float_head, stream.read_final_gain(), reference, own)
    return compare(
        corpus, stream.sizes.vocab, logits_at(stream, output_head(ends), ends.final_gain, final, own), as_float
    )


def transformed(stream: BlockwiseModel, index: int, transforms: Transforms | None) -> dict[str, Tensor]:
    """Block `index`'s parameters, transformed in float64: one linear after the other, to hold little at a time."""
    params = stream.read_block(index)
    if transforms is None:
        return params
    a, exact = stream.architecture, {}
    block = transforms.blocks[index].to(torch.float64).to(stream.device)
    residual = None if transforms.residual is None else transforms.residual.to(stream.device)
    norms = {name: params[name].double() for name in params if name.removesuffix(".weight") in a.norms}
    for name in params:
        part = with_gain(norms | {name: params[name].double()}, name, a, rotated=residual is not None)
        down = transforms.online[index].hadamard_down
        exact[name] = fold_block(part, block, residual, a, stream.sizes, hadamard_down=down)[name].to(stream.dtype)
    return exact


def _profile(params: Mapping[str, Tensor], names: Sequence[str], inputs: Moments) -> Profile:
    """Of linears that share their inputs."""
    if not names:
        return {}
    shared = _summary(qsur_of(inputs), inputs.absmax)
    weights = {name: params[f"{name}.weight"] for name in names}
    return {
        name: {"activations": shared, "weights": _summary(qsur_of_rows(w), w.abs().amax(0).double())}
        for name, w in weights.items()
    }


def _summary(filled: dict[str, float | bool | None], absmax: Tensor) -> dict[str, Any]:
    ranges = absmax.quantile(torch.linspace(0, 1, RANGE_POINTS, dtype=torch.float64, device=absmax.device))
    few = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in filled.items()}
    return {**few, "channel_range": [float(f"{x:.4g}") for x in ranges.tolist()]}
