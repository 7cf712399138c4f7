"""What a distillation will cost, before it runs: the job itself with two steps, into a folder that goes again."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from calib.jobs.cost import OF_STEP, Part, Saving, costliest, fewer, savings
from calib.jobs.journal import Journal
from calib.model.checkpoint import find_model
from calib.runtime.device import budget_of, peak_memory, pick_device
from calib.runtime.memory import lean
from calib.runtime.progress import Log, recording
from compressor.distillation.classification import checked as checked_texts
from compressor.distillation.classification import models_of
from compressor.distillation.classification import run_job as run_texts
from compressor.distillation.distill import CHOSEN_ON, check_installed, checked, run_job
from compressor.distillation.options import Distill
from compressor.distillation.teacher_answers import WALK

CHECKED = "check weights"  # a stage
STEPS = 2  # the second has the optimizer's moments beside everything else


@dataclass(frozen=True)
class Foretold:
    """Seconds in all and of each step; the most memory that the whole process holds, OUT's weights and all of OUT's
    files, in bytes.  `stages` are all of the job; `costliest` names the two that take longest; `savings` of a job of
    more than an hour what makes it shorter."""

    seconds: float
    step_seconds: float
    peak_bytes: int
    out_bytes: int
    folder_bytes: int
    stages: list[Part]
    costliest: list[str]
    savings: list[Saving]


def foretell(teacher: str | Path, out: str | Path, how: Distill) -> Foretold:
    """Everything that `distill` checks is checked, and nothing is left behind.  Raises BadInput."""
    lean(budget_of(how.memory_budget, pick_device(how.device)))
    check_installed(how)
    find_model(teacher, base_model=how.base_model, dequantize=how.dequantize)
    some = replace(how, steps=min(STEPS, how.steps), cache=None, teacher_rows=min(how.teacher_rows, 1))
    with tempfile.TemporaryDirectory(prefix="parewell-") as place, recording() as log:
        made, journal = Path(place) / "out", Journal(Path(place) / "journal")
        journal.folder.mkdir()
        rows, few = 1, 1  # that the teacher answers before the student learns: of the job, and here
        if how.task == "sequence-classification":
            of = checked_texts(teacher, Path(out), how)
            began = time.perf_counter()
            report = run_texts(of, *models_of(of, made, how), made, some, journal, allow_damage=True)
        else:
            job = checked(teacher, Path(out), how)
            few = max(2 * how.batch, CHOSEN_ON)
            rows = len(job.train.ids)
            if how.teacher != "online":
                job = replace(job, train=job.train[:few], targets=job.targets[:few])
            few = len(job.train.ids) + some.teacher_rows
            began = time.perf_counter()
            report = run_job(job, made, some, journal, None, allow_damage=True)
        whole = time.perf_counter() - began
        held = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    log["everything else"] = [max(0.0, whole - sum(sum(units) for name, units in log.items() if name != CHECKED))]
    told = partial(_stages, {name: units for name, units in log.items() if units}, rows, few)

    def seconds(how: Distill) -> float:
        return sum(told(how).values())

    shorter = [fewer(how, "steps", how.steps, 10, seconds), fewer(how, "teacher_rows", how.teacher_rows, 1, seconds)]
    if how.teacher != "online":
        shorter.insert(1, fewer(how, "samples", rows, 4 * how.batch, seconds))
    more = len(report["curves"]) * (how.steps - some.steps) * OF_STEP
    return Foretold(
        seconds(how), log["distil"][-1], peak_memory(pick_device(how.device)), int(report["bytes"]["after"]),
        held + more,
        [Part(name, each) for name, each in told(how).items()], costliest(told(how)), savings(how, shorter, seconds),
    )  # fmt: skip


def _stages(log: Log, rows: int, few: int, how: Distill) -> dict[str, float]:
    """Seconds of each stage of a job, from those of two steps with `few` of its `rows` rows and, where the teacher
    writes any, one of these."""
    answered = (min(how.samples or rows, rows) + how.teacher_rows) / few
    times = {WALK: answered, "teacher": answered, "write": how.teacher_rows}
    told = {name: sum(units) * times.get(name, 1) for name, units in log.items()}
    return told | {"distil": log["distil"][-1] * how.steps}
