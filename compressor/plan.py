"""What a quantization will cost, before it runs.

The job itself, on the first block and on the first two, with few rows and with twice as many. What a stage costs is a
sum of four parts (once, by block, by row, by block and row), and four runs tell them apart. What it holds does not
depend on depth but for a little that can be counted.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from calib.checkpoint import find_model
from calib.device import budget_of, peak_memory, pick_device
from calib.journal import Journal
from calib.memory import lean
from calib.progress import recording
from calib.stream import TOKENS_AT_ONCE
from compressor.output import bytes_in_out
from compressor.quantize import Checked, checked, run_stages, tune_steps_of
from compressor.sensitivity import TOGETHER
from compressor.tying import second_table
from compressor.walks import Rows
from compressor.wanted import Quantize


@dataclass(frozen=True)
class Stage:
    """One stage of a job: seconds, bytes of weights that it reads, tokens that pass through all blocks."""

    name: str
    seconds: float
    bytes_read: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """peak_bytes is of the whole process; disk_bytes of OUT and of the journal beside it; out_bytes of OUT's weights,
    of them untied_bytes of a table that was tied; rotation_left_out says why the residual stream is not rotated."""

    stages: list[Stage]
    peak_bytes: int
    disk_bytes: int
    out_bytes: int
    untied_bytes: int = 0
    rotation_left_out: str | None = None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def plan(model: str | Path, out: str | Path, how: Quantize | None = None) -> Plan:
    """Everything that `quantize` checks is checked, and nothing is left behind.  Raises BadInput."""
    how, out = how or Quantize(), Path(out)
    lean(budget_of(how.memory_budget, pick_device(how.device)))
    with recording() as log:
        folder = find_model(model, base_model=how.base_model, dequantize=how.dequantize)
        job = checked(folder, out, how)
        job.stream.weights.verify(job.stream.expected)
    stages = [Stage("check weights", sum(log.pop("check weights")), job.weight_bytes, 0)]
    rows, layers = len(job.rows.calibration.ids), job.stream.sizes.layers
    length = job.rows.calibration.ids.shape[1]
    few = max(1, min(TOKENS_AT_ONCE // 2 // length, rows // 2))
    shapes = list(itertools.product((1, 2), (few, 2 * few)))
    seen = {(deep, wide): _seconds(_shortened(job, deep, wide), how, wide) for deep, wide in shapes}
    held_out = job.rows.held_out.ids.numel()
    walked, batch = rows * length + held_out, how.batch * length
    tune_steps = tune_steps_of(how)
    kinds = {  # stage -> rows at a time, times it runs, times it reads the weights, tokens in all
        "float model": (rows, 1, 1, walked),
        "teacher": (rows, 1, 0, rows * length),
        "learn": (how.batch, how.steps, 2 * how.steps, batch * how.steps),
        f"round ({how.rounding})": (rows, 1, 1, walked + rows * length),
        "nearest": (rows, 1, 1, held_out),
        "tune": (how.batch, tune_steps, 0, batch * tune_steps),
        "run": (rows, 1, 0, held_out),
        "evaluate": (rows, 1, 0, held_out),
    }
    for name, (at_once, times, reads, tokens) in kinds.items():
        if any(name in run for run in seen.values()):  # what tuning that is not kept leaves out costs nothing
            one = _extrapolated({at: run.get(name, 0.0) for at, run in seen.items()}, few, layers, at_once)
            stages.append(Stage(name, times * one, reads * job.weight_bytes, tokens))
    if "profile" in seen[1, few]:
        float_walk = next(stage for stage in stages if stage.name == "float model")
        stages.append(_profile_stage(job, how, {deep: seen[deep, 2 * few] for deep in (1, 2)}, 2 * few, float_walk))
    if how.halves:
        half, profile = rows // 2, [stage for stage in stages if stage.name == "profile"]
        again = sum(
            2 * times * _extrapolated(
                {at: run.get(name, 0.0) for at, run in seen.items()}, few, layers, min(at_once, half)
            )
            for name, (at_once, times, _, _) in kinds.items() if name != "nearest"
        )  # fmt: skip
        again += sum(2 * stage.seconds for stage in profile)
        read = 2 * job.weight_bytes + sum(2 * stage.bytes_read for stage in profile)
        stages.append(Stage("halves", again, read, rows * length))
    more = job.depth_bytes - _shortened(job, 2, 2 * few).depth_bytes
    left_out = job.rotation_left_out if how.init != "none" else None
    untied = how.init != "none" and left_out is None
    return Plan(
        stages, peak_memory(job.stream.device) + max(0, more), job.disk_bytes,
        bytes_in_out(job.stream, job.stored_scheme, untied=untied), second_table(job.stream) if untied else 0, left_out,
    )  # fmt: skip


def _shortened(job: Checked, layers: int, rows: int) -> Checked:
    """The first blocks, with some calibration rows and the same share of held-out ones."""
    held_out = max(1, round(rows * len(job.rows.held_out.ids) / len(job.rows.calibration.ids)))
    some = Rows(job.rows.calibration[:rows], job.rows.held_out[:held_out])
    return replace(job, stream=job.stream.shortened(layers), rows=some)


def _seconds(job: Checked, how: Quantize, batch: int) -> dict[str, float]:
    """Of each stage; of learning and tuning, of one step: the second, as few steps search for clip ratios anew."""
    short = replace(how, steps=2, batch=batch, tune_steps=2 if tune_steps_of(how) else 0)
    with tempfile.TemporaryDirectory(prefix="parewell-") as folder, recording() as log:
        run_stages(job, short, Journal(Path(folder)))
    return {name: units[-1] if name in ("learn", "tune") else sum(units) for name, units in log.items()}


def _profile_stage(
    job: Checked, how: Quantize, seen: dict[int, dict[str, float]], rows: int, float_walk: Stage
) -> Stage:
    """Variants of a block walk through all later ones: a part of the cost goes with the pairs of blocks.  And all rows
    walk from the first block to the last of every few that are profiled together."""
    own, both = (run["profile"] + run["profile answers"] for run in (seen[1], seen[2]))
    wanted, layers = min(how.shown, len(job.rows.calibration.ids)), job.stream.sizes.layers
    seconds = (layers * own + max(0.0, both - 2 * own) * layers * (layers - 1) / 2) * wanted / min(wanted, rows)
    seconds += float_walk.seconds * sum(min(i + TOGETHER, layers) for i in range(0, layers, TOGETHER)) / layers
    tokens = wanted * job.rows.calibration.ids.shape[1]
    return Stage("profile", seconds, math.ceil(layers / TOGETHER) * job.weight_bytes, tokens)


def _extrapolated(seconds: dict[tuple[int, int], float], few: int, layers: int, rows: int) -> float:
    """Bilinear in blocks and rows; noise may make a part negative, which it is not."""
    once, deep, wide, both = (seconds[1, few], seconds[2, few], seconds[1, 2 * few], seconds[2, 2 * few])
    by_block_and_row = max(0.0, (both - deep - wide + once) / few)
    by_block = max(0.0, deep - once - by_block_and_row * few)
    by_row = max(0.0, (wide - once) / few - by_block_and_row)
    fixed = max(0.0, once - by_block - by_row * few - by_block_and_row * few)
    return fixed + by_block * layers + by_row * rows + by_block_and_row * layers * rows
