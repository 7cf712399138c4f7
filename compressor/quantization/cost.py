"""What a quantization will cost, before it runs.

The job itself, on the first block and on the first two, with few rows and with twice as many. What a stage costs is a
sum of four parts (once, by block, by row, by block and row), and four runs tell them apart. What it holds does not
depend on depth but for a little that can be counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from calib import BadInput
from calib.blockwise.model import TOKENS_AT_ONCE
from calib.jobs.cost import PresetCost, Saving, costliest, fewer, savings
from calib.jobs.journal import Journal
from calib.model.checkpoint import find_model
from calib.runtime.device import memory_budget_bytes, peak_memory, pick_device
from calib.runtime.distributed import shared_folder
from calib.runtime.memory import limit_malloc_cache
from calib.runtime.progress import clock, recording, stage
from compressor.quantization.calibrate import profiled_rows
from compressor.quantization.embedding.sizes import bytes_beside, parts_in_out, sizes_of_choices
from compressor.quantization.embedding.tables import TABLES_STAGE
from compressor.quantization.embedding.tied_embedding import second_table
from compressor.quantization.job import TRIAL_ROWS, QuantizationJob, is_online, validate_quantization
from compressor.quantization.objective import kept_back
from compressor.quantization.options import Quantize, seconds_of
from compressor.quantization.precision.mixed_precision import GROUPS_TOGETHER
from compressor.quantization.quantized_model import Splits
from compressor.quantization.repeated.cheapest_bits import bit_targets, tries
from compressor.quantization.stages import run_stages


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage of a job: seconds, bytes of weights that it reads, tokens that pass through all blocks."""

    name: str
    seconds: float
    bytes_read: int
    tokens: int


@dataclass(frozen=True)
class QuantizationCost:
    """peak_bytes is of the whole process; disk_bytes of OUT and of the journal beside it; out_bytes of OUT's weights,
    of them untied_bytes of a table that was tied; out_parts are these by part of the model, folder_bytes those of all
    of OUT's files; rotation_left_out says why the residual stream is not rotated.  `costliest` names the two stages
    that take longest; `savings` of a job of more than an hour what makes it shorter; `presets` are what the job would
    take by each.  Where bits are looked for, out_bytes and times are of the most there are to choose from, and
    least_bytes of OUT's weights in the fewest.  `choices` are out_bytes by what may become of embedding and head, as
    options ask for it.  Of a format that is none of the scheme's own, out_parts and `choices` are empty."""

    stages: list[StageEstimate]
    peak_bytes: int
    disk_bytes: int
    out_bytes: int
    untied_bytes: int = 0
    rotation_left_out: str | None = None
    folder_bytes: int = 0
    out_parts: dict[str, int] = field(default_factory=dict)
    costliest: list[str] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    presets: dict[str, PresetCost] = field(default_factory=dict)
    least_bytes: int | None = None
    choices: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(each.seconds for each in self.stages)


@dataclass(frozen=True)
class Measured:
    """Seconds of each stage of a few short jobs, by their blocks and rows; `few` is the smaller number of rows.
    `checking` is the stage that was measured in full."""

    seconds: dict[tuple[int, int], dict[str, float]]
    few: int
    checking: StageEstimate

    def of(self, name: str, layers: int, rows: int) -> float:
        """Seconds that a stage takes once, over so many blocks and rows."""
        return _extrapolated({at: run.get(name, 0.0) for at, run in self.seconds.items()}, self.few, layers, rows)


def estimate_quantization(
    model: str | Path, out: str | Path, options: Quantize | None = None, presets: Mapping[str, Quantize] | None = None
) -> QuantizationCost:
    """Estimate a quantization's time, memory and bytes: everything that `quantize` checks is checked, the first blocks
    are measured, and nothing is left behind.  Raises BadInput.

    `presets`: the same job by each, which differ in learning alone, to be compared.
    """
    options, out, presets = options or Quantize(), Path(out), presets or {}
    options = replace(options, learn=True) if options.learns else options  # whatever steps are compared
    limit_malloc_cache(memory_budget_bytes(options.memory_budget, pick_device(options.device)))
    with recording() as log:
        folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
        job = validate_quantization(folder, out, options)
        job.stream.verify()
    checking = StageEstimate("check weights", sum(log.pop("check weights")), job.weight_bytes, 0)
    measured, peaks = _measured(job, [options, *presets.values()], checking)
    if options.budget is not None:
        options = options.within_budget(steps_within(job, options, measured, seconds_of(options.budget)))
        job = replace(job, options=options)
    stages = stages_of(job, options, measured)
    left_out = job.rotation_left_out if options.rotations != "none" else None
    untied = options.rotations != "none" and left_out is None
    widths = options.code_widths() if options.tell_apart is not None else []
    bits = max(widths) if widths else options.target_bits
    parts = parts_in_out(job.stream, job.stored_scheme, untied=untied, mean_bits=bits)
    weights = job.exported_bytes(folder) or sum(parts.values())

    def folder_bytes(options: Quantize) -> int:
        beside = bytes_beside(
            folder,
            job.stream,
            job.stored_scheme,
            steps=options.learns * options.steps + options.tuned,
            parts=0 if not options.allocates else sum(len(job.groups(i)) for i in range(job.stream.layers)),
            rotated_keys=job.scheme.has_own_keys and options.rotations != "none" and is_online(options, job.scheme),
        )
        return weights + beside

    compared = {
        name: PresetCost(
            sum(each.seconds for each in stages_of(job, one, measured)), peaks[_learns(one)], folder_bytes(one)
        )
        for name, one in presets.items()
    }
    return QuantizationCost(
        stages, peaks[_learns(options)], job.disk_bytes + job.exports * weights, weights,
        second_table(job.stream, job.scheme) if untied else 0, left_out, folder_bytes(options),
        {} if job.exports else parts,
        costliest({each.name: each.seconds for each in stages}), shorter_quantizations(job, options, measured),
        compared, _bytes_in_bits(job, folder, min(widths), untied=untied) if widths else None,
        {} if job.exports else sizes_of_choices(
            job.stream, job.stored_scheme, rotates=job.parts.obstacle is None, mean_bits=bits
        ),
    )  # fmt: skip


def _bytes_in_bits(job: QuantizationJob, folder: Path, bits: int, *, untied: bool) -> int:
    """Bytes of the output's weights where all linears have so many bits."""
    scheme = replace(job.scheme, weights=replace(job.scheme.weights, bits=bits))  # in words as full as they are then
    return job.exported_bytes(folder, bits=bits) or sum(parts_in_out(job.stream, scheme, untied=untied).values())


MOST_STEPS = 1000  # of tuning, whatever time there is: more would learn the rows by heart


def measured_blocks(job: QuantizationJob, folder: Path) -> Measured:
    """Measure the first blocks, as `estimate_quantization` does; in `folder`, which all processes see."""
    return _measured(job, [job.options], StageEstimate("check weights", 0.0, 0, 0), folder)[0]


def steps_within(job: QuantizationJob, options: Quantize, measured: Measured, seconds: float) -> int:
    """How many steps of tuning a job has time for in so many seconds.  Raises BadInput where there is none for one."""
    one, two = (
        sum(each.seconds for each in stages_of(job, options.within_budget(steps), measured)) for steps in (1, 2)
    )
    if seconds < one:
        spent = seconds_of(options.budget or "") - seconds
        raise BadInput(
            f"budget {options.budget}: this job takes about {clock(spent + one)} with a single step of tuning; give "
            "more, or fewer --samples"
        )
    return min(MOST_STEPS, 1 + int((seconds - one) / (two - one))) if two > one else MOST_STEPS


def _learns(options: Quantize) -> bool:
    return options.learns or options.tuned > 0 or options.block_tuned > 0


def _measured(
    job: QuantizationJob, variants: Sequence[Quantize], checking: StageEstimate, folder: Path | None = None
) -> tuple[Measured, dict[bool, int]]:
    """-> what the job takes with any of the `variants` options, and the peak of memory of those that learn nothing
    (False), measured first, and of the others (True).  Journals are kept in `folder`; None: where the system keeps
    what is for a while."""
    rows, length = job.rows.calibration.ids.shape
    few = max(1, min(TOKENS_AT_ONCE // 2 // length, rows // 2))
    more = max(0, job.depth_bytes - _shortened(job, 2, 2 * few).depth_bytes)
    longest = next((one for one in reversed(variants) if _learns(one)), variants[0])
    plain = next((one for one in variants if not _learns(one)), None)
    sizes = list(itertools.product((1, 2), (few, 2 * few)))
    seen, peaks = dict[tuple[int, int], dict[str, float]](), dict[bool, int]()
    with stage("measure", len(sizes) + (plain not in (None, longest)), "runs") as done:
        if plain is not None and plain != longest:
            _seconds(_shortened(job, *sizes[-1]), plain, sizes[-1][1], folder)
            peaks[False] = peak_memory(job.stream.device) + more
            done()
        for deep, wide in sizes:
            seen[deep, wide] = _seconds(_shortened(job, deep, wide), longest, wide, folder)
            done()
    peaks[_learns(longest)] = peak_memory(job.stream.device) + more
    return Measured(seen, few, checking), peaks


def stages_of(job: QuantizationJob, options: Quantize, measured: Measured) -> list[StageEstimate]:
    """Estimate each stage of the job with these `options`, from what was measured of it."""
    if options.tell_apart is not None:
        return _stages_of_search(job, options, measured)
    taken, layers = job.rows.calibration.ids, job.stream.layers
    rows, length = min(options.samples or len(taken), len(taken)), taken.shape[1]
    held_out, tune_steps = job.rows.held_out.ids.numel(), options.tuned
    like = job.rows.like
    shown = min(options.profiled(job.profile), rows)
    walked, batch = rows * length + held_out, options.batch * length
    taught = options.learns or tune_steps > 0
    if taught or options.imatrix_out is not None:
        known = rows  # by the float model's run
    elif options.rotations != "none":
        known = min(rows, profiled_rows(job.stream, job.rows.calibration))
    else:
        known = 0
    kinds = {  # stage -> rows at a time, times it runs, times it reads the weights, tokens in all
        "float model": (known or len(taken), 1, 1, known * length + held_out),
        "teacher": (rows, int(taught), 0, rows * length),
        "learn": (options.batch, options.learns * options.steps, 2 * options.steps, batch * options.steps),
        f"round ({options.rounding})": (rows, 1, 1, walked + rows * length),
        "tune block": (options.batch, options.block_tuned, 0, batch * options.block_tuned),
        "nearest": (len(taken), 1, 1, held_out),
        "tune": (options.batch, tune_steps, 0, batch * tune_steps),
        "run": (len(taken), 1, 0, held_out),
        "evaluate": (len(taken), 1, 0, held_out),
        "like": (rows, int(options.like is not None), 1, rows * length + (like.ids.numel() if like else 0)),
        TABLES_STAGE: (rows, 1, 0, rows * length * (job.scheme.head is not None)),
        "sensitivity": (shown, int(options.target_bits is not None), 2, 3 * shown * length),
        "anchor": (shown, int(options.target_bits is not None), 1, 2 * shown * length),
    }  # rows of what is held out are counted as their share of all rows
    stages = [measured.checking]
    for name, (at_once, times, reads, tokens) in kinds.items():
        # Stages that such a job does without cost nothing.
        if times and any(name in run for run in measured.seconds.values()):
            once = measured.of(name, layers, at_once)
            stages.append(StageEstimate(name, times * once, reads * job.weight_bytes, tokens))
    profile = list[StageEstimate]()
    if options.target_bits is not None and job.profile == "measured":
        float_walk = next(each for each in stages if each.name == "float model")
        seen = {deep: measured.seconds[deep, 2 * measured.few] for deep in (1, 2)}
        profile = [_profile_stage(job, options, seen, 2 * measured.few, float_walk)]
        stages += profile
    if replace(job, options=options).tries_starts:
        walks = (measured.of(name, layers, TRIAL_ROWS) for name in ("float model", f"round ({options.rounding})"))
        stages.append(StageEstimate("compare starts", 2 * sum(walks), 4 * job.weight_bytes, 4 * TRIAL_ROWS * length))
    if options.halves:
        again = sum(
            2 * times * measured.of(name, layers, min(at_once, rows // 2))
            for name, (at_once, times, _, _) in kinds.items() if name not in ("nearest", "like")
        )  # fmt: skip
        again += sum(2 * each.seconds for each in profile)
        read = 2 * job.weight_bytes + sum(2 * each.bytes_read for each in profile)
        stages.append(StageEstimate("halves", again, read, rows * length))
    return stages


_ONCE = {"check weights", "float model", "teacher", "like", "sensitivity", "profile", "nearest", "halves"}


def _stages_of_search(job: QuantizationJob, options: Quantize, measured: Measured) -> list[StageEstimate]:
    """Estimate the stages of a job that looks for the fewest bits at a tell-apart rate: those of the job that is kept,
    and all other tries as bisection has it, with one more in full, a step below."""
    targets = bit_targets(options.code_widths())
    whole = stages_of(job, options.in_bits(targets[-1]), measured)
    quick = stages_of(job, options.in_bits(targets[-1]).without_learning(), measured)
    search = [(tries(targets), one) for one in quick if one.name not in _ONCE]
    search += [(1, one) for one in whole if one.name not in _ONCE and _learns(options)]
    return [
        *whole,
        StageEstimate(
            f"{tries(targets) + _learns(options)} other tries",
            *(sum(n * getattr(one, part) for n, one in search) for part in ("seconds", "bytes_read", "tokens")),
        ),
    ]


_ALLOCATION = (
    "target_bits",
    "tell_apart",
    "candidate_bits",
    "profile",
    "profile_rows",
)  # options that mean nothing without one of the first two


def shorter_quantizations(job: QuantizationJob, options: Quantize, measured: Measured) -> list[Saving]:
    """Suggest what makes a job of more than an hour shorter, the least harmful first."""

    def seconds(options: Quantize) -> float:
        return sum(each.seconds for each in stages_of(job, options, measured))

    tune_steps, rows = options.tuned, len(job.rows.calibration.ids)
    return savings(
        options,
        [  # leaving out learning leaves out tuning, too
            {"halves": False},
            {"like": None},
            fewer(options, "tune_steps", tune_steps, 10, seconds),
            fewer(options, "block_steps", options.block_tuned, 10, seconds),
            fewer(options, "steps", options.steps if options.learns else 0, 10, seconds),
            fewer(options, "samples", rows, 16, seconds),
            {name: Quantize.__dataclass_fields__[name].default for name in _ALLOCATION},
            options.learning_left_out() if _learns(options) else {},
        ],
        seconds,
    )


def _shortened(job: QuantizationJob, layers: int, rows: int) -> QuantizationJob:
    """The first blocks, with some calibration rows and the same share of held-out ones."""
    held_out = max(1, round(rows * len(job.rows.held_out.ids) / len(job.rows.calibration.ids)))
    like = None if job.rows.like is None else job.rows.like[:rows]
    some = Splits(job.rows.calibration[:rows], job.rows.held_out[:held_out], like)
    return replace(job, stream=job.stream.shortened(layers), rows=some)


def _seconds(job: QuantizationJob, options: Quantize, batch: int, within: Path | None) -> dict[str, float]:
    """Of each stage; of learning and tuning, of one step: the second, as few steps search for clip ratios anew."""
    tune_steps = 2 if options.tuned else 0
    block_steps = 2 if options.block_tuned else 0
    short = options
    if _learns(options):
        short = replace(options, batch=batch, budget=None, block_steps=block_steps, tune_steps=tune_steps)
    if options.tuned:  # at rates of 0 tuning is no worse than its start, and what follows where it is kept is run too
        short = replace(short, lr_tune=0.0, lr_rounding=0.0 if options.moves_codes else options.lr_rounding)
    short = replace(short, steps=2) if options.learns else short
    short = short if short.tell_apart is None else short.in_bits(max(short.code_widths()))
    with shared_folder(within) as folder, recording() as log:
        run_stages(replace(job, options=short), Journal(folder))
    seconds = {name: units[-1] if name in ("learn", "tune") else sum(units) for name, units in log.items()}
    if "tune block" in seconds:  # which went on inside the other
        seconds[f"round ({options.rounding})"] -= seconds["tune block"]
        learned = batch - kept_back(batch)  # rows of a step, where all of a step's rows were to be
        seconds["tune block"] *= batch / (learned * block_steps)
    return seconds


def _profile_stage(
    job: QuantizationJob, options: Quantize, seen: dict[int, dict[str, float]], rows: int, float_walk: StageEstimate
) -> StageEstimate:
    """Variants of a block walk through all later ones: a part of the cost goes with the pairs of blocks.  And all rows
    walk from the first block to the last of every few that are profiled together."""
    own, both = (run["profile"] + run["profile answers"] for run in (seen[1], seen[2]))
    layers = job.stream.layers
    shown_rows = min(options.profiled("measured"), len(job.rows.calibration.ids))
    seconds = (layers * own + max(0.0, both - 2 * own) * layers * (layers - 1) / 2) * shown_rows / min(shown_rows, rows)
    tokens = shown_rows * job.rows.calibration.ids.shape[1]
    walk = float_walk.seconds * max(1.0, tokens / float_walk.tokens)  # which may have run held-out rows alone
    seconds += walk * sum(min(i + GROUPS_TOGETHER, layers) for i in range(0, layers, GROUPS_TOGETHER)) / layers
    return StageEstimate("profile", seconds, math.ceil(layers / GROUPS_TOGETHER) * job.weight_bytes, tokens)


def _extrapolated(seconds: dict[tuple[int, int], float], few: int, layers: int, rows: int) -> float:
    """Bilinear in blocks and rows; noise may make a part negative, which it is not."""
    once, deep, wide, both = (seconds[1, few], seconds[2, few], seconds[1, 2 * few], seconds[2, 2 * few])
    by_block_and_row = max(0.0, (both - deep - wide + once) / few)
    by_block = max(0.0, deep - once - by_block_and_row * few)
    by_row = max(0.0, (wide - once) / few - by_block_and_row)
    fixed = max(0.0, once - by_block - by_row * few - by_block_and_row * few)
    return fixed + by_block * layers + by_row * rows + by_block_and_row * layers * rows
