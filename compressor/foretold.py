"""What a distillation will cost, before it runs: the job itself with two steps, into a folder that goes again."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from calib.checkpoint import find_model
from calib.device import budget_of, peak_memory, pick_device
from calib.journal import Journal
from calib.memory import lean
from calib.progress import recording
from compressor.classify import checked as checked_texts
from compressor.classify import models_of
from compressor.classify import run_job as run_texts
from compressor.distill import CHOSEN_ON, check_installed, checked, run_job
from compressor.wanted import Distill

STEPS = 2  # the second has the optimizer's moments beside everything else
WALKS = ("teacher", "write")  # stages that go over all rows before the student learns


@dataclass(frozen=True)
class Foretold:
    """Seconds in all and of each step; the most memory that the whole process holds and OUT's weights, in bytes."""

    seconds: float
    step_seconds: float
    peak_bytes: int
    out_bytes: int


def foretell(teacher: str | Path, out: str | Path, how: Distill) -> Foretold:
    """Everything that `distill` checks is checked, and nothing is left behind.  Raises BadInput."""
    lean(budget_of(how.memory_budget, pick_device(how.device)))
    check_installed(how)
    find_model(teacher, base_model=how.base_model, dequantize=how.dequantize)
    some = replace(how, steps=min(STEPS, how.steps), cache=None, teacher_rows=min(how.teacher_rows, 1))
    with tempfile.TemporaryDirectory(prefix="parewell-") as place, recording() as log:
        made, journal = Path(place) / "out", Journal(Path(place) / "journal")
        journal.folder.mkdir()
        rows = 1.0
        if how.task == "sequence-classification":
            of = checked_texts(teacher, Path(out), how)
            began = time.perf_counter()
            report = run_texts(of, *models_of(of, made, how), made, some, journal, allow_damage=True)
        else:
            job = checked(teacher, Path(out), how)
            few = max(2 * how.batch, CHOSEN_ON)
            if how.teacher != "online":  # which answers all rows before the student learns
                rows = len(job.train.ids) / len(job.train.ids[:few])
                job = replace(job, train=job.train[:few], targets=job.targets[:few])
            began = time.perf_counter()
            report = run_job(job, made, some, journal, None, allow_damage=True)
        whole = time.perf_counter() - began
    steps = log.pop("distil")
    walked = sum(sum(units) for name, units in log.items() if name in WALKS)
    seconds = whole - sum(steps) + steps[-1] * how.steps + (rows - 1) * walked
    return Foretold(seconds, steps[-1], peak_memory(pick_device(how.device)), int(report["bytes"]["after"]))
