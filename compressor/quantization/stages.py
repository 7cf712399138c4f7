"""The stages of a quantization, each resumed from the journal: the float model, learning, rounding, tuning.

Walks over the blocks, one in memory at a time. The first runs the float model: statistics before, the teacher's top-k,
the float model's own answers on held-out rows. Learning walks to and fro. Then blocks are transformed and rounded, each
fed by the already rounded blocks before it, and tuned to and fro again. Every stage goes into a journal as it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal
from calib.jobs.training_loop import steps_done
from calib.quant.scheme import Scheme
from calib.runtime.distributed import barrier
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from compressor.engine.blockwise_runs import run_blocks
from compressor.engine.deployment import compare_texts
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.calibrate import (
    calibration_pass,
    quality,
    quantization_pass,
    round_to_nearest_pass,
    rounded_linears,
    transformed_outer,
)
from compressor.quantization.embedding.tables import (
    TABLES_STAGE,
    rounded_to_nearest,
    with_rounded_embedding,
    with_table,
    write_table,
)
from compressor.quantization.job import QuantizationJob
from compressor.quantization.learn_transforms import Transforms, free_parameters, learn_transforms
from compressor.quantization.objective import CalibrationData, LearningResult, Objective
from compressor.quantization.options import UNROUNDED, Quantize
from compressor.quantization.precision.mixed_precision import (
    frontier,
    law_of_bits,
    mean_bits,
    uniform,
)
from compressor.quantization.precision.sensitivity import profile_and_allocate
from compressor.quantization.quantized_model import Profile, QuantizationResult, QuantizedModel
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks
from compressor.quantization.tuning.tune import TunedBlocks, TuningRates, tune
from compressor.transforms.proof import Proof


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
    job, before, float_final = run_float_model(job, common)
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
    blocks, model = RoundedBlocks(journal, scheme, stream), with_rounded_embedding(model, context)
    if "rounded" in journal:
        model = _with_rounded_head(model, None, job, context)
    else:
        final, inputs = quantization_pass(model, rows, blocks, job.rounder, context, job.block_tuning)
        model = _with_rounded_head(model, inputs, job, context)
        found = quality(stream, rows.held_out, model.outer, final, float_final, exact=model.is_exact_outside)
        journal.write("rounded", {}, found.asdict())
        barrier()
    if scheme.has_fixed_inputs or scheme.has_fixed_keys:
        model = replace(model, online=[blocks.read(i).served(online) for i, online in enumerate(model.online)])
    figures = {"rounded": journal.notes("rounded")}
    if compared and options.rounding != UNROUNDED:
        figures = {"nearest": _nearest(job, model, context, float_final)} | figures
    block: Callable[[int], RoundedBlock] = blocks.read
    if tune_steps:
        tuned, learning["tune"] = _tune(model, blocks, job, data, context)
        if learning["tune"].kept:
            parameters, block = parameters + tuned.parameters, tuned.read
            reading = lambda order: ((i, block(i).params(stream.linears(i), stream.dtype)) for i in order)  # noqa: E731
            final = run_blocks(stream, rows.held_out, model.outer, reading, model.online, context)
            exact = model.is_exact_outside
            figures["tuned"] = quality(stream, rows.held_out, model.outer, final, float_final, exact=exact).asdict()
    after = [blocks.notes(i) for i in range(stream.layers)]
    errors = {page: float(journal.notes(page)["error"]) for page in ("embedding", "head") if page in journal}
    return QuantizationResult(model, job.parts, precision, block, before, after, figures, learning, parameters, errors)


def run_float_model(job: QuantizationJob, context: RunContext) -> tuple[QuantizationJob, list[Profile], Tensor]:
    """Run the float model.  -> the job with what its real weights admit, a profile of every block where transforms will
    change it, and this process's held-out rows at the end."""
    k = job.options.top_k if job.learns or job.tune_steps else 0
    proof = None if job.options.rotations == "none" else Proof(job.stream, job.parts)
    squares = job.options.imatrix_out is not None
    before, final = calibration_pass(
        job.stream, job.rows, k, context, proof, profiled=proof is not None, squares=squares
    )
    return job if proof is None else replace(job, parts=proof.admitted(context.journal)), before, final


def _model(job: QuantizationJob, scheme: Scheme, transforms: Transforms | None) -> QuantizedModel:
    """With `transforms`, or none."""
    plain = [RuntimeTransforms(scheme.activations, scheme.kv)] * job.stream.layers
    online = plain if transforms is None else transforms.online
    return QuantizedModel(job.stream, scheme, transformed_outer(job.stream, transforms), transforms, online)


def _with_rounded_head(
    model: QuantizedModel, inputs: Moments | None, job: QuantizationJob, context: RunContext
) -> QuantizedModel:
    """A copy whose head is rounded, where the scheme rounds it: on moments of its `inputs`; None: as the journal has
    it."""
    if model.scheme.head is None:
        return model
    name, grid = model.scheme.head
    with stage(TABLES_STAGE, 1, "tables") as done:
        if inputs is not None:
            stream, rounder = model.stream, replace(job.rounder, offsets=False, float_target=False)
            weight = {name: model.outer[stream.head[0]].to(stream.dtype)}
            stored = stream.entry(stream.embedding[0]).dtype
            table, error = rounded_linears(weight, inputs, {name: grid}, rounder, stored)[name]
            write_table(context.journal, "head", table, error)
        done(again=inputs is None)
    return with_table(model, context.journal, "head", name)


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


def _nearest(job: QuantizationJob, model: QuantizedModel, context: RunContext, float_final: Tensor) -> dict[str, Any]:
    """Figures of rounding to nearest in the same bits, which is what the job does itself where it does no more."""
    journal = context.journal
    as_it_is = job.options.rotations == "none" and job.block_tuning is None and not job.importance
    if job.options.rounding == "rtn" and as_it_is:
        return journal.notes("rounded")
    if "nearest" not in journal:
        stream, held_out, exact = job.stream, job.rows.held_out, model.is_exact_outside
        outer = model.outer if exact else rounded_to_nearest(stream, transformed_outer(stream, None), model.scheme)
        final = round_to_nearest_pass(stream, held_out, outer, model.scheme, context)
        figures = quality(stream, held_out, outer, final, float_final, exact=exact)
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
    allocated = list(zip(parts, bits, strict=True))
    scheme = job.scheme.with_bits({name: part.types.get(b, b) for part, b in allocated for name in part.linears})
    precision: dict[str, Any] = {"mean_bits": mean_bits(parts, bits)}
    if context is not None:
        precision |= {
            "target_bits": options.target_bits,
            "tokens": int(calibration[: options.profiled(job.profile)].mask.sum()),
            "profile": about,
            "parts": [part.as_allocated(b) for part, b in allocated],
            "uniform": uniform(parts),
            "frontier": frontier(parts),
            "law": law_of_bits(uniform(parts)),
        }
    return scheme, precision


def _objective(options: Quantize, steps: int) -> Objective:
    return Objective(
        steps=steps, batch=options.batch, loss=options.loss, cross_entropy=options.cross_entropy, seed=options.seed
    )
