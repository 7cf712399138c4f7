"""Store a model in the format of another runtime: what `quantize` wrote, codes and scales kept where the format can say
them, or a float model of a known architecture."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch

from calib import BadInput, Failed
from calib.data.corpus import Corpus, describe
from calib.data.load import embedded_corpus, load_corpus
from calib.data.rows import row_length
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import REPORT, atomic_folder, check_destination, write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.companions import copy_companions, is_companion
from calib.model.config import RECIPE, read_json
from calib.model.task import WRITERS, Task, task_of_checkpoint
from calib.runtime.memory import available_memory
from calib.stats.perplexity import compare
from compressor.engine.damage import export_damage, judge
from compressor.engine.evaluate import logits_function, vocabulary
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.engine.load import QuantizedCheckpoint, open_checkpoint
from compressor.exporters import runtimes
from compressor.exporters.format import ExportJob, Format, refuse_online
from compressor.exporters.options import Export, FormatEntry
from compressor.report.export import exported_page

BUDGET = 2**31  # bytes of hidden states in RAM
EXPORT_COPIES = 2  # of its weights that a runtime may hold while it starts


def export(
    out: str | Path,
    dst: str | Path,
    options: Export | None = None,
    *,
    gate: Gate | None = None,
    allow_recovery: bool = False,
    allow_damage: bool = False,
) -> dict[str, Any]:
    """Write a model in the format of another runtime, and run it there where that runtime is installed.

    Args:
        out: an output of parewell's or a float model of a known architecture: a directory or a name on the hub.
        dst: the directory to write; complete or absent.
        options: the format, and the rows on which the result is compared with `out`; default: `Export()`.
        gate: as for `quantize`, for a format that rounds, where the model was made to forget.
        allow_recovery: write such a format without a gate.
        allow_damage: write it even if it answers otherwise than `out`; the report says so.

    Returns:
        The report, as in report.json: sizes, what can load the result, and figures from its runtime; under "source"
        the report of the job that wrote `out`.

    Raises:
        BadInput: the format cannot say what the model does, or the destination will not do; nothing was written.
        Damaged: what was written answers otherwise than `out`; nothing is left.
    """
    options, dst = options or Export(), Path(dst)
    folder = find_model(out, base_model=options.base_model, dequantize=options.dequantize)
    job = validate_export(folder, dst, options)
    form, corpus = format_of(options), _held_out(job, options)
    scheme = form.read_here(job)
    if options.entry.rounds and not allow_recovery and (gate is None or scheme is None):
        check_unforgetting(folder, measured=scheme is not None)
    with atomic_folder(dst, job.expected_bytes(form)) as scratch:
        return _write(scratch, job, out, options, corpus, gate=gate, allow_damage=allow_damage)


def export_into(
    scratch: Path, folder: Path, options: Export, *, given: str | Path, allow_damage: bool = False
) -> dict[str, Any]:
    """Write a model into an existing directory, as a part of a job that writes that.

    Args:
        scratch: an empty directory, but for what the job removes.
        folder: an output of `quantize`.
        options: as for `export`.
        given: how the recipe calls the folder.
        allow_damage: as for `export`.

    Returns:
        The report, as in report.json.

    Raises:
        BadInput, Failed, Damaged: as `export`.
    """
    job = open_export(folder, options)
    return _write(scratch, job, given, options, _held_out(job, options), allow_damage=allow_damage)


def _write(
    scratch: Path, job: ExportJob, given: str | Path, options: Export, corpus: Corpus | str, *,
    gate: Gate | None = None, allow_damage: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write a checked job's result and what describes it.  -> the report."""
    form, steps = format_of(options), past_of(job.folder)
    scheme = form.read_here(job)
    step, data = _step(given, job, corpus, options)
    if scheme is not None:
        step |= {"scheme": scheme, "hadamard_down": False}  # for our own loader
    copy_companions(job.folder, scratch)
    form.write(scratch, job)
    before = sum(entry.bytes for entry in job.checkpoint.stream.weights.entries.values())
    after = sum(file.stat().st_size for file in _model_files(scratch))
    figures = {"bytes": after, "bits_per_weight": job.bits_per_weight(form)}
    write_json(scratch / RECIPE, {"recipe": [*steps, step | {"quality": figures}]})  # which our loader reads
    ran = _run(scratch, job, corpus, allow_damage=allow_damage)
    if gate is not None and scheme is not None:
        ran["recovery"] = gate(scratch)
    elif gate is not None:
        job.notes.append("not measured whether forgotten knowledge is recovered, as parewell cannot read this")
    report = {
        "job": "export",
        "to": options.to,
        "bytes": {"before": before, "after": after},
        "bits_per_weight": figures["bits_per_weight"],
        "loaders": _loaders(job, scheme),
        "data": data,
    } | ran
    if steps and (job.folder / REPORT).is_file():  # of the job before, whose figures by layer would be lost
        report["source"] = {name: of for name, of in read_json(job.folder / REPORT).items() if name != "source"}
    step["quality"] = figures | ran.get("quality", {})
    write_described(scratch, report, [*steps, step], exported_page)
    return report


def format_of(options: Export) -> Format:
    """Look up the format that the options name."""
    return cast(Format, import_module(f"compressor.exporters.{options.entry.module}").ENTRIES[options.to])


def _loaders(job: ExportJob, scheme: str | None) -> dict[str, Any]:
    """What loads the result, notes, and the library's class that it is opened with."""
    found = task_of_checkpoint(str(job.config.get("model_type")), job.config.get("architectures")) or Task.CAUSAL_LM
    loaders = job.loaders + (["parewell.load"] if scheme else [])
    return {"loaders": loaders, "notes": job.notes, "class": found.value}


def _step(
    out: str | Path, job: ExportJob, corpus: Corpus | str, options: Export
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the recipe records of the job, before its figures; and of the rows that it was run on."""
    stream = job.checkpoint.stream
    sha256 = stream.verify() if job.checkpoint.scheme is None else hash_of(job.folder.glob("*.safetensors"))
    data = {} if isinstance(corpus, str) else {"held_out": describe(corpus)}
    identity = identity_of(options, folder_identity(out, job.folder, sha256), stream.device, None)
    return {"job": "export", **identity, "data": data}, data


def _model_files(scratch: Path) -> list[Path]:
    """Every file of a folder that holds weights or a graph, whatever its writer has called it."""
    return [
        file for file in scratch.iterdir()
        if file.is_file() and file.suffix not in (".json", ".md") and not is_companion(Path(file.name))
    ]  # fmt: skip


def _held_out(job: ExportJob, options: Export) -> Corpus | str:
    """Rows to run, or why there are none: only rows that are asked for by --data must be there."""
    if not options.held_out:
        return "held-out is 0"
    folder, config = job.folder, job.checkpoint.stream.config
    positions = getattr(config, "max_position_embeddings", None)  # also where a type calls them otherwise
    length = row_length(options.length, positions if isinstance(positions, int) else None)
    if length < 2:
        return f"the model has positions for {length} token"
    if options.data is not None:
        rows = load_corpus(
            Path(options.data), read_tokenizer(folder), vocab=vocabulary(folder), length=length, rows=options.held_out
        )
        return rows[: options.held_out]
    try:
        rows = embedded_corpus("held-out", folder, read_tokenizer(folder), vocab=vocabulary(folder), length=length)
    except BadInput as reason:
        return str(reason)
    return rows[: options.held_out]


def _run(scratch: Path, job: ExportJob, corpus: Corpus | str, *, allow_damage: bool) -> dict[str, Any]:
    """How well what was written predicts, and how far it is from what it was made of: figures and what ran it, or why
    nothing did.  Raises Failed where its answers are no numbers, and Damaged where they are others."""
    if isinstance(corpus, str):
        return {"not_run": corpus}
    options = Export(to=job.to)
    vocab, form = job.checkpoint.stream.vocab, format_of(options)
    reference = logits_function(job.checkpoint, corpus, BUDGET)
    try:
        if form.runs_here:
            name, logits = "parewell", logits_function(open_checkpoint(scratch, torch.device("cpu")), corpus, BUDGET)
        else:
            if (size := EXPORT_COPIES * form.in_memory(job, form)) > available_memory():
                raise runtimes.NotRun(
                    f"it would take {size / 1e9:.2f} GB of memory; {available_memory() / 1e9:.2f} are free"
                )
            runtime = runtimes.start(scratch, form.runner)
            name, logits = runtime.name, runtime.logits(corpus, vocab)
        quality = compare(corpus, vocab, logits, reference).asdict()
    except runtimes.NotRun as reason:
        return {"not_run": str(reason)}
    if any(isinstance(value, float) and not isfinite(value) for value in quality.values()):
        raise Failed(f"to {job.to}: answers of {name} are no numbers; take another --dtype, or parewell evaluate OUT")
    found = export_damage(quality, rounds=options.entry.rounds)
    damage = judge(f"to {job.to}", found, allow=allow_damage, instead="try another --to or --dtype")
    return {"runtime": name, "quality": quality, "damage": damage}


def validate_export(folder: Path, dst: Path, options: Export) -> ExportJob:
    """The model, opened, with what it is to become, where the destination will do as well.  Raises BadInput."""
    job = open_export(folder, options)
    check_destination(dst, [folder], job.expected_bytes(format_of(options)))
    return job


def open_export(folder: Path, options: Export) -> ExportJob:
    """Open the model, and check that the format can say it.  Raises BadInput."""
    check_packages(options.entry)
    return check_export(folder, open_checkpoint(folder, torch.device("cpu"), tasks=WRITERS), options)


def check_packages(entry: FormatEntry) -> None:
    """Raises BadInput where a package is not installed that a format is written with."""
    for package in entry.packages:
        if find_spec(package) is None:
            raise BadInput(f"{package}: is not installed; pip install 'parewell[{entry.extra}]'")


def check_export(folder: Path, checkpoint: QuantizedCheckpoint, options: Export) -> ExportJob:
    """Check that a format can say what a model does: one that is opened, or one that is to be quantized, by its scheme.

    Raises BadInput.
    """
    form = format_of(options)
    dtype = getattr(torch, options.dtype) if options.dtype else form.dtype(checkpoint)
    job = ExportJob(folder, checkpoint, dtype, options.to, list(options.entry.loaders))
    if not form.rounds_inputs:
        refuse_online(job)
    form.check(job)
    return job
