"""A quantization that is checked before it begins: its model, its rows, its options, and what it will take up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from calib import BadInput
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.rows import draw_rows, positions_of, rows_like
from calib.data.task_rows import TaskRows
from calib.jobs.output_folder import check_destination
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config
from calib.model.task import ALL_TASKS
from calib.model.weights import Weights
from calib.probe.parts import ModelParts
from calib.quant.scheme import Scheme
from calib.runtime.device import check_budget, device_memory_limit, memory_budget_bytes, pick_device
from calib.runtime.distributed import world_size
from calib.runtime.precision import autocast_dtype
from calib.stats.state_shift import MOST_COMPONENTS, TOKENS_A_COMPONENT
from compressor.formats.served import check_served
from compressor.formats.storing import FutureOutput, check_format, native_format
from compressor.quantization.embedding.sizes import bytes_in_out
from compressor.quantization.embedding.tables import with_tables
from compressor.quantization.embedding.tied_embedding import ONE_TABLE_SERVED, check_tied, rotation_left_out
from compressor.quantization.ignored import ignored_linears
from compressor.quantization.learn_transforms import Transforms, initial_transforms
from compressor.quantization.objective import kept_back
from compressor.quantization.options import NO_TABLE, STEPS_OF_PRESETS, UNROUNDED, Quantize
from compressor.quantization.precision.importance import importance_for
from compressor.quantization.precision.mixed_precision import (
    GROUPS_TOGETHER,
    LayerGroup,
    bits_in,
    block_groups,
    least_and_most,
)
from compressor.quantization.precision.mixtures import types_in_mixture
from compressor.quantization.precision.sensitivity import unforeseen
from compressor.quantization.quantized_model import Splits
from compressor.quantization.rounding import Rounder
from compressor.quantization.tuning.block_tuning import BlockTuning
from compressor.storage.key_value_scales import without_place
from compressor.transforms.fold import identity_transform
from compressor.transforms.proof import parts_of

UNFOLLOWED = "blocks are told of more than the hidden state, and gradients are not followed there"
ROUNDING_RATE = 0.16  # of block tuning at the most: 0.02 of a cell in the first step of a linear of 64 inputs
STARTS = ("none", "hadamard")  # where a job may begin, of which the better one on a few rows is taken
TRIAL_ROWS = 8  # calibration rows that starts are rounded on
SAMPLES, HELD_OUT = 128, 16  # rows, where nobody says how many
LOOKED_AT = 4  # rows of either kind where they decide nothing


@dataclass(frozen=True)
class QuantizationJob:
    """A job whose input and destination will do."""

    stream: BlockwiseModel
    scheme: Scheme
    rows: Splits
    options: Quantize
    parts: ModelParts  # of the model, as far as transforms of them are proved
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # of columns, by linear, where a file says it

    @property
    def budget(self) -> int:
        """Bytes of RAM for hidden states."""
        return memory_budget_bytes(self.options.memory_budget, self.stream.device)

    @property
    def rounder(self) -> Rounder:
        """The rounding method that the options ask for."""
        options = self.options
        return Rounder(
            options.rounding, options.damping, offsets=self.learns_rounding, float_target=self.float_target,
            importance=self.importance,
        )  # fmt: skip

    @property
    def tries_starts(self) -> bool:
        """Whether it is found on a few rows which of STARTS is better: where nobody says, only weights are quantized, a
        rotation of the residual stream is free, the model has a KL, and every process rows of both kinds."""
        options, rows = self.options, self.rows.calibration
        chosen = options.init is not None or options.rotations != "none" or options.rounding != "gptq"
        chosen = chosen or options.imatrix is not None  # which is of inputs that nothing has turned
        measured = not rows.beside and not self.stream.task.embeds
        enough = min(kept_back(len(rows.ids)), TRIAL_ROWS) >= world_size()
        alone = self.scheme.activations is None and self.rotation_left_out is None
        return not chosen and measured and enough and alone

    def trial(self, init: str) -> QuantizationJob:
        """The job that a start is tried in: rounded on a few calibration rows, measured on those that are kept back."""
        options, rows = self.options, self.rows.calibration
        damping = max(options.damping, Quantize.damping)  # as rows may have fewer tokens than a linear has inputs
        tried = Quantize(
            scheme=options.scheme, init=init, learn=False, damping=damping, seed=options.seed,
            float_target=options.float_target, memory_budget=options.memory_budget, tied=options.tied,
        )  # fmt: skip
        back = kept_back(len(rows.ids))
        return replace(self, options=tried, rows=Splits(rows[: min(TRIAL_ROWS, len(rows.ids) - back)], rows[-back:]))

    @property
    def float_target(self) -> bool:
        """Whether rounding aims at what the float model gives."""
        if self.options.float_target is not None:
            return self.options.float_target
        untuned = self.untaught is not None and self.block_tuning is None
        return self.options.rounding == "gptq" and untuned and not _below_eight_bits(self.scheme)

    def initial_transforms(self) -> Transforms | None:
        """Transforms that learning starts from, or that are folded in without it; None: no transforms."""
        if self.options.rotations == "none":
            return None
        return initial_transforms(
            self.stream, self.options.rotations, self.scheme, online=is_online(self.options, self.scheme),
            seed=self.options.seed, rotate_residual=self.rotation_left_out is None, parts=self.parts,
            rotation_block=self.options.rotation_block,
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
        keys = sum(layer.kv_heads * layer.width**2 for layer in found.attention) if self.scheme.has_own_keys else 0
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
        return self.options.learns and admitted and not self.untaught

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of the options whose defaults depend on others, on the model and on rows, as a recipe records them."""
        found = self.options.resolved
        reasons = {"block_steps": unconnected(self.stream, self.rows.calibration), "tune_steps": self.untaught}
        undone = {name: 0 for name, reason in reasons.items() if reason and found[name]}
        return found | undone | ({"init": None} if self.tries_starts else {})

    @property
    def tune_steps(self) -> int:
        """Steps of tuning; none where gradients do not go or there is nothing that they come from."""
        return 0 if self.untaught else self.options.tuned

    @property
    def block_tuning(self) -> BlockTuning | None:
        """How each block is tuned as it is rounded; None where it is not."""
        options = self.options
        if not options.block_tuned or unconnected(self.stream, self.rows.calibration):
            return None
        steps = options.block_tuned
        rate = 0.0 if options.learn_rounding is False else ROUNDING_RATE * math.sqrt(50 / max(50, steps))
        return BlockTuning(steps=steps, batch=options.batch, factors=options.lr_tune, rounding=rate, seed=options.seed)

    @property
    def learns_rounding(self) -> bool:
        """Whether tuning of the whole model moves codes."""
        asked = self.options.learn_rounding  # blocks that are not connected are not tuned on their own
        return self.tune_steps > 0 and (self.block_tuning is None if asked is None else asked)

    @property
    def _walk_bytes(self) -> int:
        tokens = self.rows.calibration.ids.numel() + self.rows.held_out.ids.numel()
        if self.rows.like is not None:
            tokens = max(tokens, self.rows.calibration.ids.numel() + self.rows.like.ids.numel())
        aims = self.float_target or self.block_tuning is not None
        tokens += self.rows.calibration.ids.numel() * aims  # of the float model beside the rounded one
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
        return self.stream.layers * tokens * self._state_bytes + 3 * self._codes * self.learns_rounding

    @property
    def _codes(self) -> int:
        """Count the weights that are rounded."""
        return sum(math.prod(one.shape) for i in range(self.stream.layers) for one in self.stream.linears(i))

    def groups(self, index: int) -> list[tuple[Linear, ...]]:
        """The linears of block `index`, part by part as bits may differ."""
        return block_groups(self.stream, self.scheme, index)

    @property
    def _profile_bytes(self) -> int:
        if not self.options.allocates:
            return 0
        tokens = self.rows.calibration[: self.options.profiled(self.profile)].ids.numel()
        kept = self.stream.layers + 3  # inputs of all blocks, and gradients
        if self.profile == "measured":
            kept = max(kept, GROUPS_TOGETHER * len(self.groups(0)) * len(self.options.widths()))
        return kept * tokens * self._state_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the output and of the journal beside it."""
        spilled = max(b if b > self.budget else 0 for b in (self._walk_bytes, self._learn_bytes))
        if self._profile_bytes:  # whose states have but a share each of the budget
            spilled = max(spilled, self._walk_bytes + self._profile_bytes)
        taught = self.learns or self.tune_steps
        teacher = self.rows.calibration.ids.numel() * self.options.top_k * 8 if taught else 0
        untied = self.options.rotations != "none" and self.rotation_left_out is None
        rounded = 1 + 2 * self.options.halves + (self.options.tell_apart is not None)  # models at a time
        codes = self._codes * (rounded * (3 if self.learns_rounding else 1) + 8 * self.learns_rounding)
        tables = rounded * len(self.scheme.tables) * self.stream.vocab * self.stream.hidden
        kept = codes + tables + teacher * (2 if self.options.halves else 1)
        return bytes_in_out(self.stream, self.stored_scheme, untied=untied) + spilled + kept + 2**20

    @property
    def rotation_left_out(self) -> str | None:
        """Why the residual rotation is left out, or None."""
        return rotation_left_out(self.stream, self.parts.obstacle, self.scheme, self.stored_scheme, self.options.tied)

    @property
    def stored_scheme(self) -> Scheme | None:
        """None where weights are only transformed; at most as many bytes as this where bits are allocated."""
        if not self.options.allocates:
            return None if self.options.rounding == UNROUNDED else self.scheme
        if self.scheme.weights.is_block_type:
            every = (one for i in range(self.stream.layers) for one in self.stream.linears(i))
            return self.scheme.with_bits(bits_in(every, self.options.block_types()[-1]))
        target = self.options.target_bits
        most = max(self.options.code_widths()) if target is None else math.ceil(target)
        return replace(self.scheme, weights=replace(self.scheme.weights, bits=most))

    def future_output(self, folder: Path) -> FutureOutput:
        """The output of the model in `folder`, for a format to be asked whether it can say that."""
        widths = self.options.widths() if self.options.allocates else ()
        rotates = self.options.rotations != "none" and is_online(self.options, self.scheme)
        return FutureOutput(folder, self.stream, self.scheme, widths, rotates)

    @property
    def exports(self) -> bool:
        """Whether OUT is in another format than the scheme is stored in by itself."""
        return self.options.format not in (None, native_format(self.scheme))

    def exported_bytes(self, folder: Path, *, bits: float | None = None) -> int:
        """Bytes of the output's weights in the format that the options ask for, about; 0 where that is the scheme's
        own.  `bits`: on average; default: those that are asked for, or the most there are to choose from."""
        if not self.exports or self.options.format is None:
            return 0
        untied = self.options.rotations != "none" and self.rotation_left_out is None
        if bits is None and self.options.allocates:
            bits = self.options.target_bits or max(self.options.code_widths())
        return self.future_output(folder).expected_bytes(self.options.format, untied=untied, bits=bits)

    def in_bits(self, target: float, *, whole: bool) -> QuantizationJob:
        """Copy this job, in so many mean bits instead of those that keep a tell-apart rate; if not `whole`, without
        learning and tuning."""
        options = self.options.in_bits(target)
        return replace(self, options=options if whole else options.without_learning())


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
    kinds, embedding, lm_head = types_in_mixture(
        scheme.mixture, stream, options.embedding, options.lm_head, untied=options.tied == "untie"
    )
    scheme = with_tables(scheme, stream, embedding, lm_head)
    ignored = ignored_linears(stream, options.ignore, head=lm_head != NO_TABLE)
    stream, scheme = stream.without(ignored), replace(scheme, ignored=tuple(ignored))
    linears = [one for i in range(stream.layers) for one in stream.linears(i)]
    if scheme.table_name:
        _check_bitsandbytes(options.scheme, config.model_type, linears)
    scheme = _fitting(scheme, linears, kinds, nearest=options.group_size == "auto")
    _check_keys(stream, scheme, options.scheme)
    parts = parts_of(stream)
    check_tied(stream, parts.obstacle, options.tied)
    tokenizer = read_tokenizer(folder)
    positions, task = positions_of(config), TaskRows.of(stream.task, config, tokenizer, folder)
    samples, held_out = (SAMPLES, HELD_OUT) if options.calibrates else (LOOKED_AT, LOOKED_AT)
    rows = draw_rows(
        folder, tokenizer, stream.vocab, options, positions=positions, samples=samples, held_out=held_out, task=task
    )
    for name, reason_of in {"block_steps": unconnected, "tune_steps": untaught, "budget": untaught}.items():
        given = getattr(options, name)
        if given and given not in STEPS_OF_PRESETS.get(name, ()) and (reason := reason_of(stream, rows[0])):
            raise BadInput(
                f"{name.replace('_', '-')}: of {config.model_type} there is no tuning, as {reason}; leave it out"
            )
    if options.limit and (reason := untaught(stream, rows[0]) or unforeseen(stream)):
        raise BadInput(f"limit: needs gradients of every linear's output, and {reason}; leave it out")
    check_budget(options.memory_budget, rows[0].ids.shape[1], stream.hidden, stream.dtype)
    splits = Splits(*rows)
    if options.like is not None:
        apart = len(rows[1].ids) if options.data is not None and options.held_out_data is None else 0
        like = rows_like(
            options.like, tokenizer, stream.vocab, options, most=len(rows[0].ids), apart=apart, positions=positions,
            task=task,
        )  # fmt: skip
        splits = replace(splits, like=_check_like(rows[0], like, stream.hidden))
    job = QuantizationJob(stream, scheme, splits, options, parts, importance_for(stream, options, [out, folder]))
    _check_rotation_block(job)
    _check_served(job)
    _check_reach(job)
    check_destination(out, [folder], job.disk_bytes + _check_format(job, folder))
    return job


def _check_keys(stream: BlockwiseModel, scheme: Scheme, name: str) -> None:
    """Raises BadInput where the model's keys and values cannot be rounded as the scheme of this `name` says."""
    if scheme.kv and not all(stream.attention(i) for i in range(stream.layers)):
        raise BadInput(
            f"scheme {name}: keys and values of {stream.config.model_type} cannot be rounded, as not every block has "
            "attention that is open to it; take one without kv"
        )
    if scheme.has_fixed_keys and (reason := without_place(stream, scheme)):
        raise BadInput(f"scheme {name}: loaders have no place for scales of keys and values, as {reason}; take one "
                       "without kvfp8")  # fmt: skip


def _fitting(scheme: Scheme, linears: Sequence[Linear], kinds: Mapping[str, str], *, nearest: bool) -> Scheme:
    """The scheme as the widths of linears admit it: with the nearest group size, or as it is; of block types each the
    one that fits, of those that a mixture has by name (`kinds`).  Raises BadInput where nothing does."""
    widths = dict.fromkeys((one.name.rpartition(".")[2], one.shape[1]) for one in linears)
    if nearest:
        scheme = scheme.fitted(width for _, width in widths)
    scheme.check_widths(widths)
    return scheme.in_blocks({one.name: one.shape[1] for one in linears}, kinds)


def _check_bitsandbytes(scheme: str, model_type: str, linears: Sequence[Linear]) -> None:
    """Raises BadInput where bitsandbytes cannot hold the weights."""
    if any(one.step for one in linears):
        raise BadInput(
            f"scheme {scheme}: bitsandbytes cannot hold the experts of {model_type}, whose weights transformers "
            "stacks; take another, such as w4a16-g64"
        )
    if any(one.transposed for one in linears):
        raise BadInput(
            f"scheme {scheme}: bitsandbytes does not know weights that are kept as (in, out), as those of {model_type} "
            "are; take another, such as w4a16-g64"
        )


def _check_rotation_block(job: QuantizationJob) -> None:
    """Raises BadInput where the residual rotation cannot be learned in blocks as wide as the options say."""
    stream, group, width = job.stream, job.scheme.weights.group, job.options.rotation_block
    if width is None:
        return
    if reason := job.rotation_left_out:
        raise BadInput(f"rotation-block: the residual stream is not rotated, as {reason}; leave it out")
    if job.parts.centred:
        raise BadInput(
            f"rotation-block: norms of {stream.config.model_type} subtract the mean, which no block would leave alone; "
            "leave it out"
        )
    if stream.hidden % width:
        raise BadInput(f"rotation-block is {width}, and does not divide the hidden size {stream.hidden}; take one that "
                       "does")  # fmt: skip
    if group is not None and group % width and width % group:
        raise BadInput(
            f"rotation-block is {width}, and would cut across groups of {group} weights; take a multiple or a divisor "
            f"of {group}"
        )


def _check_reach(job: QuantizationJob) -> None:
    """Raises BadInput where block types of the model's rows cannot have so many bits on average."""
    target = job.options.target_bits
    if target is None or not job.scheme.weights.is_block_type:
        return
    kinds: dict[int | str, float] = dict.fromkeys(job.options.block_types(), 0.0)
    parts = [LayerGroup.of(part, kinds, {}) for i in range(job.stream.layers) for part in job.groups(i)]
    least, most = least_and_most(parts)
    if not least <= target <= most:
        ends = f"{math.ceil(100 * least) / 100:g} and {math.floor(100 * most) / 100:g}"
        raise BadInput(
            f"target-bits is {target:g}; with candidate-bits {','.join(map(str, kinds))} it must lie between {ends}, "
            "as this model's rows have them"
        )


def _check_served(job: QuantizationJob) -> None:
    """Raises BadInput where vLLM cannot run what there will be, if it is to."""
    if job.options.serve is None:
        return
    check_served(job.stream, job.scheme)
    if job.stream.tied and job.rotation_left_out is None and job.stream.config.model_type in ONE_TABLE_SERVED:
        raise BadInput("serve vllm: vLLM knows one table alone for embedding and head of such models; add --tied keep")


def _check_format(job: QuantizationJob, folder: Path) -> int:
    """Bytes of the output's weights in the format that the options ask for, where that is another than the scheme's.

    Raises BadInput where it cannot say the scheme.
    """
    if (to := job.options.format) is None:
        return 0
    if world_size() > 1:
        raise BadInput(f"format {to}: is written, and run, by one process alone; leave it out, and give OUT to "
                       "parewell export")  # fmt: skip
    check_format(job.future_output(folder), to)
    return job.exported_bytes(folder)


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


def unconnected(stream: BlockwiseModel, rows: Corpus) -> str | None:
    """Why no block is tuned on its own outputs; None where each is."""
    if rows.beside or stream.encoder_blocks or not stream.walk.static:
        return UNFOLLOWED
    return None


def _check_task(stream: BlockwiseModel, options: Quantize) -> None:
    """Raises BadInput for options that are about distributions of words, where the model gives none."""
    for name in ("target_bits", "tell_apart", "halves") if stream.task.embeds else ():
        if getattr(options, name):
            raise BadInput(
                f"{name.replace('_', '-')}: goes by the KL of distributions of words, and this model gives embeddings; "
                "leave it out"
            )


def is_online(options: Quantize, scheme: Scheme) -> bool:
    """Whether Hadamards run in the model."""
    if options.serve is not None:
        return True
    return _below_eight_bits(scheme) if options.online is None else options.online


def _below_eight_bits(scheme: Scheme) -> bool:
    """Whether activations or keys and values have fewer than eight bits."""
    return any(grid is not None and grid.bits < 8 and not grid.is_float for grid in (scheme.activations, scheme.kv))
