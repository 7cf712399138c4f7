"""What is wanted of a quantization, a distillation, an evaluation or an export: the options of the command, the
arguments of the function, and the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.job import DEVICES, PRECISIONS, PROMPT_FORMAT, check_numbers, check_sizes, option
from calib.records import SOURCES
from calib.scheme import Scheme
from compressor.formula import EXITS, NAMES, STATES, summands
from compressor.formula import check as check_losses
from compressor.names import BALANCES, DTYPES, FORMATS, INITS, KL_TOPS, ROUNDINGS, UNROUNDED

KEPT = ("online", "top-k", "drawn")
TASKS = ("causal-lm", "sequence-classification")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Options of a quantization job; also what its recipe records."""

    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    scheme: str = option("w4a16-g64", "what gets how many bits")
    target_bits: float | None = option(
        None, "mean bits of a weight's code, shared out where they help most; default: all have the scheme's"
    )
    widths: str | None = option(None, "bits to share out, such as 4,8; default: those within 2 of the target")
    profile_rows: int | None = option(None, "calibration rows by which it is seen where bits help most; default: 4")
    data: Path | None = option(None, f"calibration rows: {SOURCES}; default: the embedded text")
    samples: int | None = option(None, "calibration rows; default: 128, or as many as there are")
    length: int | None = option(None, "tokens per row; default: 512, or as many as the model has positions")
    by_document: bool = option(False, "one document per row, padded, instead of packed rows")
    prompt_format: str = option("auto", PROMPT_FORMAT)
    held_out: int | None = option(
        None, "further rows, not calibrated on, that the figures are measured on; default: 16, or fewer of few"
    )
    held_out_data: Path | None = option(None, "take the held-out rows from the start of this file instead")
    init: str = option("hadamard", "where rotations start; none: no transforms at all", choices=INITS)
    learn: bool = option(True, "learn the transforms")
    steps: int = option(100, "steps of learning")
    batch: int = option(4, "rows per step")
    lr_rotation: float = option(0.1, "learning rate of rotations, about radians per step")
    lr_scale: float = option(0.02, "learning rate of the scales' logarithms")
    loss: str = option("tail", "which KL-Top is learned", choices=KL_TOPS)
    top_k: int = option(256, "tokens kept of each of the float model's distributions")
    cross_entropy: float = option(0.0, "weight of plain cross-entropy beside the loss")
    tune_steps: int | None = option(
        None, "steps of tuning scales and norm gains after rounding, codes fixed; default: 50 after learning, else 0"
    )
    lr_tune: float = option(0.005, "learning rate of the tuned factors' logarithms")
    rounding: str = option(
        "gptq", "how codes are chosen; none: weights are transformed only, for parewell export", choices=ROUNDINGS
    )
    damp: float = option(0.01, "GPTQ's ridge, as a fraction of the mean diagonal of X^T X")
    untie: bool | None = option(
        None, "store a tied embedding twice, so that the residual stream can be rotated; default: where activations "
        "are quantized, or that adds at most 10% to OUT",
    )  # fmt: skip
    online: bool | None = option(
        None, "run-time Hadamards, which only compressor.load can run; default: where activations or keys have < 8 bits"
    )
    memory_budget: float | None = option(
        None, "GiB of RAM for hidden states (else on disk) and a block's graph (else remade); default: 2 or a quarter "
        "of what is available, beside a GPU a quarter"
    )  # fmt: skip
    device_memory: float | None = option(
        None, "GiB of a GPU's memory that may be taken; default: what is free. What has no room there waits in RAM"
    )
    halves: bool = option(False, "run the job on each half of the calibration rows too: whether more would help")
    seed: int = option(0, "seed of rotations, rows and batches")
    device: str = option("auto", "where to compute", choices=DEVICES)
    precision: str = option(
        "auto", "of the matrix products in a block; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        check_sizes(self)
        Scheme.parse(self.scheme)
        at_least = {"samples": 1, "length": 2, "held_out": 1, "steps": 1, "batch": 1, "top_k": 1, "tune_steps": 0,
                    "profile_rows": 1}  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr_rotation", "lr_scale", "lr_tune", "cross_entropy", "damp"):
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

    def _check_mixed(self) -> None:
        """Raises BadInput where bits cannot be shared out as asked for."""
        if self.target_bits is None:
            for name in ("widths", "profile_rows"):
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
            raise BadInput(f"target-bits is {self.target_bits}; with widths {self.widths} it must lie between "
                           f"{min(widths)} and {max(widths)}")  # fmt: skip

    def shared_out(self) -> list[int]:
        """The widths among which every part of the model gets one, ascending."""
        if self.widths is None:
            assert self.target_bits is not None
            return [bits for bits in range(2, 9) if abs(bits - self.target_bits) < 2]
        try:
            widths = {int(word) for word in self.widths.split(",")}
        except ValueError:
            widths = set()
        if len(widths) < 2 or not widths <= set(range(2, 9)):
            raise BadInput(f"widths '{self.widths}': write two or more from 2 to 8 with commas between, such as 4,8")
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
                           f"take --scheme w{scheme.weights.bits}a16 and leave out --online")  # fmt: skip
        if self.tune_steps:
            raise BadInput("rounding none leaves no scales to tune; leave out --tune-steps")
        if self.init == "none":
            raise BadInput("rounding none and init none would change nothing; leave one of them out")


@dataclass(frozen=True)
class Shape:
    """How much the student keeps.  None: all that the teacher has."""

    layers: int | None = None
    heads: int | None = None  # query heads
    ffn: int | None = None
    hidden: int | None = None


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Options of a distillation; also what its recipe records."""

    task: str = option("causal-lm", "what the models do", TASKS)
    base_model: Path | None = option(None, "base of TEACHER, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that TEACHER stands for, where it is GGUF, FP8 or the like")
    student: Path | None = option(None, "the student, also OUT of quantize; default: made from the teacher")
    layers: int | None = option(None, "blocks of a student made from the teacher")
    heads: int | None = option(None, "its query heads")
    ffn: int | None = option(None, "its feed-forward width")
    hidden: int | None = option(None, "its hidden width")
    student_scheme: str | None = option(None, "train the student fake-quantized, and write it quantized")
    data: Path | None = option(None, f"training rows: {SOURCES}; default: the embedded text")
    samples: int | None = option(None, "training rows; default: all there are")
    length: int | None = option(None, "tokens per row; default: 512, or as many as the model has positions")
    by_document: bool = option(False, "one document per row, padded, instead of packed rows")
    prompt_format: str = option("auto", PROMPT_FORMAT)
    answers_only: bool = option(False, "learn answers, not prompts")
    held_out: int | None = option(
        None, "further rows, not trained on, that the figures are measured on; default: 16, or fewer of few"
    )
    held_out_data: Path | None = option(None, "take the held-out rows from the start of this file instead")
    loss: str = option("forward-kl", f"a sum such as 0.5*ce+js(0.9)+0.1*sinkhorn, of {', '.join(NAMES)}")
    temperature: float = option(1.0, "that both models' logits are divided by (in losses that compare distributions)")
    force: bool = option(False, "allow a loss that is blind to which row got which answer")
    balance: str = option("none", "weigh losses anew as they go: by gradient norm, by how they converge", BALANCES)
    project: bool = option(False, "learn projections where hidden states of other widths are compared")
    teacher: str = option("online", "how the teacher answers: as the student learns, or once and kept", KEPT)
    cache: Path | None = option(None, "folder to keep what the teacher said for other jobs; default: beside OUT")
    top_k: int = option(64, "tokens kept of each of the teacher's distributions, or drawn from it")
    teacher_bits: str = option("none", "load the teacher in fewer bits (bitsandbytes)", ("none", "nf4", "int8"))
    teacher_rows: int = option(0, "further training rows, which the teacher writes itself")
    on_policy: float = option(0.0, "share of rows that the student writes itself and the teacher answers")
    steps: int = option(200, "steps of training")
    batch: int = option(4, "rows per step")
    at_once: int = option(4096, "tokens that pass through the student together; more rows than that accumulate")
    lr: float = option(1e-3, "learning rate")
    lr_scale: float = option(1e-3, "learning rate of the logarithms of a quantized student's scales")
    warmup: int = option(10, "steps over which the rate rises")
    clip: float = option(1.0, "greatest norm of a step's gradient")
    decay: float = option(0.0, "weight decay")
    average: float = option(0.0, "decay of an average of the weights, which is kept in the end")
    eight_bit: bool = option(False, "AdamW's moments in 8 bits (bitsandbytes)")
    checkpointing: bool = option(False, "make activations again on the way back, to hold fewer")
    shard: bool = option(False, "share the student's blocks out among torchrun's processes (FSDP2)")
    lora: int = option(0, "train adapters of this rank only (peft)")
    merge: bool = option(False, "merge the adapters into the student that is written")
    memory_budget: float | None = option(
        None, "GiB of RAM for the teacher's hidden states while it is walked; default: 2 or a quarter of what is "
        "available, beside a GPU a quarter"
    )  # fmt: skip
    seed: int = option(0, "seed of rows and of what is drawn")
    device: str = option("auto", "where to compute", DEVICES)
    precision: str = option("auto", "of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", PRECISIONS)

    def __post_init__(self) -> None:
        if self.student_scheme is not None:
            Scheme.parse(self.student_scheme)
        least = {"samples": 1, "length": 2, "held_out": 1, "top_k": 1, "steps": 1, "batch": 1, "at_once": 1}
        least |= {"warmup": 0, "lora": 0, "teacher_rows": 0}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        check_numbers(self)
        check_sizes(self)
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"{name} is {getattr(self, name)}; it must be positive")
        if not 1e-3 <= self.temperature <= 1e3:
            raise BadInput(f"temperature is {self.temperature}; it must be positive, from 0.001 to 1000")
        if self.steps * self.batch > 10**9:
            raise BadInput(f"steps: {self.steps} of {self.batch} rows are more than a job may take, 10^9 rows")
        for name in ("lr_scale", "decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.on_policy <= 1 or not 0 <= self.average < 1:
            raise BadInput("on-policy must lie between 0 and 1, average between 0 and less than 1")
        known = {"task": TASKS, "balance": BALANCES, "teacher": KEPT, "teacher_bits": ("none", "nf4", "int8")}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(allowed)}")
        terms = summands(self.loss)
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
        if self.shard and (self.student_scheme or self.lora or self.eight_bit or self.task != TASKS[0]):
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
    def shape(self) -> Shape:
        return Shape(self.layers, self.heads, self.ffn, self.hidden)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    data: Path | None = option(None, f"rows: {SOURCES}; default: the embedded held-out text")
    length: int | None = option(None, "tokens per row; default: 512, or as many as the model has positions")
    rows: int | None = option(None, "only the first rows")
    by_document: bool = option(False, "one document per row instead of packed rows")
    prompt_format: str = option("auto", PROMPT_FORMAT)
    answers_only: bool = option(False, "measure answers, not prompts")
    reference: str | None = option(None, "a model to compare with: mean KL(reference || MODEL), equal top tokens")
    memory_budget: float | None = option(
        None, "GiB of hidden states held in RAM before they go to disk; default: 2 or a quarter of what is available"
    )
    device: str = option("auto", "where to compute", choices=DEVICES)
    precision: str = option(
        "auto", "of the matrix products in a block; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if (self.length is not None and self.length < 2) or (self.rows is not None and self.rows < 1):
            raise BadInput("length must be at least 2 and rows at least 1")
        check_sizes(self)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export; also what its recipe records."""

    to: str = option("safetensors", f"format of DST: {', '.join(FORMATS)}")
    base_model: Path | None = option(None, "base of OUT, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that OUT stands for, where it is GGUF, FP8 or the like")
    dtype: str | None = option(
        None, "of what is not quantized; default: 16 bits as the model has them, else bfloat16; gguf: float16",
        choices=DTYPES,
    )  # fmt: skip
    held_out: int = option(8, "rows on which DST is run, by its runtime where that is installed, beside OUT; 0: none")
    data: Path | None = option(
        None, "where they come from: text, .jsonl or .safetensors token ids; default: the embedded held-out text"
    )
    length: int | None = option(None, "tokens per row; default: 512, or as many as the model has positions")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.to == "compressed-tensors":
            raise BadInput("to compressed-tensors: that is what parewell quantize writes; give it the float model")
        if self.to not in FORMATS:
            raise BadInput(f"to '{self.to}' is unknown; choose from {', '.join(FORMATS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(f"dtype '{self.dtype}' is unknown; choose from {', '.join(DTYPES)}")
        if self.to == "onnx" and self.dtype not in (None, "float32"):
            raise BadInput(f"dtype {self.dtype}: onnxruntime computes in float32 on CPU; leave it out")
        if self.held_out < 0 or (self.length is not None and self.length < 2):
            raise BadInput("held-out must not be negative, length must be at least 2")
        if not self.held_out and (self.data is not None or self.length is not None):
            raise BadInput("held-out is 0, so that --data and --length change nothing; leave one of them out")
