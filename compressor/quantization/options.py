"""Options of a quantization: arguments of the function, options of the command, and recipe at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, Preset, check_options, flag_name, option, with_preset
from calib.quant.block_types import BLOCK_TYPES
from calib.quant.mixtures import MIXTURES
from calib.quant.scheme import Scheme, table_grid
from calib.runtime.choices import DEVICES, PRECISIONS
from compressor.exporters.options import STORED_FORMATS

INITS = ("hadamard", "womi", "identity", "none")  # where rotations start (`compressor.engine.rotations`)
UNROUNDED = "none"  # weights are transformed, and stay in the dtype they are stored in
NO_TABLE = "none"  # the embedding or the head stays in the dtype it is stored in
AUTO_TABLE = "auto"  # it does, but for a mixture of llama.cpp's, which has a type for it
TIED = ("auto", "keep", "untie", "light")  # what becomes of one table that is embedding and head


@dataclass(frozen=True)
class RoundingEntry:
    """A rounding method's module in `compressor.quantization`, whose ENTRIES has it by its name, and the names of the
    options that it reads."""

    module: str
    options: tuple[str, ...] = ()


# To add a rounding method: a function in a file of its own, in ENTRIES, and a line here.
ROUNDINGS = {"gptq": RoundingEntry("gptq", ("damping",)), "rtn": RoundingEntry("rounding")}
_TRAINING = "budget|block_steps|tune_steps|learn=True"  # what learning and tuning share
_ANSWERS = "budget|tune_steps|learn=True"  # what descends on the model's answers, and not on a block's outputs
BLOCK_STEPS, TUNE_STEPS = 75, 50  # where nobody says how many
_BLOCKS_A_STEP = 2  # of a budget's steps, those of each block for one of the whole model
LADDER = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")  # block types that mean bits are allocated from
PROFILES = {"sensitivity": 16, "measured": 4}  # and the rows that each takes by default
KL_TOPS = ("tail", "partial", "renormalised")  # keys of `calib.losses.top_k.KL_TOP`


QUANTIZE_PRESETS = {  # chosen in docs/LOG.md, under blocks that go down by Adam's steps
    "fast": Preset("blocks tuned in 50 steps each, minutes", {"block_steps": 50, "tune_steps": 0}),
    "default": Preset("blocks tuned in 75 steps each, the whole model in 50", {}),
    "best": Preset(
        "300 and 200 steps; with --budget 2h as many as there is time for, two of each block for one of the model",
        {"block_steps": 300, "tune_steps": 200},
    ),
}

# Steps that nobody asked for by number: a model that cannot be tuned does without.
STEPS_OF_PRESETS = {
    name: {preset.values.get(name) for preset in QUANTIZE_PRESETS.values()} for name in ("block_steps", "tune_steps")
}

QUANTIZE_RECIPES = {
    "ostquant": Preset(
        "as OSTQuant was released (OpenReview rAcgDBdKnP), with scalings that leave the model alone: rotations and "
        "scalings learned in 100 steps of 16 rows on its KL-Top, Hadamards at run time, GPTQ, no tuning",
        {
            "learn": True, "init": "womi", "steps": 100, "batch": 16, "loss": "partial", "top_k": 1000, "online": True,
            "block_steps": 0, "tune_steps": 0,
        },
    ),
}  # fmt: skip


def rate_of(asked: str | float) -> float:
    """Read a tell-apart rate: "52%" or 0.52 -> 0.52.  Raises BadInput."""
    text, percent = str(asked).strip(), str(asked).strip().endswith("%")
    try:
        rate = float(text.removesuffix("%"))
    except ValueError:
        raise BadInput(f"tell-apart '{asked}': is no rate; write one such as 52% or 0.52") from None
    rate = round(rate / 100, 12) if percent else rate
    if not 0.5 < rate < 1:
        raise BadInput(
            f"tell-apart is {asked}; write a rate between 50%, which is guessing, and 100%, both excluded, such as 52%"
        )
    return rate


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(asked: str) -> float:
    """Read a time: "90s", "30m", "1.5h" -> seconds.  Raises BadInput."""
    text = asked.strip().lower()
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise BadInput(f"budget '{asked}': is no time; write one such as 90s, 30m or 2h")
    return seconds


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Options of a quantization job; also what its recipe records."""

    base_model: Path | None = option(
        None, "base model of MODEL where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize MODEL first, where it is GGUF, FP8 or the like")
    scheme: str = option(
        "w4a16-g64", "bits and group size of weights, activations, keys and values; see below", group="basic"
    )
    group_size: str | None = option(
        None,
        "weights that share a scale, where the scheme does not say: a number, 'channel', or 'auto' (the scheme's, or "
        "the largest below it that divides every layer's width)",
        group="basic",
    )
    target_bits: float | None = option(
        None,
        "mean bits per weight, allocated to the layers where they help most; with a block type of llama.cpp's, such as "
        "q4_k, those of its blocks, scales included; default: the scheme's bits everywhere",
        group="basic",
        ge=2,
        le=8,
    )
    format: str | None = option(
        None,
        "format of OUT, see parewell formats; default: compressed-tensors, bitsandbytes for nf4 and fp4, blocks that "
        "parewell alone reads for q4_k and the like",
        choices=STORED_FORMATS,
        group="basic",
    )
    tell_apart: str | float | None = option(
        None,
        "take the fewest mean bits that keep this tell-apart rate on the held-out rows, such as 52%",
        group="basic",
    )
    candidate_bits: str | None = option(
        None,
        "bits to choose from, such as 4,8, or block types, such as q3_k,q4_k,q6_k; default: those within 2 of the "
        "target, 2 to 8 for a tell-apart rate",
        group="method",
        needs="tell_apart|target_bits",
    )
    profile: str = option(
        "sensitivity",
        "how bit allocation learns what each part suffers: predicted by one backward pass, or measured one by one",
        choices=tuple(PROFILES),
        group="method",
        needs="tell_apart|target_bits",
    )
    profile_rows: int | None = option(
        None,
        "calibration rows that bit allocation is based on; default: 16, or 4 where it is measured",
        group="method",
        ge=1,
        needs="tell_apart|target_bits",
    )
    data: Path | None = option(None, f"calibration rows: {SOURCES}; default: the embedded text", group="data")
    samples: int | None = option(
        None, "calibration rows; default: 128, or as many as there are; 4 where they decide nothing", group="data", ge=1
    )
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data", ge=2
    )
    imatrix: Path | None = option(
        None, "take how much columns count as scales of llama.cpp's block types are searched for from this importance "
        "matrix (GGUF), in place of the calibration rows", group="data",
    )  # fmt: skip
    imatrix_out: Path | None = option(
        None, "also write the importance matrix of the calibration rows to this file, for llama-quantize --imatrix",
        group="data",
    )  # fmt: skip
    by_document: bool = option(False, "one document per row, padded, instead of packed rows", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    held_out: int | None = option(
        None,
        "rows held out of calibration, on which figures are measured; default: 16 (4 without calibration), or fewer "
        "where there are few",
        group="data",
        ge=1,
    )
    held_out_data: Path | None = option(
        None, "take the held-out rows from the start of this file instead", group="data"
    )
    init: str | None = option(
        None,
        "initial rotations; none: no transforms at all; default: hadamard where activations, keys or values become "
        "whole numbers or transforms are learned; else none, or hadamard where that is better on a few rows and costs "
        "no second table",
        choices=INITS,
        group="method",
    )
    learn: bool | None = option(
        None, "learn the transforms; default: not, unless options of learning are given", group="basic"
    )
    steps: int = option(100, "training steps of the transforms", group="method", ge=1, needs="learn=True")
    batch: int = option(4, "rows per training step", group="method", ge=1, needs=_TRAINING)
    rotation_block: int | None = option(
        None,
        "learn the residual rotation in blocks of so many coordinates, behind the Hadamard that it starts as; default: "
        "whole",
        group="method",
        ge=2,
        needs="learn=True",
    )
    lr_rotation: float = option(
        0.1, "learning rate of rotations, in about radians per step", group="method", ge=0, needs="learn=True"
    )
    lr_scale: float = option(0.02, "learning rate of the scales' logarithms", group="method", ge=0, needs="learn=True")
    loss: str = option("tail", "variant of the KL-Top loss", choices=KL_TOPS, group="method", needs=_ANSWERS)
    top_k: int = option(
        256, "most likely tokens kept of each of the float model's distributions", group="method", ge=1,
        needs=_ANSWERS,
    )  # fmt: skip
    cross_entropy: float = option(
        0.0, "weight of cross-entropy, added to the loss", group="method", ge=0, needs=_ANSWERS
    )
    block_steps: int | None = option(
        None,
        "steps that tune each block on its own outputs, right after it is rounded; default: 75, or 0 with --no-learn",
        group="method",
        ge=0,
    )
    tune_steps: int | None = option(
        None,
        "steps that tune codes, scales and norm gains after rounding; default: 50, or 0 with --no-learn",
        group="method",
        ge=0,
    )
    budget: str | None = option(
        None,
        "time that the whole job may take, such as 30m or 2h: as many steps of tuning as there is time for, two of "
        "each block for one of the whole model",
        group="basic",
    )
    lr_tune: float = option(0.002, "learning rate of that tuning", group="method", ge=0, needs=_TRAINING)
    learn_rounding: bool | None = option(
        None,
        "let tuning move codes as well; default: that of blocks, and that of the whole model where blocks are not "
        "tuned",
        group="method",
    )
    lr_rounding: float = option(
        0.01,
        "learning rate of codes in tuning of the whole model, in distances between levels per step",
        group="method",
        ge=0,
        needs=_TRAINING,
    )
    rounding: str = option(
        "auto",
        "rounding method; none: weights are only transformed, for parewell export; auto: gptq, or rtn for FP8 weights",
        choices=("auto", *ROUNDINGS, UNROUNDED),
        group="method",
    )
    damping: float = option(
        0.01, "GPTQ's ridge, as a fraction of the mean diagonal of X^T X", group="method", ge=0, needs="rounding=gptq"
    )
    float_target: bool | None = option(
        None,
        "have GPTQ round one linear after the other, towards what the float model gives, as GPTAQ and Qronos do; "
        "default: where a model cannot be tuned and activations have 8 bits or more",
        group="method",
        needs="rounding=gptq",
    )
    embedding: str = option(
        AUTO_TABLE, "round the embedding, too: w8 with a scale per row, w4-g64 with one per 64 weights; where it is "
        "tied and --lm-head is not given, it stays the head; auto: none, or as llama.cpp has it in a mixture such as "
        "q4_k_m", group="basic"
    )  # fmt: skip
    lm_head: str = option(
        AUTO_TABLE,
        "round the head, too, such as w8; where it is tied it becomes a table of its own; auto: as --embedding has it",
        group="basic",
    )
    ignore: tuple[str, ...] = option(
        (), "linears that stay in 16 bits: a module's name, or re: and a regular expression; may be given repeatedly",
        group="method",
    )  # fmt: skip
    tied: str = option(
        "auto",
        "a tied embedding: keep it one table, which leaves the residual stream as it is, or untie it, so that the "
        "stream can be rotated; auto: keep where weights alone are quantized, untie where activations are; light: "
        "untie there, and where that adds at most 10% to OUT",
        choices=TIED, group="method",
    )  # fmt: skip
    online: bool | None = option(
        None,
        "Hadamard transforms at run time, which only parewell.load runs; default: below 8 bits of activations or keys",
        group="method",
    )
    serve: str | None = option(
        None,
        "vllm: Hadamard transforms at run time that vLLM runs, too, of powers of two in width; for integer activations",
        choices=("vllm",),
        group="method",
    )
    memory_budget: float | None = option(
        None, "GiB of RAM for hidden states (else on disk) and a block's graph (else remade); default: 2 or a quarter "
        "of what is available, beside a GPU a quarter", ge=0,
    )  # fmt: skip
    device_memory: float | None = option(
        None,
        "GiB of a GPU's memory to use; default: what is free. The rest waits in RAM",
        ge=0,
    )
    halves: bool = option(
        False,
        "also run the job on each half of the calibration rows, to estimate whether more would help",
        group="proof",
    )
    limit: bool = option(
        False,
        "also find how few bits any Gaussian code would need at the KL that is reached",
        group="proof",
        needs="tell_apart|target_bits",
    )
    like: Path | None = option(
        None,
        "rows like those of deployment: also find at which block the calibration rows differ from them",
        group="proof",
    )
    seed: int = option(0, "seed of rotations, rows and batches", ge=0)
    device: str = option("auto", "where to compute", choices=DEVICES, group="basic")
    precision: str = option(
        "auto", "precision of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    @classmethod
    def preset(cls, name: str, **given: Any) -> Quantize:
        """Options by the name of a preset, or of a published recipe.

        Args:
            name: a key of QUANTIZE_PRESETS (fast, default or best) or of QUANTIZE_RECIPES (ostquant).
            given: options that come before the preset's.

        Raises:
            BadInput: the preset is unknown, or options do not go together.
        """
        if name in QUANTIZE_RECIPES:
            scheme = Scheme.parse(given.get("scheme", cls.scheme))
            start = {} if scheme.activations else {"init": "hadamard", "tied": "untie"}  # as its scripts have it
            return cls(**with_preset(QUANTIZE_RECIPES, name, start | given))
        without = given.get("rounding") == UNROUNDED or given.get("learn") is False
        idle = {"block_steps", "tune_steps"} if without or given.get("budget") else set[str]()
        return cls(**with_preset(QUANTIZE_PRESETS | QUANTIZE_RECIPES, name, given, idle))

    def without_learning(self, **changes: Any) -> Quantize:
        """Copy these options, with learning and tuning left out.

        Args:
            changes: options that get other values.

        Raises:
            BadInput: the options do not go together.
        """
        return replace(self, **(self.learning_left_out() | changes))

    def learning_left_out(self) -> dict[str, Any]:
        """Options that leave out learning and tuning, and those that mean nothing then as by default."""
        idle = {f.name: f.default for f in fields(self) if "learn=True" in (f.metadata.get("needs") or "")}
        steps = {name: 0 if getattr(self, name) else getattr(self, name) for name in ("block_steps", "tune_steps")}
        init = self.init if self.rotations == "none" else self.rotations
        return idle | steps | {"learn": False, "learn_rounding": None, "budget": None, "init": init}

    def __post_init__(self) -> None:
        if self.tell_apart is not None:
            object.__setattr__(self, "tell_apart", rate_of(self.tell_apart))
        if self.rounding == "auto":
            object.__setattr__(self, "rounding", "rtn" if self.has_float_weights else "gptq")
        check_options(self)
        self._name_scheme()
        self._check_training()
        if self.halves and self.samples == 1:
            raise BadInput("samples is 1, and has no halves; take more, or leave out --halves")
        if self.init == "none" and self.learns:
            raise BadInput(
                "init none leaves nothing to learn; leave out --learn and its options, or choose another init"
            )
        if self.rotation_block is not None and self.rotations == "womi":
            raise BadInput("rotation-block: blocks are learned behind a Hadamard, which womi does not start as; take "
                           "--init hadamard or identity, or leave it out")  # fmt: skip
        if self.init == "none" and self.online:
            raise BadInput("init none means no transforms, online ones included; leave out --online")
        if self.init == "none" and self.tied == "untie":
            raise BadInput("init none rotates nothing, and leaves embedding and head as they are; leave out --tied "
                           "untie")  # fmt: skip
        self._check_served(Scheme.parse(self.scheme))
        self._check_tables()
        if self.lr_rounding != Quantize.lr_rounding:
            if self.learn_rounding is False:
                raise BadInput("lr-rounding: changes nothing with --no-learn-rounding; leave it out")
            if not self.moves_codes and self.block_tuned:
                raise BadInput(
                    "lr-rounding: is for tuning of the whole model, which leaves codes that blocks were tuned with; "
                    "add --learn-rounding, or --block-steps 0"
                )
        if self.learn_rounding and not self.tuned and not self.block_tuned:
            raise BadInput("learn-rounding moves codes in tuning, of which there is none here; give --tune-steps, or "
                           "leave it out")  # fmt: skip
        if self.budget is not None:
            self._check_budget(self.budget)
        if self.rounding == UNROUNDED:
            self._check_unrounded()
        self._check_mixed()
        self._check_imatrix(Scheme.parse(self.scheme))
        if self.like is not None and not self.calibrates:
            raise BadInput(
                f"like {self.like}: this job has no calibration data to compare, as rounding {self.rounding} without "
                "learning reads none; leave it out"
            )

    @property
    def tuned(self) -> int:
        """Steps of tuning that are asked for, or that are the default; of a budget, the fewest."""
        if self.budget is not None:
            return 1
        if self.tune_steps is None:
            return 0 if self._is_untuned else TUNE_STEPS
        return self.tune_steps

    @property
    def block_tuned(self) -> int:
        """Steps of tuning of each block that are asked for, or that are the default; of a budget, the fewest."""
        if self.block_steps is None:
            if self.budget is not None:
                return _BLOCKS_A_STEP
            return 0 if self._is_untuned else BLOCK_STEPS
        return self.block_steps

    @property
    def has_float_weights(self) -> bool:
        """Whether weights become FP8, which is near enough to them that nothing is learned unless that is asked for."""
        return Scheme.parse(self.scheme).weights.is_float8

    @property
    def _is_untuned(self) -> bool:
        """Whether nothing is tuned where nobody says how long."""
        return self.learn is False or self.rounding == UNROUNDED or self.has_float_weights

    @property
    def moves_codes(self) -> bool:
        """Whether tuning of the whole model moves codes, where there is any."""
        return not self.block_tuned if self.learn_rounding is None else self.learn_rounding

    @property
    def learns(self) -> bool:
        """Whether transforms are learned: where that is asked for, or options of it are given; and where nothing else
        is done."""
        if self.learn is not None:
            return self.learn
        given = any(getattr(self, f.name) != f.default for f in fields(self) if f.metadata.get("needs") == "learn=True")
        return given or (self.rounding == UNROUNDED and self.init != "none")

    @property
    def rotations(self) -> str:
        """Name the rotations that weights are transformed by at first: one of INITS, `none` for no transforms."""
        if self.init is not None:
            return self.init
        scheme = Scheme.parse(self.scheme)
        rounds = scheme.activations is not None and not scheme.activations.is_float
        rotates = rounds or scheme.has_own_keys or self.learns or self.online or self.serve or self.tied == "untie"
        return "hadamard" if rotates or self.rounding == UNROUNDED else "none"

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of the options whose defaults depend on other options, as a recipe records them."""
        found = self.rounding == UNROUNDED or self.budget is not None
        steps, blocks = (self.tune_steps, self.block_steps) if found else (self.tuned, self.block_tuned)
        return {"init": self.rotations, "learn": self.learns, "block_steps": blocks, "tune_steps": steps}

    @property
    def calibrates(self) -> bool:
        """Whether anything that is written depends on calibration rows."""
        scheme = Scheme.parse(self.scheme)
        fixed = scheme.has_fixed_inputs or scheme.has_fixed_keys or self.imatrix_out is not None
        return (
            fixed or self.rounding == "gptq" or self.learns or self.tuned > 0 or self.block_tuned > 0 or self.allocates
        )

    def _name_scheme(self) -> None:
        """Have the scheme's full name as `scheme`, with the group size that was asked for.  Raises BadInput."""
        scheme, size = Scheme.parse(self.scheme), self.group_size
        if size not in (None, "auto"):
            if size != "channel" and not (size.isdecimal() and int(size) > 0):
                raise BadInput(f"group-size '{size}': is no number; write one such as 128, or channel, or auto")
            found = scheme.with_group(None if size == "channel" else int(size))
            fixed = not scheme.weights.is_even
            if fixed or (found != scheme and Scheme.says_group(self.scheme)):
                raise BadInput(f"group-size is {size}, but scheme {self.scheme} has its own; leave one of them out")
            scheme, size = found, None
        object.__setattr__(self, "scheme", scheme.name)
        object.__setattr__(self, "group_size", size)

    def _check_tables(self) -> None:
        """Raises BadInput where embedding and head cannot be rounded as asked for."""
        mixture = Scheme.parse(self.scheme).mixture if self.rounding != UNROUNDED else None
        for name in ("embedding", "lm_head"):
            asked = str(getattr(self, name)).lower()
            if asked == AUTO_TABLE and not mixture:
                asked = NO_TABLE
            object.__setattr__(self, name, asked)
            if asked in (AUTO_TABLE, NO_TABLE):
                continue
            self._check_table(flag_name(name), asked)
            if Scheme.parse(self.scheme).table_name:
                raise BadInput(f"{flag_name(name)} {asked}: bitsandbytes keeps embedding and head in 16 bits; leave it "
                               "out, or take another scheme, such as w4a16-g64")  # fmt: skip
            if self.rounding == UNROUNDED:
                raise BadInput(f"{flag_name(name)} {asked}: rounding none leaves them in 16 bits; leave it out")
        if mixture and self.tied == "light":
            raise BadInput(f"tied light: in {mixture} it decides types of embedding and head whether they are one "
                           "table; take --tied keep or untie")  # fmt: skip
        if self.tied == "keep" and self.lm_head not in (AUTO_TABLE, NO_TABLE):
            raise BadInput("tied keep leaves one table, which --embedding rounds for both; leave out --lm-head, or "
                           "--tied keep")  # fmt: skip
        if self.tied == "keep" and self.rotation_block is not None:
            raise BadInput("rotation-block: is of the residual stream's rotation, which tied keep leaves out; leave "
                           "one of them out")  # fmt: skip

    def _check_served(self, scheme: Scheme) -> None:
        """Raises BadInput where there is no Hadamard at run time that vLLM could run."""
        if self.serve is None:
            return
        if scheme.kv:
            raise BadInput(f"serve vllm: goes with keys and values in 16 bits alone; leave out kv{scheme.kv.kind}, or "
                           "--serve")  # fmt: skip
        if scheme.activations is None or scheme.activations.is_float:
            raise BadInput(f"serve vllm: is for Hadamards beside integer activations, which {self.scheme} does "
                           "without; leave it out")  # fmt: skip
        if self.online is False or self.init == "none":
            given = "no-online" if self.online is False else "init none"
            raise BadInput(f"serve vllm: has a Hadamard run, which --{given} leaves out; leave one of them out")

    def _check_table(self, option: str, asked: str) -> None:
        """Raises BadInput where a table's grid does not go with the scheme's."""
        blocks, grid = Scheme.parse(self.scheme).weights, table_grid(option, asked)
        if blocks.scales in ("e8m0", "e4m3"):
            raise BadInput(f"{option} {asked}: goes with whole numbers and FP8 alone; leave it out, or take another "
                           "scheme, such as w4a16-g64")  # fmt: skip
        if grid.is_block_type and not blocks.is_block_type:
            raise BadInput(f"{option} {asked}: goes with linears in blocks of llama.cpp's alone; take --scheme q4_k, "
                           "or w8 here")  # fmt: skip
        if blocks.is_block_type and not grid.is_block_type:
            raise BadInput(f"{option} {asked}: linears are in blocks of llama.cpp's; take q6_k or q8_0")

    def _check_training(self) -> None:
        """Raises BadInput for options of training where nothing is trained."""
        descends = {
            _ANSWERS: (self.learns or self.tuned, "--learn or --tune-steps"),
            _TRAINING: (self.learns or self.tuned or self.block_tuned, "--learn, --block-steps or --tune-steps"),
        }
        for f in fields(self):
            done, by = descends.get(f.metadata.get("needs") or "", (True, ""))
            if not done and getattr(self, f.name) != f.default:
                raise BadInput(f"{flag_name(f.name)}: changes nothing without {by}; leave it out")

    def _check_budget(self, budget: str) -> None:
        """Raises BadInput where there is no tuning that would fill it, or several jobs would share it."""
        seconds_of(budget)
        if self.tune_steps is not None:
            raise BadInput("tune-steps says how many steps there are, which budget finds; leave one of them out")
        if self.rounding == UNROUNDED:
            raise BadInput("budget is for tuning, and rounding none leaves no scales to tune; leave it out")
        for name, what in (
            ("tell_apart", "tries several widths"),
            ("halves", "runs it on parts of the rows, too"),
        ):
            if getattr(self, name):
                raise BadInput(
                    f"budget is of one job, and {name.replace('_', '-')} {what}; give --tune-steps in its place"
                )

    def within_budget(self, steps: int) -> Quantize:
        """Copy these options, with so many steps of tuning in place of the time that they were found for; and twice as
        many of each block, where nobody says how many."""
        blocks = steps * _BLOCKS_A_STEP if self.block_steps is None else self.block_steps
        return replace(self, budget=None, block_steps=blocks, tune_steps=steps)

    def _check_imatrix(self, scheme: Scheme) -> None:
        """Raises BadInput where nothing would go by an importance matrix, or it would be of other inputs."""
        if self.imatrix is None:
            return
        if not scheme.weights.is_block_type or self.rounding == UNROUNDED:
            raise BadInput("imatrix: goes with linears in blocks of llama.cpp's alone; take --scheme q4_k_m, or leave "
                           "it out")  # fmt: skip
        if self.rotations != "none":
            raise BadInput("imatrix: is of the inputs that the model has, and rotations change them; add --init none, "
                           "or leave it out")  # fmt: skip

    def _check_mixed(self) -> None:
        """Raises BadInput where bits cannot be allocated as asked for."""
        if not self.allocates:
            return
        if self.tell_apart is not None and self.target_bits is not None:
            raise BadInput("tell-apart finds the bits that target-bits fixes; leave one of them out")
        asked = "--target-bits" if self.tell_apart is None else "--tell-apart"
        scheme = Scheme.parse(self.scheme)
        if scheme.mixture:
            base = MIXTURES[scheme.mixture].base
            raise BadInput(f"scheme {self.scheme}: has llama.cpp's type for every tensor; leave out {asked}, or take "
                           f"{base}")  # fmt: skip
        if scheme.weights.is_block_type and self.tell_apart is not None:
            raise BadInput(f"scheme {self.scheme}: bits are looked for among whole numbers; leave out {asked}, or take "
                           "--target-bits")  # fmt: skip
        if not scheme.weights.is_even and not scheme.weights.is_block_type:
            raise BadInput(
                f"scheme {self.scheme}: has {scheme.weights.bits} bits for every weight; leave out {asked}, or take "
                "w4a16"
            )
        if self.rounding == UNROUNDED:
            raise BadInput(f"rounding none leaves no codes to allocate bits to; leave out {asked}")
        if scheme.weights.is_block_type:
            self.block_types()  # whose bits are those of the model's rows
            return
        widths = self.code_widths()
        if self.target_bits is not None and not min(widths) <= self.target_bits <= max(widths):
            raise BadInput(
                f"target-bits is {self.target_bits}; with candidate-bits {self.candidate_bits} it must lie between "
                f"{min(widths)} and {max(widths)}"
            )

    @property
    def allocates(self) -> bool:
        """Whether groups of linears get widths of their own."""
        return self.target_bits is not None or self.tell_apart is not None

    def in_bits(self, target: float) -> Quantize:
        """Copy these options, with mean bits in place of the tell-apart rate that they are found for."""
        candidates = ",".join(str(bits) for bits in self.code_widths())
        return replace(self, tell_apart=None, target_bits=target, candidate_bits=candidates)

    def widths(self) -> list[int | str]:
        """Widths among which every group of linears gets one, ascending: bits, or block types."""
        blocks = Scheme.parse(self.scheme).weights.is_block_type
        return [*self.block_types()] if blocks else [*self.code_widths()]

    def block_types(self) -> list[str]:
        """Block types of llama.cpp's among which every linear gets one, ascending in bits.  Raises BadInput."""
        bits = {name: kind.bits_per_weight for name, kind in BLOCK_TYPES.items()}
        if self.candidate_bits is None:
            assert self.target_bits is not None
            return [kind for kind in LADDER if abs(bits[kind] - self.target_bits) < 2]
        kinds = {word.strip().lower() for word in self.candidate_bits.split(",")}
        if len(kinds) < 2 or not kinds <= set(bits):
            raise BadInput(
                f"candidate-bits '{self.candidate_bits}': write two or more block types with commas between, such as "
                f"q3_k,q4_k,q6_k; there are {', '.join(bits)}"
            )
        return sorted(kinds, key=lambda kind: (bits[kind], kind))

    def code_widths(self) -> list[int]:
        """Bits of a code among which every group of linears gets one, ascending.  Raises BadInput."""
        if self.candidate_bits is None and self.target_bits is None:
            return list(range(2, 9))
        if self.candidate_bits is None:
            assert self.target_bits is not None
            return [bits for bits in range(2, 9) if abs(bits - self.target_bits) < 2]
        try:
            widths = {int(word) for word in self.candidate_bits.split(",")}
        except ValueError:
            widths = set()
        if len(widths) < 2 or not widths <= set(range(2, 9)):
            raise BadInput(
                f"candidate-bits '{self.candidate_bits}': write two or more from 2 to 8 with commas between, such as "
                "4,8"
            )
        return sorted(widths)

    def profiled(self, profile: str) -> int:
        """Calibration rows that bit allocation is based on by one of PROFILES."""
        return PROFILES[profile] if self.profile_rows is None else self.profile_rows

    def _check_unrounded(self) -> None:
        """Raises BadInput where something asks for codes that there will not be."""
        scheme = Scheme.parse(self.scheme)
        if scheme.activations or scheme.kv or self.online:
            raise BadInput("rounding none leaves a plain model, which rounds and rotates nothing as it runs; "
                           f"take --scheme {scheme.weights_only().name} and leave out --online")  # fmt: skip
        for name in ("block_steps", "tune_steps"):
            if getattr(self, name):
                raise BadInput(f"rounding none leaves no scales to tune; leave out --{flag_name(name)}")
        if self.init == "none":
            raise BadInput("rounding none and init none would change nothing; leave one of them out")
        if self.format is not None:
            raise BadInput(f"format {self.format}: is one of codes, of which rounding none leaves none; leave it out, "
                           "and give OUT to parewell export")  # fmt: skip
