"""Options of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, Preset, check_numbers, check_sizes, option, with_preset
from calib.quant.scheme import Scheme
from calib.runtime.choices import BALANCES, DEVICES, OPTIMIZERS, PRECISIONS
from compressor.distillation.loss_syntax import EXITS, LABELED, LOSS_NAMES, STATES, read_terms
from compressor.distillation.loss_syntax import check_terms as check_losses

TEACHER_MODES = ("online", "top-k", "drawn")
DISTILLATION_TASKS = ("causal-lm", "sequence-classification")


@dataclass(frozen=True)
class StudentSize:
    """How much the student keeps.  None: all that the teacher has."""

    layers: int | None = None
    heads: int | None = None  # query heads
    ffn: int | None = None
    hidden: int | None = None


DISTILL_PRESETS = {  # measured in benchmarks/results/presets.md
    "fast": Preset("50 steps", {"steps": 50}),
    "default": Preset("200 steps", {}),
    "best": Preset("1000 steps", {"steps": 1000}),
}


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Options of a distillation; also what its recipe records."""

    task: str = option("causal-lm", "what the models do", DISTILLATION_TASKS, group="basic")
    base_model: Path | None = option(None, "base of TEACHER, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that TEACHER stands for, where it is GGUF, FP8 or the like")
    student: Path | None = option(
        None, "the student, also OUT of quantize; default: made from the teacher", group="basic"
    )
    layers: int | None = option(None, "blocks of a student made from the teacher", group="basic")
    heads: int | None = option(None, "its query heads", group="basic")
    ffn: int | None = option(None, "its feed-forward width", group="basic")
    hidden: int | None = option(None, "its hidden width", group="basic")
    student_scheme: str | None = option(None, "train the student fake-quantized, and write it quantized", group="basic")
    data: Path | None = option(None, f"training rows: {SOURCES}; default: the embedded text", group="data")
    samples: int | None = option(None, "training rows; default: all there are", group="data")
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data"
    )
    by_document: bool = option(False, "one document per row, padded, instead of packed rows", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    answers_only: bool = option(False, "learn answers, not prompts", group="data")
    held_out: int | None = option(
        None,
        "further rows, not trained on, that the figures are measured on; default: 16, or fewer of few",
        group="data",
    )
    held_out_data: Path | None = option(
        None, "take the held-out rows from the start of this file instead", group="data"
    )
    loss: str = option(
        "forward-kl", f"a sum such as 0.5*ce+js(0.9)+0.1*sinkhorn, of {', '.join(LOSS_NAMES)}", group="basic"
    )
    temperature: float = option(
        1.0, "that both models' logits are divided by (in losses that compare distributions)", group="method"
    )
    force: bool = option(False, "allow a loss that is blind to which row got which answer", group="method")
    balance: str = option(
        "none", "weigh losses anew as they go: by gradient norm, by how they converge", BALANCES, group="method"
    )
    project: bool = option(False, "learn projections where hidden states of other widths are compared", group="method")
    teacher: str = option(
        "online", "how the teacher answers: as the student learns, or once and kept", TEACHER_MODES, group="method"
    )
    cache: Path | None = option(
        None, "folder to keep what the teacher said for other jobs; default: beside OUT", group="method"
    )
    top_k: int = option(64, "tokens kept of each of the teacher's distributions, or drawn from it", group="method")
    teacher_bits: str = option(
        "none", "load the teacher in fewer bits (bitsandbytes)", ("none", "nf4", "int8"), group="method"
    )
    teacher_rows: int = option(0, "further training rows, which the teacher writes itself", group="method")
    on_policy: float = option(
        0.0, "share of rows that the student writes itself and the teacher answers", group="method"
    )
    steps: int = option(200, "steps of training", group="basic")
    batch: int = option(4, "rows per step", group="method")
    micro_batch_tokens: int = option(
        4096, "tokens that pass through the student together; more rows than that accumulate"
    )
    lr: float = option(1e-3, "learning rate", group="basic")
    lr_scale: float = option(1e-3, "learning rate of the logarithms of a quantized student's scales", group="method")
    warmup: int = option(10, "steps over which the rate rises", group="method")
    max_grad_norm: float = option(1.0, "greatest norm of a step's gradient", group="method")
    decay: float = option(0.0, "weight decay", group="method")
    ema: float = option(
        0.0, "decay of an exponential moving average of the weights, which is what is written", group="method"
    )
    optimizer: str = option("adamw", "adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS)
    gradient_checkpointing: bool = option(False, "make activations again on the way back, to hold fewer")
    shard: bool = option(False, "share the student's blocks out among torchrun's processes (FSDP2)")
    lora: int = option(0, "train adapters of this rank only (peft)", group="method")
    merge: bool = option(False, "merge the adapters into the student that is written", group="method")
    memory_budget: float | None = option(
        None, "GiB of RAM for the teacher's hidden states while it is walked; default: 2 or a quarter of what is "
        "available, beside a GPU a quarter"
    )  # fmt: skip
    seed: int = option(0, "seed of rows and of what is drawn")
    device: str = option("auto", "where to compute", DEVICES, group="basic")
    precision: str = option("auto", "of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", PRECISIONS)

    @classmethod
    def preset(cls, name: str, **given: Any) -> Distill:
        """Options by the name of a preset.

        Args:
            name: a key of DISTILL_PRESETS: fast, default or best.
            given: options that come before the preset's.

        Raises:
            BadInput: the preset is unknown, or options do not go together.
        """
        return cls(**with_preset(DISTILL_PRESETS, name, given))

    def __post_init__(self) -> None:
        if self.student_scheme is not None:
            object.__setattr__(self, "student_scheme", Scheme.parse(self.student_scheme).name)
        least = {"samples": 1, "length": 2, "held_out": 1, "top_k": 1, "steps": 1, "batch": 1, "micro_batch_tokens": 1}
        least |= {"warmup": 0, "lora": 0, "teacher_rows": 0}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        check_numbers(self)
        check_sizes(self)
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"{name} is {getattr(self, name)}; it must be positive")
        if not 1e-3 <= self.temperature <= 1e3:
            raise BadInput(f"temperature is {self.temperature}; it must be positive, from 0.001 to 1000")
        if self.steps * self.batch > 10**9:
            raise BadInput(f"steps: {self.steps} of {self.batch} rows are more than a job may take, 10^9 rows")
        for name in ("lr_scale", "decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.on_policy <= 1 or not 0 <= self.ema < 1:
            raise BadInput("on-policy must lie between 0 and 1, ema between 0 and less than 1")
        known = {
            "task": DISTILLATION_TASKS,
            "balance": BALANCES,
            "teacher": TEACHER_MODES,
            "teacher_bits": ("none", "nf4", "int8"),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(allowed)}")
        terms = read_terms(self.loss)
        check_losses(
            terms,
            teacher=self.teacher,
            temperature=self.temperature,
            on_policy=self.on_policy,
            force=self.force,
            classify=self.task == "sequence-classification",
        )
        if self.balance == "gradient" and any(term.name in STATES | EXITS for term in terms):
            raise BadInput("balance gradient: is measured where hidden states of other layers have none; use recap")
        if self.project and not any(term.name == "hidden" for term in terms):
            raise BadInput("project: no loss compares hidden states; leave it out, or add hidden to --loss")
        if self.balance != "none" and len(terms) < 2:
            raise BadInput("balance: there is one loss, which nothing weighs against; leave it out")
        if all(term.name == "ce" for term in terms):
            if self.teacher != "online":
                raise BadInput("teacher: cross-entropy listens to no teacher; leave it out")
            if self.temperature != 1:
                raise BadInput("temperature: cross-entropy has none; leave it out")
        made = any(x is not None for x in (self.layers, self.heads, self.ffn, self.hidden))
        if self.student is not None and made:
            raise BadInput("student: is given, so it has a shape; leave out --layers, --heads, --ffn and --hidden")
        if self.student is None and not made and self.student_scheme is None:
            raise BadInput("no student: give --student DIR, a shape such as --layers 6, or --student-scheme w4a4")
        if self.student_scheme is not None and (self.lora or self.on_policy):
            raise BadInput(
                "student-scheme: a quantized student is trained whole and on given text; leave out the other"
            )
        if self.shard and (
            self.student_scheme or self.lora or self.optimizer != "adamw" or self.task != DISTILLATION_TASKS[0]
        ):
            raise BadInput("shard: what is shared out is a causal LM in 32 bits, trained whole; leave out the other")
        if self.cache is not None and self.teacher == "online":
            raise BadInput("cache: an online teacher keeps nothing; add --teacher top-k or drawn")
        if self.teacher != "online" and self.teacher_bits != "none":
            raise BadInput("teacher-bits: a teacher that is walked block by block needs no fewer bits; leave it out")
        if self.lora and not self.merge and self.student is None:
            raise BadInput("lora: adapters alone of a student that is made here have nothing to go with; add --merge")
        if self.merge and not self.lora:
            raise BadInput("merge: there are no adapters to merge; add --lora R")

    @property
    def learns_labels(self) -> bool:
        """Whether the loss knows the right answers, not only the teacher's."""
        return self.task == "sequence-classification" or any(term.name in LABELED for term in read_terms(self.loss))

    @property
    def shape(self) -> StudentSize:
        return StudentSize(self.layers, self.heads, self.ffn, self.hidden)
