"""What a distillation will cost, before it runs: the job itself with two steps, into a folder that goes again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.jobs.cost import OF_STEP, PresetCost, Saving, StageCost, costliest, fewer, savings
from calib.jobs.journal import Journal
from calib.model.checkpoint import find_model
from calib.runtime.device import memory_budget_bytes, peak_memory, pick_device
from calib.runtime.memory import limit_malloc_cache
from calib.runtime.progress import Log, recording
from compressor.distillation.classifiers.classification import open_models
from compressor.distillation.classifiers.classification import run_classifier_distillation as run_texts
from compressor.distillation.classifiers.classification import validate_classifier_distillation as checked_texts
from compressor.distillation.distill import SELECTION_ROWS, check_installed, run_distillation, validate_distillation
from compressor.distillation.options import TASKS_OF_TEXT, Distill
from compressor.distillation.search.learning_rate import trial_steps
from compressor.distillation.task_distillation import run_task_distillation, validate_task_distillation
from compressor.distillation.teacher_answers import WALK

CHECKED = "check weights"  # a stage
TRIALS = 4  # of rates, as a search has them that ends near where it begins
TIMED_STEPS = 2  # the second has the optimizer's moments beside everything else


@dataclass(frozen=True)
class DistillationCost:
    """Seconds in all and of each step; the most memory that the whole process holds, OUT's weights and all of OUT's
    files, in bytes.  `stages` are all of the job; `costliest` names the two that take longest; `savings` of a job of
    more than an hour what makes it shorter; `presets` are what the job would take by each."""

    seconds: float
    step_seconds: float
    peak_bytes: int
    out_bytes: int
    folder_bytes: int
    stages: list[StageCost]
    costliest: list[str]
    savings: list[Saving]
    presets: dict[str, PresetCost] = field(default_factory=dict)


def estimate_distillation(
    teacher: str | Path, out: str | Path, options: Distill, presets: Mapping[str, Distill] | None = None
) -> DistillationCost:
    """Estimate a distillation's time, memory and bytes: everything that `distill` checks is checked, two steps are
    taken, and nothing is left behind.  `presets`, which differ in their steps alone, are compared.  Raises BadInput."""
    limit_malloc_cache(memory_budget_bytes(options.memory_budget, pick_device(options.device)))
    check_installed(options)
    if options.factory is None:
        find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)
    some = replace(options, steps=min(TIMED_STEPS, options.steps), cache=None, teacher_rows=min(options.written, 1))
    with tempfile.TemporaryDirectory(prefix="parewell-") as place, recording() as log:
        made, journal = Path(place) / "out", Journal(Path(place) / "journal")
        journal.folder.mkdir()
        report, began, rows, few = _tried(teacher, Path(out), made, (options, some), journal)
        whole = time.perf_counter() - began
        held = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    log["everything else"] = [max(0.0, whole - sum(sum(units) for name, units in log.items() if name != CHECKED))]
    shown = partial(_stages, {name: units for name, units in log.items() if units}, rows, few)

    def seconds(options: Distill) -> float:
        return sum(shown(options).values())

    shorter = [
        fewer(options, "steps", options.steps, 10, seconds),
        fewer(options, "teacher_rows", options.written, 1, seconds),
    ]
    if options.teacher in ("top-k", "drawn"):
        shorter.insert(1, fewer(options, "samples", rows, 4 * options.batch, seconds))
    peak = peak_memory(pick_device(options.device))

    def folder_bytes(options: Distill) -> int:
        return int(held + len(report["curves"]) * (options.steps - some.steps) * OF_STEP)

    return DistillationCost(
        seconds(options),
        log["distil"][-1],
        peak,
        int(report["bytes"]["after"]),
        folder_bytes(options),
        [StageCost(name, each) for name, each in shown(options).items()],
        costliest(shown(options)),
        savings(options, shorter, seconds),
        {name: PresetCost(seconds(one), peak, folder_bytes(one)) for name, one in (presets or {}).items()},
    )


def _tried(
    teacher: str | Path, out: Path, made: Path, of: tuple[Distill, Distill], journal: Journal
) -> tuple[dict[str, Any], float, int, int]:
    """Check a job, whose options come first in `of`, and run it with the second ones into `made`.  -> its report, when
    it began, and how many rows the teacher answers before the student learns: of the job, and here."""
    options, some = of
    if options.classifies:
        checked = checked_texts(teacher, out, options)
        began = time.perf_counter()
        models = open_models(checked, made, options)
        return run_texts(checked, *models, made, some, journal, allow_damage=True), began, 1, 1
    if options.task in TASKS_OF_TEXT:
        task_job = validate_task_distillation(teacher, out, options)
        began = time.perf_counter()
        return run_task_distillation(task_job, made, some, journal, allow_damage=True), began, 1, 1
    job = validate_distillation(teacher, out, options)
    few = max(2 * options.batch, SELECTION_ROWS)
    rows = len(job.train.ids)
    if options.teacher != "online":
        job = replace(job, train=job.train[:few], targets=job.targets[:few])
    few = len(job.train.ids) + some.written
    began = time.perf_counter()
    return run_distillation(job, made, some, journal, None, allow_damage=True), began, rows, few


def _stages(log: Log, rows: int, few: int, options: Distill) -> dict[str, float]:
    """Seconds of each stage of a job, from those of two steps with `few` of its `rows` rows and, where the teacher
    writes any, one of these."""
    answered = (min(options.samples or rows, rows) + options.written) / few
    times = {WALK: answered, "teacher": answered, "write": options.written}
    shown = {name: sum(units) * times.get(name, 1) for name, units in log.items()}
    step = log["distil"][-1]
    if options.searches_rate:
        shown["find a rate"] = TRIALS * (trial_steps(options.steps) + 1) * step
    return shown | {"distil": step * options.steps}
