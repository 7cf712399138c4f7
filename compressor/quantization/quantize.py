"""Quantize a checkpoint: fold, calibrate, learn, round, save (OSTQuant, OpenReview rAcgDBdKnP; GPTQ, arXiv:2210.17323).

Walks over the blocks, one in memory at a time. The first runs the float model: statistics before, the teacher's top-k,
the float model's own answers on held-out rows. Learning walks to and fro. Then blocks are transformed and rounded, each
fed by the already rounded blocks before it, and tuned to and fro again. Every stage goes into a journal as it is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus, describe
from calib.data.rows import draw_rows, positions_of, rows_like
from calib.data.task_rows import TaskRows
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import stream_identity
from calib.jobs.output_folder import Shards, atomic_folder, check_destination, write_described
from calib.jobs.recipe import read_recipe
from calib.jobs.training_loop import steps_done
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import read_config
from calib.model.task import ALL_TASKS
from calib.model.weights import Weights
from calib.probe.parts import ModelParts
from calib.quant.scheme import Scheme
from calib.runtime.device import check_budget, device_memory_limit, memory_budget_bytes, pick_device
from calib.runtime.distributed import barrier, is_main_process, raise_together
from calib.runtime.memory import limit_malloc_cache, trim_heap
from calib.runtime.precision import autocast_dtype
from calib.runtime.progress import stage
from calib.stats.rate_distortion import bits_at
from calib.stats.state_shift import MOST_COMPONENTS, TOKENS_A_COMPONENT
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
from compressor.quantization.learn_scales import ScaleFactors, learn_scales
from compressor.quantization.learn_transforms import Transforms, free_parameters, initial_transforms, learn_transforms
from compressor.quantization.mixed_precision import (
    GROUPS_TOGETHER,
    frontier,
    law_of_bits,
    layer_groups,
    mean_bits,
    uniform,
)
from compressor.quantization.objective import CalibrationData, LearningResult, Objective
from compressor.quantization.options import UNROUNDED, Quantize
from compressor.quantization.quantized_model import Profile, QuantizationResult, QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks, Rounder
from compressor.quantization.sample_size import SampleSizeEstimate, estimate_sample_size
from compressor.quantization.sensitivity import profile_and_allocate, unforeseen
from compressor.quantization.tied_embedding import check_untie, rotation_left_out, second_table
from compressor.quantization.write import (
    bytes_in_out,
    is_untied,
    report_of,
    stored_block,
    stored_outer,
    write_descriptions,
)
from compressor.report.quantization import quantized_page
from compressor.transforms.fold import identity_transform
from compressor.transforms.proof import Proof, left_out, parts_of

UNFOLLOWED = "blocks are told of more than the hidden state, and gradients are not followed there"
SAMPLES = 128  # calibration rows, where nobody says how many


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
        done = run_stages(job, journal)
        more = {"damage": _judged(options, done, allow=allow_damage)} | _beside_figures(job, journal, done)
        return _save(folder, out, job, done, identity, gate, more)


@dataclass(frozen=True)
class QuantizationJob:
    """A job whose input and destination will do."""

    stream: BlockwiseModel
    scheme: Scheme
    rows: Splits
    options: Quantize
    parts: ModelParts  # of the model, as far as transforms of them are proved

    @property
    def budget(self) -> int:
        """Bytes of RAM for hidden states."""
        return memory_budget_bytes(self.options.memory_budget, self.stream.device)

    @property
    def rounder(self) -> Rounder:
        """The rounding method that the options ask for."""
        return Rounder(self.options.rounding, self.options.damping)

    def initial_transforms(self) -> Transforms | None:
        """Transforms that learning starts from, or that are folded in without it; None: no transforms."""
        if self.options.init == "none":
            return None
        return initial_transforms(
            self.stream, self.options.init, self.scheme, online=is_online(self.options, self.scheme),
            seed=self.options.seed, rotate_residual=self.rotation_left_out is None, parts=self.parts,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights as they are stored."""
        return sum(entry.bytes for entry in self.stream.weights.entries.values())

    @property
    def depth_bytes(self) -> int:
        """Bytes that grow with the number of blocks or rows, where it is computed: hidden states (which wait in RAM,
        also for CUDA), and what is learned or tuned with its gradient and moments."""
        budget = self.budget
        on_cpu = self.stream.device.type == "cpu"
        states = min(max(self._walk_bytes + self._profile_bytes, self._learn_bytes), budget) if on_cpu else 0
        linears = self.stream.linears(0)
        groups = sum(one.shape[0] * self.scheme.weights.groups(one.shape[1]) for one in linears)
        learned = 5 * self._transform_numbers + groups if self.learns else 0  # the points of rotations; clip ratios
        tuned = 4 * groups if self.tune_steps else 0
        return states + self.stream.layers * 4 * max(learned, tuned)

    @property
    def _transform_numbers(self) -> int:
        """Of a block's rotations and scales."""
        found = self.parts.blocks[0]
        keys = sum(layer.kv_heads * layer.width**2 for layer in found.attention) if self.scheme.kv else 0
        return keys + sum(t.numel() for of in identity_transform(found).kinds.values() for t in of.values())

    @property
    def untaught(self) -> str | None:
        """Why nothing is learned by gradients; None where it is."""
        return untaught(self.stream, self.rows.calibration)

    @property
    def unpredicted(self) -> str | None:
        """Why nothing is predicted of what rounding costs; None where it is."""
        return self.untaught or unforeseen(self.stream)

    @property
    def profile(self) -> str:
        """How it becomes known what each part suffers: as the options say, or measured where gradients do not go."""
        return "measured" if self.unpredicted else self.options.profile

    @property
    def learns(self) -> bool:
        """Whether transforms are learned: where there are any."""
        admitted = any(parts.norms or parts.pairs or parts.planes for parts in self.parts.blocks)
        return self.options.learn and admitted and not self.untaught

    @property
    def tune_steps(self) -> int:
        """Steps of tuning; none where gradients do not go or there is nothing that they come from."""
        return 0 if self.untaught else tune_steps_of(self.options)

    @property
    def _walk_bytes(self) -> int:
        tokens = self.rows.calibration.ids.numel() + self.rows.held_out.ids.numel()
        if self.rows.like is not None:
            tokens = max(tokens, self.rows.calibration.ids.numel() + self.rows.like.ids.numel())
        kept = 2 if self.stream.encoder_blocks else 1  # what the encoder said is kept for all of the decoder
        return kept * tokens * self._state_bytes

    @property
    def _state_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.stream.hidden * self.stream.dtype.itemsize

    @property
    def _learn_bytes(self) -> int:
        if not (self.learns or self.tune_steps):
            return 0
        tokens = self.options.batch * self.rows.calibration.ids.shape[1]
        return self.stream.layers * tokens * self._state_bytes

    @property
    def _profile_bytes(self) -> int:
        if self.options.target_bits is None:
            return 0
        tokens = self.rows.calibration[: self.options.profiled(self.profile)].ids.numel()
        kept = self.stream.layers + 3  # inputs of all blocks, and gradients
        if self.profile == "measured":
            kept = max(kept, GROUPS_TOGETHER * len(layer_groups(self.stream.linears(0))) * len(self.options.widths()))
        return kept * tokens * self._state_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the output and of the journal beside it."""
        spilled = max(b if b > self.budget else 0 for b in (self._walk_bytes, self._learn_bytes))
        if self._profile_bytes:  # whose states have but a share each of the budget
            spilled = max(spilled, self._walk_bytes + self._profile_bytes)
        codes = sum(e.shape[0] * e.shape[1] for e in self.stream.weights.entries.values() if len(e.shape) == 2)
        taught = self.learns or self.tune_steps
        teacher = self.rows.calibration.ids.numel() * self.options.top_k * 8 if taught else 0
        untied = self.options.init != "none" and self.rotation_left_out is None
        kept = codes * (3 if self.options.halves else 1) + teacher * (2 if self.options.halves else 1)
        return bytes_in_out(self.stream, self.stored_scheme, untied=untied) + spilled + kept + 2**20

    @property
    def rotation_left_out(self) -> str | None:
        """Why the residual rotation is left out, or None."""
        return rotation_left_out(self.stream, self.parts.obstacle, self.scheme, self.stored_scheme, self.options.untie)

    @property
    def stored_scheme(self) -> Scheme | None:
        """None where weights are only transformed; at most as many bytes as this where bits are allocated."""
        if self.options.target_bits is None:
            return None if self.options.rounding == UNROUNDED else self.scheme
        return replace(self.scheme, weights=replace(self.scheme.weights, bits=math.ceil(self.options.target_bits)))


def validate_quantization(folder: Path, out: Path, options: Quantize) -> QuantizationJob:
    """Check model, rows, options and destination before any weight is read.  Raises BadInput."""
    scheme = Scheme.parse(options.scheme)
    config = read_config(folder, ALL_TASKS)
    device = pick_device(options.device)
    stream = BlockwiseModel(
        config, Weights(folder), device, products=autocast_dtype(options.precision, device),
        device_limit=device_memory_limit(options.device_memory, device),
    )  # fmt: skip
    stream.check_end()
    _check_task(stream, options)
    if len(set(map(stream.block_name, range(stream.layers)))) < stream.layers:
        raise BadInput(
            f"config.json: {config.model_type} calls its blocks more than once, each time on other inputs, and codes "
            "cannot be chosen for all of them here; take a model of another type"
        )
    linears = [one for i in range(stream.layers) for one in stream.linears(i)]
    if scheme.table_name and any(one.step for one in linears):
        raise BadInput(
            f"scheme {options.scheme}: bitsandbytes cannot hold the experts of {config.model_type}, whose weights "
            "transformers stacks; take another, such as w4a16-g64"
        )
    if scheme.table_name and any(one.transposed for one in linears):
        raise BadInput(
            f"scheme {options.scheme}: bitsandbytes does not know weights that are kept as (in, out), as those of "
            f"{config.model_type} are; take another, such as w4a16-g64"
        )
    widths = dict.fromkeys((one.name.rpartition(".")[2], one.shape[1]) for one in linears)
    if options.group_size == "auto":
        scheme = scheme.fitted(width for _, width in widths)
    scheme.check_widths(widths)
    if scheme.kv and not all(stream.attention(i) for i in range(stream.layers)):
        raise BadInput(
            f"scheme {options.scheme}: keys and values of {config.model_type} cannot be rounded, as not every "
            "block has attention that is open to it; take one without kv"
        )
    parts = parts_of(stream)
    check_untie(stream, parts.obstacle, options.untie)
    tokenizer = read_tokenizer(folder)
    positions, task = positions_of(config), TaskRows.of(stream.task, config, tokenizer, folder)
    rows = draw_rows(folder, tokenizer, stream.vocab, options, positions=positions, samples=SAMPLES, task=task)
    if options.tune_steps and (reason := untaught(stream, rows[0])):
        raise BadInput(f"tune-steps: of {config.model_type} there is no tuning, as {reason}; leave it out")
    if options.limit and (reason := untaught(stream, rows[0]) or unforeseen(stream)):
        raise BadInput(f"limit: needs gradients of every linear's output, and {reason}; leave it out")
    check_budget(options.memory_budget, rows[0].ids.shape[1], stream.hidden, stream.dtype)
    splits = Splits(*rows)
    if options.like is not None:
        like = rows_like(
            options.like, tokenizer, stream.vocab, options, most=len(rows[0].ids), positions=positions, task=task
        )
        splits = replace(splits, like=_check_like(rows[0], like, stream.hidden))
    job = QuantizationJob(stream, scheme, splits, options, parts)
    check_destination(out, [folder], job.disk_bytes)
    return job


def _check_like(calibration: Corpus, like: Corpus, width: int) -> Corpus:
    """Raises BadInput where either text is too short for the covariance of states of `width`."""
    components = min(MOST_COMPONENTS, width)
    for text, more in ((calibration, "take more --samples"), (like, "give more text")):
        if text.tokens < (least := TOKENS_A_COMPONENT * components):
            raise BadInput(
                f"like: {text.source} gives {text.tokens} tokens, too few for a covariance in {components} components, "
                f"which takes {least}; {more}"
            )
    return like


def untaught(stream: BlockwiseModel, rows: Corpus) -> str | None:
    """Why nothing of a model is learned by gradients on these rows; None where it is."""
    if rows.beside:
        return "blocks are told of the images in rows beside the hidden state, and gradients are not followed there"
    if stream.task.embeds:
        return "it gives states of tokens, and what is learned is learned of distributions of words"
    return None if stream.walk.static else UNFOLLOWED


def _check_task(stream: BlockwiseModel, options: Quantize) -> None:
    """Raises BadInput for options that are about distributions of words, where the model gives none."""
    for name in ("target_bits", "halves") if stream.task.embeds else ():
        if getattr(options, name):
            raise BadInput(
                f"{name.replace('_', '-')}: goes by the KL of distributions of words, and this model gives embeddings; "
                "leave it out"
            )


def tune_steps_of(options: Quantize) -> int:
    """Steps of tuning that the options ask for, or that are the default."""
    if options.tune_steps is None:
        return 50 if options.learn and options.rounding != UNROUNDED else 0
    return options.tune_steps


def run_stages(job: QuantizationJob, journal: Journal, *, compared: bool = True) -> QuantizationResult:
    """Run all of a job but its saving, each stage resumed from the journal.  `compared`: also measure what rounding to
    nearest costs."""
    stream, options, rows = job.stream, job.options, job.rows
    context, tune_steps = RunContext(journal, job.budget), job.tune_steps
    k = options.top_k if job.learns or tune_steps else 0
    job, before, float_final = _calibrated(job, k, context)
    if compared and rows.like is not None:
        compare_texts(stream, rows.calibration, rows.like, options.seed, context)
    data, learning = CalibrationData(rows.calibration, TeacherCache(journal)), dict[str, LearningResult]()
    trim_heap()
    scheme, precision = job.scheme, None
    if options.target_bits is not None:
        scheme, precision = _allocate_bits(job, context)
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
        factors, learning["tune"] = _tune(model, blocks, job, data, context)
        if learning["tune"].kept:
            parameters += sum(f.numel() for one in factors for f in (*one.scales.values(), *one.gains.values()))
            block = partial(_tuned, factors, blocks)
            reading = lambda order: ((i, block(i).params(stream.linears(i), stream.dtype)) for i in order)  # noqa: E731
            final = run_blocks(stream, rows.held_out, model.outer, reading, model.online, context)
            figures["tuned"] = quality(stream, rows.held_out, model.outer, final, float_final).asdict()
    after = [blocks.notes(i) for i in range(stream.layers)]
    return QuantizationResult(model, job.parts, precision, block, before, after, figures, learning, parameters)


def _judged(options: Quantize, done: QuantizationResult, *, allow: bool) -> dict[str, Any]:
    """What the report says of damage.  Raises Damaged where there is some and it is not allowed."""
    nearest = done.figures.get("nearest")
    instead = advice_after(options.scheme, options.init, options.rounding, nearest)
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


def _calibrated(job: QuantizationJob, k: int, context: RunContext) -> tuple[QuantizationJob, list[Profile], Tensor]:
    """Run the float model.  -> the job with what its real weights admit, a profile of every block, and this process's
    held-out rows at the end."""
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
) -> tuple[list[ScaleFactors], LearningResult]:
    """-> factors of every block's scales and norm gains, and how it went."""
    steps = job.tune_steps
    with stage("tune", steps, "steps", steps_done(CheckpointSlot(context.journal, "tune"))) as done:
        return learn_scales(
            model, data, blocks, _objective(job.options, steps),
            context.loop("tune", lambda _, loss: done(f"loss {loss:.4f}")), lr=job.options.lr_tune,
        )  # fmt: skip


def _tuned(factors: Sequence[ScaleFactors], blocks: RoundedBlocks, index: int) -> RoundedBlock:
    """A rounded block with its factors worked in."""
    return factors[index].applied(blocks.read(index))


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


def _allocate_bits(job: QuantizationJob, context: RunContext) -> tuple[Scheme, dict[str, Any]]:
    """The job's scheme with bits of its own for every part of the model, and what of that goes into the report."""
    options, calibration = job.options, job.rows.calibration
    parts, bits, about = profile_and_allocate(
        model_of_job(job), calibration, options, job.profile, job.unpredicted, job.rounder, context
    )
    precision = {
        "target_bits": options.target_bits,
        "mean_bits": mean_bits(parts, bits),
        "tokens": int(calibration[: options.profiled(job.profile)].mask.sum()),
        "profile": about,
        "parts": [part.asdict() | {"bits": b} for part, b in zip(parts, bits, strict=True)],
        "uniform": uniform(parts),
        "frontier": frontier(parts),
        "law": law_of_bits(uniform(parts)),
    }
    return job.scheme.with_bits(
        {linear: b for part, b in zip(parts, bits, strict=True) for linear in part.linears}
    ), precision


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
        if tune_steps_of(job.options) and (reason := job.untaught):
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


def is_online(options: Quantize, scheme: Scheme) -> bool:
    """Whether Hadamards run in the model."""
    if options.online is not None:
        return options.online
    return any(grid is not None and grid.bits < 8 for grid in (scheme.activations, scheme.kv))
