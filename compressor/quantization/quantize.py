"""Quantize a checkpoint: fold, calibrate, learn, round, save (OSTQuant, OpenReview rAcgDBdKnP; GPTQ, arXiv:2210.17323).

Walks over the blocks, one in memory at a time. The first runs the float model: statistics before, the teacher's top-k,
the float model's own answers on held-out rows. Learning walks to and fro. Then blocks are transformed and rounded, each
fed by the already rounded blocks before it, and tuned to and fro again. Every stage goes into a journal as it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from calib import Failed
from calib.data.corpus import Corpus, describe
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import stream_identity
from calib.jobs.output_folder import Shards, atomic_folder, write_described
from calib.jobs.recipe import read_recipe
from calib.jobs.training_loop import steps_done
from calib.model.checkpoint import find_model
from calib.quant.scheme import Scheme
from calib.runtime.device import memory_budget_bytes, pick_device
from calib.runtime.distributed import barrier, is_main_process, raise_together
from calib.runtime.memory import limit_malloc_cache, trim_heap
from calib.runtime.progress import stage
from calib.stats.rate_distortion import bits_at
from compressor.engine.blockwise_runs import run_blocks
from compressor.engine.damage import advice_after, judge, rounding_damage
from compressor.engine.deployment import PAGE, compare_texts
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.calibrate import (
    calibration_pass,
    quality,
    quantization_pass,
    round_to_nearest_pass,
    transformed_outer,
)
from compressor.quantization.job import QuantizationJob, validate_quantization
from compressor.quantization.learn_transforms import Transforms, free_parameters, learn_transforms
from compressor.quantization.mixed_precision import (
    frontier,
    law_of_bits,
    mean_bits,
    uniform,
)
from compressor.quantization.objective import CalibrationData, LearningResult, Objective
from compressor.quantization.options import UNROUNDED, Quantize, rate_of
from compressor.quantization.quantized_model import Profile, QuantizationResult, QuantizedModel, Splits
from compressor.quantization.repeated.cheapest_bits import Candidate, bit_targets, cheapest_bits
from compressor.quantization.repeated.sample_size import SampleSizeEstimate, estimate_sample_size
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks
from compressor.quantization.sensitivity import profile_and_allocate
from compressor.quantization.tied_embedding import second_table
from compressor.quantization.tuning.tune import TunedBlocks, TuningRates, tune
from compressor.quantization.write import (
    bytes_in_out,
    is_untied,
    report_of,
    stored_block,
    stored_outer,
    write_descriptions,
)
from compressor.report.quantization import quantized_page
from compressor.transforms.proof import Proof, left_out


def quantize(
    model: str | Path,
    out: str | Path,
    options: Quantize | None = None,
    *,
    resume: bool | None = None,
    gate: Gate | None = None,
    allow_recovery: bool = False,
    allow_damage: bool = False,
) -> dict[str, Any]:
    """Quantize a model and write it to a directory.

    The steps are those of OSTQuant (OpenReview rAcgDBdKnP): transforms that leave the model's function alone are folded
    into the weights and, with `options.learn`, learned; codes are chosen by GPTQ (arXiv:2210.17323); scales and norm
    gains are tuned afterwards. One block is in memory at a time.

    Args:
        model: a directory with safetensors, or a name on the hub.
        out: the output directory; complete or absent when this returns or raises. An older output of parewell's there
            is replaced once the new one is complete.
        options: what to do; default: `Quantize()`.
        resume: what becomes of an interrupted run's journal beside `out`: True continues it, False discards it, None
            refuses to start.
        gate: called with the finished directory before it is put in place; what it returns goes into the report, what
            it raises leaves no output. A model that was made to forget needs one (`parewell.gate`), as quantizing may
            recover what it forgot, or `allow_recovery`.
        allow_recovery: quantize a model that was made to forget without a gate.
        allow_damage: write the output even if it is much worse than the original; the report says so.

    Returns:
        The report, as in report.json: figures before and after by stage, errors of every layer, sizes in bytes.

    Raises:
        BadInput: model, data, options or output will not do; nothing was written.
        Damaged: on the held-out rows fewer than half of the most likely tokens agree with the original's, or the KL is
            above what rounding to nearest costs. The journal stays, so that `allow_damage` costs nothing more.
        Failed, NoSpace: the job cannot go on; the journal stays.
    """
    options, out = options or Quantize(), Path(out)
    with raise_together():
        limit_malloc_cache(memory_budget_bytes(options.memory_budget, pick_device(options.device)))
        folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
        if gate is None and not allow_recovery:
            check_unforgetting(folder)
        job = validate_quantization(folder, out, options)
        identity = stream_identity(options, model, folder, job.stream) | {
            "data": {name: describe(rows) for name, rows in vars(job.rows).items() if rows is not None}
        }
    with journal_beside(out, identity, resume) as journal:
        tried = dict[str, Any]()
        if options.tell_apart is None:
            done = run_stages(job, journal)
        else:
            job, done, tried["tell_apart"] = _in_cheapest_bits(job, journal)
        more = tried | {"damage": _judged(options, done, allow=allow_damage)} | _beside_figures(job, journal, done)
        return _save(folder, out, job, done, identity, gate, more)


def run_stages(
    job: QuantizationJob, journal: Journal, *, compared: bool = True, shared: Journal | None = None
) -> QuantizationResult:
    """Run all of a job but its saving, each stage resumed from the journal.

    Args:
        job: what to run.
        journal: where stages are kept.
        compared: also measure what rounding to nearest costs, and compare texts.
        shared: where stages are kept that other jobs, which differ in bits and learning alone, have in common with it.
    """
    stream, options, rows = job.stream, job.options, job.rows
    context, common = (RunContext(each, job.budget) for each in (journal, shared or journal))
    tune_steps = job.tune_steps
    job, before, float_final = _calibrated(job, common)
    if compared and rows.like is not None:
        compare_texts(stream, rows.calibration, rows.like, options.seed, common)
    data, learning = CalibrationData(rows.calibration, TeacherCache(common.journal)), dict[str, LearningResult]()
    trim_heap()
    scheme, precision = job.scheme, None
    if options.target_bits is not None:
        scheme, precision = _allocate_bits(job, common, context if compared else None)
        trim_heap()
    parameters = 0
    if job.learns:
        transforms, parameters, learning["learn"] = _learn(job, scheme, data, context)
        model = _model(job, scheme, transforms)
    else:
        model = _model(job, scheme, job.initial_transforms())
    trim_heap()
    blocks = RoundedBlocks(journal, scheme, stream)
    if "rounded" not in journal:
        final = quantization_pass(model, rows, blocks, job.rounder, context)
        journal.write("rounded", {}, quality(stream, rows.held_out, model.outer, final, float_final).asdict())
        barrier()
    figures = {"rounded": journal.notes("rounded")}
    if compared and options.rounding != UNROUNDED:
        figures = {"nearest": _nearest(job, scheme, context, float_final)} | figures
    block: Callable[[int], RoundedBlock] = blocks.read
    if tune_steps:
        tuned, learning["tune"] = _tune(model, blocks, job, data, context)
        if learning["tune"].kept:
            parameters, block = parameters + tuned.parameters, tuned.read
            reading = lambda order: ((i, block(i).params(stream.linears(i), stream.dtype)) for i in order)  # noqa: E731
            final = run_blocks(stream, rows.held_out, model.outer, reading, model.online, context)
            figures["tuned"] = quality(stream, rows.held_out, model.outer, final, float_final).asdict()
    after = [blocks.notes(i) for i in range(stream.layers)]
    return QuantizationResult(model, job.parts, precision, block, before, after, figures, learning, parameters)


def _judged(options: Quantize, done: QuantizationResult, *, allow: bool) -> dict[str, Any]:
    """What the report says of damage.  Raises Damaged where there is some and it is not allowed."""
    nearest = done.figures.get("nearest")
    instead = advice_after(
        options.scheme, options.init, options.rounding, nearest, target=options.target_bits,
        searched=options.tell_apart is not None,
    )  # fmt: skip
    return judge(options.scheme, rounding_damage(done.final, nearest), instead=instead, allow=allow)


def _beside_figures(job: QuantizationJob, journal: Journal, done: QuantizationResult) -> dict[str, Any]:
    """What the report says beside a job's figures: how learning was checked, and of its calibration rows what was asked
    for."""
    more: dict[str, Any] = {"checks": {name: matched.asdict() for name, matched in done.learning.items()}}
    if job.rows.like is not None:
        more["like"] = journal.notes(PAGE)
    if job.options.halves:
        more["samples"] = _halves(job, journal, done).asdict()
    return more


def _in_cheapest_bits(
    job: QuantizationJob, journal: Journal
) -> tuple[QuantizationJob, QuantizationResult, dict[str, Any]]:
    """The job in the fewest bits that keep the tell-apart rate it was asked for.  -> that job, its results, and what
    was tried.  Raises Failed where no candidate keeps it."""
    rate = rate_of(job.options.tell_apart or "")
    _calibrated(job, RunContext(journal, job.budget))  # once, with what learning wants of it
    learns = job.learns or job.tune_steps > 0
    tried, kept = dict[str, Candidate](), list[Journal]()

    def pages_of(target: float, whole: bool) -> tuple[str, Journal]:
        name = f"{'bits' if whole else 'quick'}-{target:g}"
        return f"tried-{name}", Journal(journal.folder, f"{name}-")

    def measure(target: float, whole: bool) -> Candidate:
        page, pages = pages_of(target, whole)
        if page not in journal:
            done = run_stages(job.in_bits(target, whole=whole), pages, compared=False, shared=journal)
            assert done.precision is not None
            figures = (done.precision["mean_bits"], done.final["tell_apart"], done.final["tell_apart_error"])
            journal.write(page, {}, Candidate(target, *figures, whole).asdict())
            barrier()
        if page not in tried:
            tried[page] = Candidate(**journal.notes(page))
            keeps = whole and tried[page].rate <= rate
            for old in kept if keeps else [pages]:  # of rounded blocks the disk holds those of two candidates
                old.drop()
            kept[:] = [pages] if keeps else kept
        return tried[page]

    targets = bit_targets(job.options.widths())
    found = cheapest_bits(targets, rate, measure, quick=learns)
    if found is None:
        most = measure(targets[-1], True)
        raise Failed(
            f"tell-apart {rate:.4g}: in {targets[-1]:g} bits, the most there are to choose from, {job.options.scheme} "
            f"gives {most.rate:.4g} on {job.rows.held_out.tokens:,} held-out tokens; ask for a rate above that"
        )
    final = job.in_bits(found.target_bits, whole=True)
    done = run_stages(final, pages_of(found.target_bits, True)[1], shared=journal)
    return final, done, {"asked": rate, **found.asdict(), "tried": [one.asdict() for one in tried.values()]}


def _calibrated(job: QuantizationJob, context: RunContext) -> tuple[QuantizationJob, list[Profile], Tensor]:
    """Run the float model.  -> the job with what its real weights admit, a profile of every block, and this process's
    held-out rows at the end."""
    k = job.options.top_k if job.learns or job.tune_steps else 0
    proof = None if job.options.init == "none" else Proof(job.stream, job.parts)
    before, final = calibration_pass(job.stream, job.rows, k, context, proof)
    return job if proof is None else replace(job, parts=proof.admitted(context.journal)), before, final


def _model(job: QuantizationJob, scheme: Scheme, transforms: Transforms | None) -> QuantizedModel:
    """With `transforms`, or none."""
    plain = [RuntimeTransforms(scheme.activations, scheme.kv)] * job.stream.layers
    online = plain if transforms is None else transforms.online
    return QuantizedModel(job.stream, scheme, transformed_outer(job.stream, transforms), transforms, online)


def model_of_job(job: QuantizationJob) -> QuantizedModel:
    """The model of a job with the transforms that learning starts from."""
    return _model(job, job.scheme, job.initial_transforms())


def _learn(
    job: QuantizationJob, scheme: Scheme, data: CalibrationData, context: RunContext
) -> tuple[Transforms, int, LearningResult]:
    """-> what was learned, or the start where that is better; how many numbers were fitted, and how it went."""
    options = job.options

    def start() -> Transforms:
        transforms = job.initial_transforms()
        assert transforms is not None, "without transforms there is nothing to learn"
        return transforms

    with stage("learn", options.steps, "steps", steps_done(CheckpointSlot(context.journal, "learn"))) as done:
        transforms, result = learn_transforms(
            job.stream, data, start(), scheme, _objective(options, options.steps),
            context.loop("learn", lambda _, loss: done(f"loss {loss:.4f}")),
            lr_rotation=options.lr_rotation, lr_scale=options.lr_scale,
        )  # fmt: skip
    if result.kept:
        return transforms, free_parameters(transforms), result
    return start(), 0, result


def _tune(
    model: QuantizedModel, blocks: RoundedBlocks, job: QuantizationJob, data: CalibrationData, context: RunContext
) -> tuple[TunedBlocks, LearningResult]:
    """-> the tuned blocks, and how it went."""
    steps, options = job.tune_steps, job.options
    rates = TuningRates(factors=options.lr_tune, rounding=options.lr_rounding if job.learns_rounding else None)
    with stage("tune", steps, "steps", steps_done(CheckpointSlot(context.journal, "tune"))) as done:
        return tune(
            model, data, blocks, _objective(options, steps),
            context.loop("tune", lambda _, loss: done(f"loss {loss:.4f}")), rates,
        )  # fmt: skip


def _nearest(job: QuantizationJob, scheme: Scheme, context: RunContext, float_final: Tensor) -> dict[str, Any]:
    """Figures of rounding to nearest in the same bits, which is what the job does itself where it does no more."""
    journal = context.journal
    if job.options.rounding == "rtn" and job.options.init == "none":
        return journal.notes("rounded")
    if "nearest" not in journal:
        stream, held_out = job.stream, job.rows.held_out
        final = round_to_nearest_pass(stream, held_out, scheme, context)
        figures = quality(stream, held_out, transformed_outer(stream, None), final, float_final)
        journal.write("nearest", {}, figures.asdict())
        barrier()
    return journal.notes("nearest")


def _allocate_bits(
    job: QuantizationJob, common: RunContext, context: RunContext | None
) -> tuple[Scheme, dict[str, Any]]:
    """The job's scheme with bits of its own for every part of the model, and what of that goes into the report.

    `common`: what it shares with jobs of other targets; `context`: its own, None where no report is to be made of it.
    """
    options, calibration = job.options, job.rows.calibration
    parts, bits, about = profile_and_allocate(
        model_of_job(job), calibration, options, job.profile, job.unpredicted, job.rounder, common, context
    )
    scheme = job.scheme.with_bits({name: b for part, b in zip(parts, bits, strict=True) for name in part.linears})
    precision: dict[str, Any] = {"mean_bits": mean_bits(parts, bits)}
    if context is not None:
        precision |= {
            "target_bits": options.target_bits,
            "tokens": int(calibration[: options.profiled(job.profile)].mask.sum()),
            "profile": about,
            "parts": [part.asdict() | {"bits": b} for part, b in zip(parts, bits, strict=True)],
            "uniform": uniform(parts),
            "frontier": frontier(parts),
            "law": law_of_bits(uniform(parts)),
        }
    return scheme, precision


def _halves(job: QuantizationJob, journal: Journal, whole: QuantizationResult) -> SampleSizeEstimate:
    """The same job on each half of its calibration rows, measured on the same held-out ones."""

    def loss(rows: Corpus, name: str) -> tuple[float, float | None]:
        if f"half-{name}" not in journal:
            half = replace(job, rows=Splits(rows, job.rows.held_out))
            done = run_stages(half, Journal(journal.folder, f"{name}-"), compared=False)
            journal.write(f"half-{name}", {}, {name: done.final[name] for name in ("kl", "tell_apart")})
            barrier()
        notes = journal.notes(f"half-{name}")
        return float(notes["kl"]), notes.get("tell_apart")

    final = whole.final["kl"], whole.final["tell_apart"]
    return estimate_sample_size(job.rows.calibration, final, whole.parameters, loss)


def _save(
    folder: Path,
    out: Path,
    job: QuantizationJob,
    done: QuantizationResult,
    identity: dict[str, Any],
    gate: Gate | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """The first process writes OUT.  -> the report; to the others the figures."""
    if not is_main_process():
        return {"quality": done.final, "quality_by_stage": done.figures}
    stream, scheme, outer = job.stream, done.model.scheme, done.model.outer
    stored = None if job.stored_scheme is None else scheme
    with atomic_folder(out, bytes_in_out(stream, stored, untied=is_untied(stream, outer))) as scratch:
        shards = Shards(scratch)
        shards.add(stored_outer(stream, outer))
        with stage("save", stream.layers, "blocks") as saved:
            for i in range(stream.layers):
                shards.add(stored_block(stream, i, done.block(i), scheme))
                trim_heap()
                saved()
        shards.close()
        report = report_of(done, identity, shards.bytes, rounded=stored is not None) | more
        report["left_out"] = left_out(done.parts)
        if job.options.init != "none" and (reason := replace(job, parts=done.parts).rotation_left_out):
            report["left_out"] = {"residual_rotation": reason} | report["left_out"]
        if job.options.tuned and (reason := job.untaught):
            report["left_out"]["learning_and_tuning"] = reason
        report["untied_bytes"] = second_table(stream) if report["untied"] else 0
        if done.precision is not None:
            if limit := done.precision["profile"].get("limit"):
                limit["bits"] = bits_at(limit["curve"], done.final["kl"])
            report |= {"precision": done.precision}
            report["scheme"] += f", {done.precision['mean_bits']:.3g} bits on average"
        write_descriptions(scratch, folder, done.model, identity, report)
        if gate is not None:
            report["recovery"] = gate(scratch)
            write_described(scratch, report, read_recipe(scratch), quantized_page)
    return report


def _objective(options: Quantize, steps: int) -> Objective:
    return Objective(
        steps=steps, batch=options.batch, loss=options.loss, cross_entropy=options.cross_entropy, seed=options.seed
    )
