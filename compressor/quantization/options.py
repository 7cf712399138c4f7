"""Options of a quantization: arguments of the function, options of the command, and recipe at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, Preset, check_numbers, check_sizes, option, with_preset
from calib.quant.scheme import Scheme
from calib.runtime.choices import DEVICES, PRECISIONS

INITS = ("hadamard", "womi", "identity", "none")  # where rotations start (`compressor.engine.rotations`)
UNROUNDED = "none"  # weights are transformed, and stay in the dtype they are stored in
ROUNDINGS = ("gptq", "rtn", UNROUNDED)
KL_TOPS = ("tail", "partial", "renormalised")  # keys of `calib.losses.top_k.KL_TOP`


QUANTIZE_PRESETS = {  # measured in benchmarks/results/presets.md
    "fast": Preset("no learning, minutes", {"learn": False}),
    "default": Preset("100 steps of learning, 50 of tuning", {}),
    "best": Preset("300 steps of learning, 150 of tuning", {"steps": 300, "tune_steps": 150}),
}


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Options of a quantization job; also what its recipe records."""

    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    scheme: str = option("w4a16-g64", "what gets how many bits", group="basic")
    group_size: str | None = option(
        None,
        "weights that share a scale, a number or 'channel', where the scheme does not say; auto: the scheme's, or "
        "the largest below it that divides every layer's width",
        group="basic",
    )
    target_bits: float | None = option(
        None,
        "mean bits of a weight's code, shared out where they help most; default: all have the scheme's",
        group="basic",
    )
    candidate_bits: str | None = option(
        None, "bits to share out, such as 4,8; default: those within 2 of the target", group="method"
    )
    profile_rows: int | None = option(
        None, "calibration rows by which it is seen where bits help most; default: 4", group="method"
    )
    data: Path | None = option(None, f"calibration rows: {SOURCES}; default: the embedded text", group="data")
    samples: int | None = option(None, "calibration rows; default: 128, or as many as there are", group="data")
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data"
    )
    by_document: bool = option(False, "one document per row, padded, instead of packed rows", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    held_out: int | None = option(
        None,
        "further rows, not calibrated on, that the figures are measured on; default: 16, or fewer of few",
        group="data",
    )
    held_out_data: Path | None = option(
        None, "take the held-out rows from the start of this file instead", group="data"
    )
    init: str = option("hadamard", "where rotations start; none: no transforms at all", choices=INITS, group="method")
    learn: bool = option(True, "learn the transforms", group="basic")
    steps: int = option(100, "steps of learning", group="method")
    batch: int = option(4, "rows per step", group="method")
    lr_rotation: float = option(0.1, "learning rate of rotations, about radians per step", group="method")
    lr_scale: float = option(0.02, "learning rate of the scales' logarithms", group="method")
    loss: str = option("tail", "which KL-Top is learned", choices=KL_TOPS, group="method")
    top_k: int = option(256, "tokens kept of each of the float model's distributions", group="method")
    cross_entropy: float = option(0.0, "weight of plain cross-entropy beside the loss", group="method")
    tune_steps: int | None = option(
        None,
        "steps of tuning scales and norm gains after rounding, codes fixed; default: 50 after learning, else 0",
        group="method",
    )
    lr_tune: float = option(0.005, "learning rate of the tuned factors' logarithms", group="method")
    rounding: str = option(
        "gptq",
        "how codes are chosen; none: weights are transformed only, for parewell export",
        choices=ROUNDINGS,
        group="method",
    )
    damping: float = option(0.01, "GPTQ's ridge, as a fraction of the mean diagonal of X^T X", group="method")
    untie: bool | None = option(
        None, "store a tied embedding twice, so that the residual stream can be rotated; default: where activations "
        "are quantized, or that adds at most 10% to OUT", group="method"
    )  # fmt: skip
    online: bool | None = option(
        None,
        "run-time Hadamards, which only compressor.load can run; default: where activations or keys have < 8 bits",
        group="method",
    )
    memory_budget: float | None = option(
        None, "GiB of RAM for hidden states (else on disk) and a block's graph (else remade); default: 2 or a quarter "
        "of what is available, beside a GPU a quarter"
    )  # fmt: skip
    device_memory: float | None = option(
        None, "GiB of a GPU's memory that may be taken; default: what is free. What has no room there waits in RAM"
    )
    halves: bool = option(
        False, "run the job on each half of the calibration rows too: whether more would help", group="proof"
    )
    seed: int = option(0, "seed of rotations, rows and batches")
    device: str = option("auto", "where to compute", choices=DEVICES, group="basic")
    precision: str = option(
        "auto", "of the matrix products in a block; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    @classmethod
    def preset(cls, name: str, **given: Any) -> Quantize:
        """Options by the name of a preset.

        Args:
            name: a key of QUANTIZE_PRESETS: fast, default or best.
            given: options that come before the preset's.

        Raises:
            BadInput: the preset is unknown, or options do not go together.
        """
        idle = {"tune_steps"} if given.get("rounding") == UNROUNDED else set[str]()
        idle |= set() if given.get("learn", True) and given.get("init") != "none" else {"steps"}
        return cls(**with_preset(QUANTIZE_PRESETS, name, given, idle))

    def __post_init__(self) -> None:
        check_numbers(self)
        check_sizes(self)
        self._name_scheme()
        at_least = {"samples": 1, "length": 2, "held_out": 1, "steps": 1, "batch": 1, "top_k": 1, "tune_steps": 0,
                    "profile_rows": 1}  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr_rotation", "lr_scale", "lr_tune", "cross_entropy", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name, allowed in (("init", INITS), ("loss", KL_TOPS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(allowed)}")
        if self.halves and self.samples == 1:
            raise BadInput("samples is 1, and has no halves; take more, or leave out --halves")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed is {self.seed}; it must lie between 0 and 2^63")
        if self.init == "none" and self.learn:
            raise BadInput("init none leaves nothing to learn; add --no-learn or choose another init")
        if self.init == "none" and self.online:
            raise BadInput("init none means no transforms, online ones included; leave out --online")
        if self.init == "none" and self.untie is not None:
            raise BadInput("init none rotates nothing, and leaves embedding and head as they are; leave out --untie")
        if self.rounding == UNROUNDED:
            self._check_unrounded()
        self._check_mixed()

    def _name_scheme(self) -> None:
        """Have the scheme's full name as `scheme`, with the group size that was asked for.  Raises BadInput."""
        scheme, size = Scheme.parse(self.scheme), self.group_size
        if size not in (None, "auto"):
            if size != "channel" and not (size.isdecimal() and int(size) > 0):
                raise BadInput(f"group-size '{size}': is no number; write one such as 128, or channel, or auto")
            found = scheme.with_group(None if size == "channel" else int(size))
            if scheme.table_name or (found != scheme and Scheme.says_group(self.scheme)):
                raise BadInput(f"group-size is {size}, but scheme {self.scheme} has its own; leave one of them out")
            scheme, size = found, None
        object.__setattr__(self, "scheme", scheme.name)
        object.__setattr__(self, "group_size", size)

    def _check_mixed(self) -> None:
        """Raises BadInput where bits cannot be shared out as asked for."""
        if self.target_bits is None:
            for name in ("candidate_bits", "profile_rows"):
                if getattr(self, name) is not None:
                    words = name.replace("_", "-")
                    raise BadInput(f"{words}: is about bits that are shared out; add --target-bits, or leave it out")
            return
        if not 2 <= self.target_bits <= 8:
            raise BadInput(f"target-bits is {self.target_bits}; it must lie between 2 and 8")
        if Scheme.parse(self.scheme).table_name:
            raise BadInput(f"scheme {self.scheme}: has 4 bits for every weight; leave out --target-bits, or take w4a16")
        if self.rounding == UNROUNDED:
            raise BadInput("rounding none leaves no codes to share bits out to; leave out --target-bits")
        widths = self.shared_out()
        if not min(widths) <= self.target_bits <= max(widths):
            raise BadInput(
                f"target-bits is {self.target_bits}; with candidate-bits {self.candidate_bits} it must lie between "
                f"{min(widths)} and {max(widths)}"
            )

    def shared_out(self) -> list[int]:
        """The widths among which every part of the model gets one, ascending."""
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

    @property
    def shown(self) -> int:
        """Calibration rows by which it is seen where bits help most."""
        return 4 if self.profile_rows is None else self.profile_rows

    def _check_unrounded(self) -> None:
        """Raises BadInput where something asks for codes that there will not be."""
        scheme = Scheme.parse(self.scheme)
        if scheme.activations or scheme.kv or self.online:
            raise BadInput("rounding none leaves a plain model, which rounds and rotates nothing as it runs; "
                           f"take --scheme {scheme.weights_only().name} and leave out --online")  # fmt: skip
        if self.tune_steps:
            raise BadInput("rounding none leaves no scales to tune; leave out --tune-steps")
        if self.init == "none":
            raise BadInput("rounding none and init none would change nothing; leave one of them out")
