"""What an unlearning will cost, before it runs: rows that pass through models, counted, times what one costs here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from calib.jobs.cost import OF_STEP, OF_TENSOR, PresetCost, Saving, StageCost, costliest, fewer, savings
from calib.jobs.journal import Journal
from calib.model.companions import companions
from calib.model.weights import Weights
from calib.runtime.device import peak_memory
from calib.runtime.progress import recording, stage
from unlearn.methods.dispatch import method_of
from unlearn.methods.learning_rate import TRIAL_STEPS, rates_for
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import TrainableModel
from unlearn.model.training_recipe import Training
from unlearn.options.unlearning import UNLEARN_PRESETS, Unlearn
from unlearn.validate import UnlearningRequest, validate

FEW, EPOCHS = 32, 2  # rows, and how often they are trained on, by which it is seen what one costs
DESCRIBED, CURVES = 22_000, 2  # bytes of the report, its page and the recipe; curves of a job's steps
AUDIT, OF_MODEL = 10_000, 400  # bytes of an audit in them, and of each of its models


@dataclass(frozen=True)
class UnlearningCost:
    """Estimated cost of a job: models to train, rows (of language models tokens) that pass through in training them and
    in moving the model, seconds, peak memory of the whole process, bytes of the output's weights and of all its files.
    `stages` are all that was counted; `costliest` names the two that take longest; `savings` of a job of more than an
    hour what makes it shorter; `presets` are what the job would take by each."""

    trainings: int
    tokens: int
    seconds: float
    peak_bytes: int
    out_bytes: int
    folder_bytes: int
    stages: list[StageCost]
    costliest: list[str]
    savings: list[Saving]
    presets: dict[str, PresetCost] = field(default_factory=dict)


def estimate_unlearning(
    model: str | Path, out: str | Path, options: Unlearn, presets: Mapping[str, Unlearn] | None = None
) -> UnlearningCost:
    """Estimate an unlearning's time and memory from a few rows; nothing is written.  Raises BadInput like `unlearn`.

    `presets`: the same job by each, to be compared.
    """
    job = validate(model, Path(out), options)
    options = job.options
    work = job.work(options, Journal(Path(out)))
    rows, trainings = work.rows, trainings_of(job, options)
    some = rows[torch.arange(min(len(rows), FEW))]
    models = job.trainable.many([job.trainable.state] * min(trainings or 1, 100 if job.trainable.stackable else 1))
    models = replace(models, learning=None)  # which a job that trains nothing need not have
    masks = torch.ones(len(models), len(some), dtype=torch.bool)
    short = Training(epochs=EPOCHS, batch=max(1, len(some) // 2), lr=1e-6)
    with recording() as log, stage("measure", EPOCHS, "epochs") as done:
        train_ensemble(models, some, masks, range(len(models)), short, done=done)
    each = sum(log["measure"]) / (EPOCHS * len(some) * len(models))  # a row through one model and back
    passes = passes_of(job, options)
    del models
    method = method_of(options)
    if len(work.forgotten):
        method.try_out(work)
    gradients = method.stored(job.trainable, len(rows), options) // 2 if "gradients" in passes else 0
    held = peak_memory(job.trainable.device) + gradients
    stages = [StageCost(name, count * each) for name, count in passes.items() if count]
    weights = weights_of(job.trainable)
    compared = {
        name: PresetCost(
            each * sum(passes_of(job, one).values()), held, weights + _bytes_beside_weights(replace(job, options=one))
        )
        for name, one in _chosen_for(job, presets or {}).items()
    }
    return UnlearningCost(
        trainings, sum(passes.values()) * rows.labels[0].numel(), sum(part.seconds for part in stages), held,
        weights, weights + _bytes_beside_weights(job), stages, costliest({part.name: part.seconds for part in stages}),
        shorter_unlearnings(job, each), compared,
    )  # fmt: skip


def _chosen_for(job: UnlearningRequest, presets: Mapping[str, Unlearn]) -> dict[str, Unlearn]:
    """Presets as they are run: with what validating the job has filled in."""
    names = {option for preset in UNLEARN_PRESETS.values() for option in preset.values}
    return {
        preset: replace(job.options, **{name: getattr(options, name) for name in names})
        for preset, options in presets.items()
    }


def passes_of(job: UnlearningRequest, options: Unlearn) -> dict[str, int]:
    """Rows that pass through a model, and back, in each stage of the job with these `options`; in search of a rate
    at most."""
    rows, epochs = len(job.left), 0 if job.training is None else job.training.epochs
    moved = (1 + options.audit) * (options.epochs if options.entry.by_steps else 0) * _in_an_epoch(job, options)
    rates = rates_for(normed=job.trainable.learning is not None, matched=options.entry.targets)
    searched = len(rates) * min(
        TRIAL_STEPS * options.batch * (1 + options.retain_multiplier), moved / (1 + options.audit)
    )
    return {
        "train models": trainings_of(job, options) * epochs * rows,
        **method_of(options).passes(options, rows),
        "search a rate": round(searched) if options.lr is None and moved else 0,
        "unlearn": moved,
    }


def _in_an_epoch(job: UnlearningRequest, options: Unlearn) -> int:
    return round(len(job.forgotten) * (options.forget_multiplier + options.entry.in_pairs + options.retain_multiplier))


def trainings_of(job: UnlearningRequest, options: Unlearn) -> int:
    """Models that are trained."""
    return method_of(options).trainings(options, job.trainable.stackable) + 3 * options.audit


def shorter_unlearnings(job: UnlearningRequest, each: float) -> list[Saving]:
    """Suggest what makes a job of more than an hour shorter, the least harmful first; a row takes `each` seconds."""

    def seconds(options: Unlearn) -> float:
        return each * sum(passes_of(job, options).values())

    options = job.options
    return savings(
        options,
        [
            fewer(options, "audit", options.audit, 2, seconds),
            {"audit": 0},
            fewer(options, "oracles", options.oracles, 1, seconds),
            fewer(options, "subsets", options.subsets, 50, seconds),
            fewer(options, "calibrate", options.calibrate, 2, seconds),
            fewer(options, "epochs", options.epochs, 2, seconds),
            {"retain_multiplier": min(1.0, options.retain_multiplier)},
        ],
        seconds,
    )


def weights_of(trainable: TrainableModel) -> int:
    """Bytes of the weights as they are written: every float as the first of the model's file is, or of a factory's
    model as each was."""
    if trainable.factory:
        return sum(p.numel() * p.element_size() for p in trainable.module.state_dict().values())
    entries = Weights(trainable.folder).entries.values()
    floats = [entry for entry in entries if entry.dtype.is_floating_point]
    counts = sum(entry.bytes // entry.dtype.itemsize for entry in floats)
    others = sum(entry.bytes for entry in entries if not entry.dtype.is_floating_point)
    return others + (counts * floats[0].dtype.itemsize if floats else 0)


def _bytes_beside_weights(job: UnlearningRequest) -> int:
    """About what OUT holds beside its weights: files of the model that go with it, config, recipe and report."""
    options, trainable = job.options, job.trainable
    files, names = list[Path](), list(trainable.module.state_dict())
    if trainable.folder.is_dir() and not trainable.factory:
        files = [trainable.folder / "config.json", *(trainable.folder / file for file in companions(trainable.folder))]
    at_once = _in_an_epoch(job, options) if options.entry.targets else len(job.forgotten)  # others' rows come beside
    steps = options.entry.by_steps * options.epochs * math.ceil(at_once / options.batch)
    described = DESCRIBED + CURVES * OF_STEP * steps + (AUDIT + OF_MODEL * options.audit if options.audit else 0)
    return sum(file.stat().st_size for file in files) + sum(len(name) + OF_TENSOR for name in names) + described
