"""Quantize a checkpoint: fold, calibrate, learn, round, save (OSTQuant, OpenReview rAcgDBdKnP; GPTQ, arXiv:2210.17323).

The stages are those of `compressor.quantization.stages`; here is what stands around them: a model and options that are
checked first, a search for the fewest bits, and an output that is complete or absent.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib import BadInput, Damaged, Failed, Unstored
from calib.data.corpus import Corpus, describe
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal, journal_beside
from calib.jobs.options import hash_of, stream_identity
from calib.jobs.output_folder import Shards, atomic_folder, write_described
from calib.jobs.recipe import read_recipe
from calib.model.checkpoint import find_model
from calib.runtime.device import memory_budget_bytes, pick_device
from calib.runtime.distributed import barrier, is_main_process, raise_together
from calib.runtime.memory import limit_malloc_cache, trim_heap
from calib.runtime.progress import stage
from calib.stats.rate_distortion import bits_at
from compressor.engine.damage import advice_after, judge, rounding_damage
from compressor.engine.deployment import PAGE
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.exporters.export import export_into
from compressor.exporters.options import Export
from compressor.quantization.cost import Measured, measured_blocks, steps_within
from compressor.quantization.embedding.sizes import bytes_in_out
from compressor.quantization.embedding.tied_embedding import second_table
from compressor.quantization.job import STARTS, QuantizationJob, validate_quantization
from compressor.quantization.options import Quantize, rate_of, seconds_of
from compressor.quantization.precision.importance import write_importance
from compressor.quantization.quantized_model import QuantizationResult, Splits
from compressor.quantization.repeated.cheapest_bits import Candidate, bit_targets, cheapest_bits
from compressor.quantization.repeated.sample_size import SampleSizeEstimate, estimate_sample_size
from compressor.quantization.stages import run_float_model, run_stages
from compressor.quantization.write import (
    is_untied,
    report_of,
    stored_block,
    stored_outer,
    write_descriptions,
)
from compressor.report.quantization import quantized_page
from compressor.transforms.proof import left_out

OWN_FORMAT = "quantized"  # folder of what is exported, while OUT is written


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

    Transforms that leave the model's function alone are folded into the weights where activations are quantized and,
    with `options.learn`, learned (OSTQuant, OpenReview rAcgDBdKnP); codes are chosen by GPTQ (arXiv:2210.17323); blocks
    are tuned on their own outputs, then scales and norm gains on the model's. One block is in memory at a time.

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
        The report, as in report.json: figures before and after by stage, errors of every layer, sizes in bytes. With
        `options.format` report.json may be that of an export, which is "export" here and has this one as "source".

    Raises:
        BadInput: model, data, options or output will not do; nothing was written.
        Damaged: on the held-out rows fewer than half of the most likely tokens agree with the original's, or the KL is
            above what rounding to nearest costs. The journal stays, so that `allow_damage` costs nothing more.
        Unstored: the format cannot hold what came of it, such as scales beyond half precision; the journal stays.
        Failed, NoSpace: the job cannot go on; the journal stays.
    """
    options, out, began = options or Quantize(), Path(out), time.monotonic()
    with raise_together():
        limit_malloc_cache(memory_budget_bytes(options.memory_budget, pick_device(options.device)))
        folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
        if gate is None and not allow_recovery:
            check_unforgetting(folder)
        job = validate_quantization(folder, out, options)
        identity = _identity(job, model, folder)
    with journal_beside(out, identity, resume) as journal:
        job, found, tried = _settled(job, journal, began)
        identity |= {"options": identity["options"] | found}
        if options.tell_apart is None:
            done = run_stages(job, journal)
        else:
            job, done, tried["tell_apart"] = _in_cheapest_bits(job, journal)
        more = tried | {"damage": _judged(options, done, allow=allow_damage)} | _beside_figures(job, journal, done)
        report = _save(folder, out, job, done, identity, gate, more, allow_damage=allow_damage)
        if options.imatrix_out is not None and is_main_process():
            write_importance(options.imatrix_out, job.stream, job.rows.calibration, journal)
        return report


def _identity(job: QuantizationJob, model: str | Path, folder: Path) -> dict[str, Any]:
    """Describe a job for its recipe and its journal."""
    # Codes are the same in every format, so that a run that was interrupted may go on to another.
    identity = stream_identity(replace(job.options, format=None), model, folder, job.stream)
    identity["options"] |= job.resolved
    identity["data"] = {name: describe(rows) for name, rows in vars(job.rows).items() if rows is not None}
    if job.options.imatrix is not None:
        identity["imatrix"] = hash_of([job.options.imatrix])
    return identity


def _settled(
    job: QuantizationJob, journal: Journal, began: float
) -> tuple[QuantizationJob, dict[str, Any], dict[str, Any]]:
    """Find what a job leaves open: where it begins, and how many steps it has time for since it `began`.

    -> the job with both, the options that they are, and what the report says of it.  Raises BadInput.
    """
    budget, found, tried = job.options.budget, dict[str, Any](), dict[str, Any]()
    measured = None

    def left() -> float:
        return seconds_of(budget or "") - (time.monotonic() - began)

    if budget is not None and "budget" not in journal:
        with raise_together():
            measured = measured_blocks(job, journal.folder)
            steps_within(job, job.options, measured, left())  # refuses too short a time before anything is tried
    if job.tries_starts:
        job, tried["starts"] = _from_better_start(job, journal)
        found["init"] = job.options.rotations
    if budget is not None:
        job, steps = _in_time(job, journal, measured, left())
        tried["budget"] = {"asked": budget, **steps}
        found |= {"budget": None, **steps}
    return job, found, tried


def _from_better_start(job: QuantizationJob, journal: Journal) -> tuple[QuantizationJob, dict[str, float]]:
    """The job from the start that is better in a trial, and the KL of each; the same when it is resumed."""
    found = dict[str, float]()
    for init in STARTS:
        page, pages = f"start-{init}", Journal(journal.folder, f"start-{init}-")
        if page not in journal:
            final = run_stages(job.trial(init), pages, compared=False).final
            journal.write(page, {}, {"kl": final["kl"]})
            barrier()
        pages.drop()  # after what came of them is kept, so that a job that is killed here has lost nothing
        found[init] = float(journal.notes(page)["kl"])
    return replace(job, options=replace(job.options, init=min(found, key=found.__getitem__))), found


def _in_time(
    job: QuantizationJob, journal: Journal, measured: Measured | None, seconds: float
) -> tuple[QuantizationJob, dict[str, int]]:
    """The job with as many steps of tuning as there is time for, and their numbers by option; `measured` is None where
    the journal has them from before it was interrupted.  Raises BadInput where there is no time for one."""
    if measured is not None:
        with raise_together():
            steps = steps_within(job, job.options, measured, seconds)
        journal.write("budget", {}, {"tune_steps": steps})
        barrier()
    job = replace(job, options=job.options.within_budget(journal.notes("budget")["tune_steps"]))
    return job, {"block_steps": job.options.block_tuned, "tune_steps": job.options.tuned}


def _judged(options: Quantize, done: QuantizationResult, *, allow: bool) -> dict[str, Any]:
    """What the report says of damage.  Raises Damaged where there is some and it is not allowed."""
    nearest = done.figures.get("nearest")
    instead = advice_after(
        options.scheme, options.rotations, options.rounding, nearest, target=options.target_bits,
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
    run_float_model(job, RunContext(journal, job.budget))  # once, with what learning wants of it
    learns = job.learns or job.tune_steps > 0 or job.block_tuning is not None
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

    targets = bit_targets(job.options.code_widths())
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
    *,
    allow_damage: bool,
) -> dict[str, Any]:
    """The first process writes OUT.  -> the report; to the others the figures.

    Another format than the scheme's own is made of what is written in that, which is gone before OUT is there.
    """
    if not is_main_process():
        return {"quality": done.final, "quality_by_stage": done.figures}
    stored = None if job.stored_scheme is None else done.model.scheme
    size = bytes_in_out(job.stream, stored, untied=is_untied(job.stream, done.model.outer))
    with atomic_folder(out, size + job.exported_bytes(folder)) as scratch:
        if not job.exports:
            return _write(scratch, folder, job, done, identity, gate, more)
        own = scratch / OWN_FORMAT / out.resolve().name  # by which the recipe calls it
        own.mkdir(parents=True)
        report = _write(own, folder, job, done, identity, gate, more)
        exported = _exported(scratch, own, out, job, allow_damage=allow_damage)
        shutil.rmtree(own.parent)
    found = {name: value for name, value in exported.items() if name != "source"}  # which is `report`
    sizes = {"before": report["bytes"]["before"], "after": found["bytes"]["after"]}
    kept = {name: value for name, value in report.items() if name not in ("parts", "choices")}  # of the other format
    return kept | {"bytes": sizes, "loaders": found["loaders"], "export": found}


def _exported(scratch: Path, own: Path, out: Path, job: QuantizationJob, *, allow_damage: bool) -> dict[str, Any]:
    """Write a folder of the scheme's own format in the one that the options ask for.  -> its report.  Raises Unstored
    where that cannot hold what came of it."""
    to = str(job.options.format)
    try:
        return export_into(scratch, own, Export(to=to), given=out, allow_damage=allow_damage)
    except Damaged:
        raise
    except (BadInput, Failed) as reason:
        why = str(reason).partition("; ")[0].removeprefix(f"to {to}: ")
        raise Unstored(f"format {to}: {why}; the codes are kept: take another --format, or none, with") from reason


def _write(
    scratch: Path,
    folder: Path,
    job: QuantizationJob,
    done: QuantizationResult,
    identity: dict[str, Any],
    gate: Gate | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write a directory in the scheme's own format.  -> the report."""
    stream, scheme = job.stream, done.model.scheme
    untied = is_untied(stream, done.model.outer)
    stored = None if job.stored_scheme is None else scheme
    shards = Shards(scratch)
    shards.add(stored_outer(done.model))
    with stage("save", stream.layers, "blocks") as saved:
        for i in range(stream.layers):
            shards.add(stored_block(stream, i, done.block(i), scheme))
            trim_heap()
            saved()
    shards.close()
    report = report_of(done, identity, shards.bytes, rounded=stored is not None) | more
    report["left_out"] = left_out(done.parts)
    if job.options.rotations != "none" and (reason := replace(job, parts=done.parts).rotation_left_out):
        report["left_out"] = {"residual_rotation": reason} | report["left_out"]
    if reason := job.untaught:
        report["left_out"]["learning_and_tuning"] = reason
    report["untied_bytes"] = second_table(stream, scheme) if untied else 0
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
