"""Options of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, check_options, option
from calib.quant.scheme import Scheme
from calib.runtime.choices import BALANCES, DEVICES, OPTIMIZERS, PRECISIONS
from compressor.distillation.loss_syntax import EXITS, LABELED, LOSS_NAMES, STATES, read_terms
from compressor.distillation.loss_syntax import check_terms as check_losses

TEACHER_MODES = ("online", "top-k", "drawn")
TEACHER_BITS = ("none", "nf4", "int8")
DISTILLATION_TASKS = ("causal-lm", "sequence-classification")


@dataclass(frozen=True)
class StudentSize:
    """Sizes of a student that is cut out of its teacher; None: all that the teacher has."""

    layers: int | None = None
    heads: int | None = None  # query heads
    ffn: int | None = None
    hidden: int | None = None


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Options of a distillation; also what its recipe records."""

    task: str = option("causal-lm", "what the models do", DISTILLATION_TASKS, group="basic")
    base_model: Path | None = option(None, "base of TEACHER, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that TEACHER stands for, where it is GGUF, FP8 or the like")
    student: Path | None = option(
        None, "the student, also OUT of quantize; default: made from the teacher", group="basic"
    )
    layers: int | None = option(None, "blocks of a student made from the teacher", group="basic", ge=1)
    heads: int | None = option(None, "its query heads", group="basic", ge=1)
    ffn: int | None = option(None, "its feed-forward width", group="basic", ge=1)
    hidden: int | None = option(None, "its hidden width", group="basic", ge=1)
    student_scheme: str | None = option(None, "train the student fake-quantized, and write it quantized", group="basic")
    data: Path | None = option(None, f"training rows: {SOURCES}; default: the embedded text", group="data")
    samples: int | None = option(None, "training rows; default: all there are", group="data", ge=1)
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data", ge=2
    )
    by_document: bool = option(False, "one document per row, padded, instead of packed rows", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    answers_only: bool = option(False, "learn answers, not prompts", group="data")
    held_out: int | None = option(
        None,
        "further rows, not trained on, that the figures are measured on; default: 16, or fewer of few",
        group="data",
        ge=1,
    )
    held_out_data: Path | None = option(
        None, "take the held-out rows from the start of this file instead", group="data"
    )
    loss: str = option(
        "forward-kl", f"a sum such as 0.5*ce+js(0.9)+0.1*sinkhorn, of {', '.join(LOSS_NAMES)}", group="basic"
    )
    temperature: float = option(
        1.0,
        "that both models' logits are divided by (in losses that compare distributions)",
        group="method",
        ge=0.001,
        le=1000.0,
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
    top_k: int = option(
        64, "tokens kept of each of the teacher's distributions, or drawn from it", group="method", ge=1
    )
    teacher_bits: str = option("none", "load the teacher in fewer bits (bitsandbytes)", TEACHER_BITS, group="method")
    teacher_rows: int = option(0, "further training rows, which the teacher writes itself", group="method", ge=0)
    on_policy: float = option(
        0.0, "share of rows that the student writes itself and the teacher answers", group="method", ge=0, le=1
    )
    steps: int = option(200, "steps of training", group="basic", ge=1)
    batch: int = option(4, "rows per step", group="method", ge=1)
    micro_batch_tokens: int = option(
        4096, "tokens that pass through the student together; more rows than that accumulate", ge=1
    )
    lr: float = option(1e-3, "learning rate", group="basic", gt=0)
    lr_scale: float = option(
        1e-3, "learning rate of the logarithms of a quantized student's scales", group="method", ge=0
    )
    warmup: int = option(10, "steps over which the rate rises", group="method", ge=0)
    max_grad_norm: float = option(1.0, "greatest norm of a step's gradient", group="method", gt=0)
    decay: float = option(0.0, "weight decay", group="method", ge=0)
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, which is what is written",
        group="method",
        ge=0,
        lt=1,
    )
    optimizer: str = option("adamw", "adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS)
    gradient_checkpointing: bool = option(False, "make activations again on the way back, to hold fewer")
    shard: bool = option(False, "share the student's blocks out among torchrun's processes (FSDP2)")
    lora: int = option(0, "train adapters of this rank only (peft)", group="method", ge=0)
    merge: bool = option(False, "merge the adapters into the student that is written", group="method", needs="lora")
    memory_budget: float | None = option(
        None, "GiB of RAM for the teacher's hidden states while it is walked; default: 2 or a quarter of what is "
        "available, beside a GPU a quarter", ge=0,
    )  # fmt: skip
    seed: int = option(0, "seed of rows and of what is drawn", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")
    precision: str = option("auto", "of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", PRECISIONS)

    def __post_init__(self) -> None:
        if self.student_scheme is not None:
            object.__setattr__(self, "student_scheme", Scheme.parse(self.student_scheme).name)
        check_options(self)
        if self.steps * self.batch > 10**9:
            raise BadInput(f"steps: {self.steps} of {self.batch} rows are more than a job may take, 10^9 rows")
        self._check_losses()
        self._check_student()
        self._check_teacher()

    def _check_losses(self) -> None:
        """Raises BadInput for losses that the other options leave nothing to compare, to weigh or to learn."""
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

    def _check_student(self) -> None:
        """Raises BadInput for a student that is given and described, neither of them, or cannot be trained so."""
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
            raise BadInput("shard: what is sharded is a causal LM in 32 bits, trained whole; leave out the other")
        if self.lora and not self.merge and self.student is None:
            raise BadInput("lora: adapters alone of a student that is made here have nothing to go with; add --merge")

    def _check_teacher(self) -> None:
        """Raises BadInput for what this kind of teacher has no use for."""
        if self.cache is not None and self.teacher == "online":
            raise BadInput("cache: an online teacher keeps nothing; add --teacher top-k or drawn")
        if self.teacher != "online" and self.teacher_bits != "none":
            raise BadInput("teacher-bits: a teacher that is walked block by block needs no fewer bits; leave it out")

    @property
    def learns_labels(self) -> bool:
        """Whether the loss knows the right answers, not only the teacher's."""
        return self.task == "sequence-classification" or any(term.name in LABELED for term in read_terms(self.loss))

    @property
    def shape(self) -> StudentSize:
        """Sizes of a student that is made from the teacher."""
        return StudentSize(self.layers, self.heads, self.ffn, self.hidden)
