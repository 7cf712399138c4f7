"""Options of a distillation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, Preset, check_options, flag_name, option, with_preset
from calib.model.task import Task
from calib.quant.scheme import Scheme
from calib.runtime.choices import BALANCES, DEVICES, OPTIMIZERS, PRECISIONS
from compressor.distillation.loss_syntax import (
    BIDIRECTIONAL,
    EXITS,
    FAITHFUL,
    FEATURES,
    LABELED,
    LEARNED,
    ON_POLICY,
    RELATIONS,
    REWARDED,
    STATES,
    UNMATCHED,
    read_terms,
)
from compressor.distillation.loss_syntax import check_terms as check_losses
from compressor.on_policy.options import OnPolicyOptions, check_reward, check_rewarded

TEACHER_MODES = ("online", "top-k", "drawn", "together")
DEFAULT_LR = 1e-3  # of a student, where none is given or found
LEAST_SEARCHED = 50  # steps of a job that a search for its rate pays for
MOST_WRITTEN = 1024  # rows that a teacher writes where nobody says how many
TEACHER_LR = 1e-4  # of one that is trained together with its student
TEACHER_BITS = ("none", "nf4", "int8")
TASKS_OF_TEXT = {"seq2seq": Task.SEQ_TO_SEQ_LM, "masked-lm": Task.MASKED_LM}  # of language models that are not causal
DISTILLATION_TASKS = (
    "causal-lm", *TASKS_OF_TEXT, "sequence-classification", "image-classification", "tensors",
)  # fmt: skip
IMAGES = ("image-classification", "tensors")  # tasks of classifiers that read no text


@dataclass(frozen=True)
class StudentSize:
    """Sizes of a student that is cut out of its teacher; None: all that the teacher has."""

    layers: int | None = None
    heads: int | None = None  # query heads
    ffn: int | None = None
    hidden: int | None = None


DISTILL_PRESETS = {  # measured in benchmarks/results/presets.md
    "fast": Preset("50 steps", {"steps": 50}),
    "default": Preset("200 steps", {}),
    "best": Preset("1000 steps", {"steps": 1000}),
}


def read_layers(given: str | int | None) -> str | int | None:
    """Read how many layers are asked for: a number, or text with one or two of them.

    Returns:
        A number; of two stacks "E,D", without blanks; None where nothing is given.

    Raises:
        BadInput: they are no whole numbers of at least 1, or more than two.
    """
    if given is None:
        return None
    parts = [part.strip() for part in str(given).split(",")]
    if isinstance(given, bool) or not 1 <= len(parts) <= 2 or not all(re.fullmatch(r"-?\d+", part) for part in parts):
        raise BadInput(f"layers is {given!r}; it must be a whole number, or two such as 3,3 of encoder and decoder")
    for number in map(int, parts):
        if not 1 <= number < 2**31:
            raise BadInput(f"layers is {number}; it must be {'at least 1' if number < 1 else 'below 2^31'}")
    return int(parts[0]) if len(parts) == 1 else ",".join(str(int(part)) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Distill(OnPolicyOptions):
    """Options of a distillation; also what its recipe records."""

    task: str = option("causal-lm", "task of both models", DISTILLATION_TASKS, group="basic")
    base_model: Path | None = option(
        None, "base model of TEACHER where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize TEACHER first, where it is GGUF, FP8 or the like")
    student: Path | None = option(
        None, "the student, which may be an output of quantize; default: cut out of the teacher", group="basic"
    )
    factory: str | None = option(
        None, "package.module:function that builds TEACHER, a classifier of tensors that transformers does not know",
        group="basic",
    )  # fmt: skip
    student_factory: str | None = option(
        None, "the same for the student, whose weights are --student, or are drawn by the seed", group="basic"
    )
    layers: str | int | None = option(
        None, "number of blocks of a student cut out of the teacher; of an encoder-decoder each stack's, or E,D",
        group="basic",
    )  # fmt: skip
    heads: int | None = option(None, "number of its query heads", group="basic", ge=1)
    ffn: int | None = option(None, "its feed-forward width", group="basic", ge=1)
    hidden: int | None = option(None, "its hidden width", group="basic", ge=1)
    student_scheme: str | None = option(
        None, "quantization-aware: train the student on the grids of this scheme, and write it quantized", group="basic"
    )
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
        "rows held out of training, on which figures are measured; default: 16, or fewer where there are few",
        group="data",
        ge=1,
    )
    held_out_data: Path | None = option(
        None, "take the held-out rows from the start of this file instead", group="data"
    )
    loss: str = option(
        "forward-kl", "a loss, or a weighted sum such as 0.5*ce+js(0.9)+0.1*sinkhorn; see below", group="basic"
    )
    temperature: float = option(
        1.0,
        "softmax temperature of both models, in losses that compare distributions",
        group="method",
        ge=0.001,
        le=1000.0,
    )
    force: bool = option(False, "allow a loss that does not depend on which row got which answer", group="method")
    balance: str = option(
        "none",
        "reweigh losses during training: by gradient norm, or by how they converge (recap)",
        BALANCES,
        group="method",
    )
    exits: str | None = option(
        None, "modules of a student of images whose states losses read (ofa-exits, uskd, hidden, cka, gram): names or "
        "patterns, separated by commas", group="method",
    )  # fmt: skip
    teacher_exits: str | None = option(
        None, "modules of TEACHER whose states hidden, cka and gram compare with them, one by one", group="method",
        needs="exits",
    )  # fmt: skip
    project: bool = option(False, "learn projections between hidden states of different widths", group="method")
    teacher: str = option(
        "online",
        "when the teacher answers: as the student trains (online), or once, its most likely tokens or drawn ones kept; "
        "together: a classifier that is trained too, into OUT/teacher",
        TEACHER_MODES,
        group="method",
    )
    teacher_lr: float | None = option(
        None,
        "learning rate of a teacher that is trained together with the student; default: 1e-4",
        group="method",
        ge=0,
    )
    cache: Path | None = option(
        None, "directory that keeps the teacher's answers for other jobs; default: beside OUT", group="method"
    )
    top_k: int = option(
        64, "tokens kept of each of the teacher's distributions, or drawn from it", group="method", ge=1
    )
    teacher_bits: str = option("none", "load the teacher in fewer bits (bitsandbytes)", TEACHER_BITS, group="method")
    teacher_rows: int | None = option(
        None,
        "further training rows, generated by the teacher; default: as many as training takes, at most 1024, without "
        "--data where the student learns from what the teacher says of given rows; else 0",
        group="method",
        ge=0,
    )
    align_tokens: bool = option(
        False,
        "compare student and teacher of different tokenizers where both have read the same text, on the tokens that "
        "both have", group="method", needs="student",
    )  # fmt: skip
    steps: int = option(200, "steps of training", group="basic", ge=1)
    batch: int = option(8, "rows per step", group="method", ge=1)
    micro_batch_tokens: int = option(4096, "tokens per forward pass; larger batches accumulate gradients", ge=1)
    lr: float | None = option(
        None,
        "learning rate; default: found by a short search; 0.001 for classifiers, for answers of the student's own, and "
        "below 50 steps",
        group="basic",
        gt=0,
    )
    lr_scale: float = option(
        1e-3, "learning rate of a quantized student's scales (their logarithms)", group="method", ge=0
    )
    warmup: int = option(10, "warmup steps of the learning rate", group="method", ge=0)
    max_grad_norm: float = option(1.0, "norm that gradients are clipped to", group="method", gt=0)
    decay: float = option(0.0, "weight decay", group="method", ge=0)
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, which is written then",
        group="method",
        ge=0,
        lt=1,
    )
    optimizer: str = option("adamw", "adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    shard: bool = option(False, "shard the student over torchrun's processes (FSDP2)")
    lora: int = option(0, "train adapters of this rank only (peft)", group="method", ge=0)
    merge: bool = option(False, "merge the adapters into the weights that are written", group="method", needs="lora")
    memory_budget: float | None = option(
        None, "GiB of RAM for the teacher's hidden states, block by block; default: 2 or a quarter of what is "
        "available, beside a GPU a quarter", ge=0,
    )  # fmt: skip
    seed: int = option(0, "random seed", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")
    precision: str = option(
        "auto", "precision of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", PRECISIONS
    )

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
        object.__setattr__(self, "layers", read_layers(self.layers))
        check_options(self)
        self._check_factories()
        if self.steps * self.batch > 10**9:
            raise BadInput(f"steps: {self.steps} of {self.batch} rows are more than a job may take, 10^9 rows")
        self._check_losses()
        self._check_exits()
        self._check_student()
        self._check_teacher()
        self._check_rewards()
        self._check_aligned()

    def _check_losses(self) -> None:
        """Raises BadInput for losses that the other options leave nothing to compare, to weigh or to learn."""
        terms = read_terms(self.loss)
        check_losses(
            terms,
            teacher="online" if self.teacher == "together" else self.teacher,
            temperature=self.temperature,
            on_policy=self.on_policy,
            force=self.force,
            classify=self.classifies,
        )
        if self.task != "masked-lm" and any(term.name in RELATIONS for term in terms):
            raise BadInput("loss attention-relations: is for --task masked-lm; leave it out")
        if self.balance == "gradient" and any(
            term.name in STATES | EXITS | BIDIRECTIONAL | RELATIONS for term in terms
        ):
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

    def _check_exits(self) -> None:
        """Raises BadInput where a classifier's losses read states that nobody named, or names are read by none."""
        names = {term.name for term in read_terms(self.loss)}
        compared = sorted(names & FEATURES) if self.classifies else []
        read = [*compared, *sorted(names & EXITS.keys())] if self.classifies else []
        if (read or self.exits is not None) and not self.sees_images:
            what = f"loss {read[0]}" if read else "exits"
            raise BadInput(f"{what}: reads modules of classifiers of images, by --exits; leave it out")
        if read and self.exits is None:
            raise BadInput(f"loss {read[0]}: reads states inside the student; name modules, such as --exits 'layer*'")
        if self.exits is not None and not read and "uskd" not in names:
            raise BadInput("exits: no loss reads them; leave it out, or add ofa-exits, uskd, hidden, cka or gram")
        if compared and self.teacher_exits is None:
            raise BadInput(f"loss {compared[0]}: compares states; name the teacher's too, by --teacher-exits")
        if self.teacher_exits is not None and not compared:
            raise BadInput("teacher-exits: no loss compares them; leave it out, or add hidden, cka or gram")

    def _check_factories(self) -> None:
        """Let a factory's model be one of tensors.  Raises BadInput where that is not what the task says."""
        if self.factory is None and self.student_factory is None:
            if self.task == "tensors":
                raise BadInput("task tensors: needs to know a model; give --factory package.module:function")
        elif self.task in (*TASKS_OF_TEXT, "sequence-classification"):
            raise BadInput(f"task {self.task}: a factory's model takes tensors; leave out --task")
        else:
            object.__setattr__(self, "task", "tensors")

    def _check_student(self) -> None:
        """Raises BadInput for a student that is given and described, neither of them, or cannot be trained so."""
        made = any(x is not None for x in (self.layers, self.heads, self.ffn, self.hidden))
        if isinstance(self.layers, str) and self.task != "seq2seq":
            raise BadInput(
                f"layers {self.layers}: is of an encoder and a decoder; add --task seq2seq, or give one number"
            )
        if self.student_factory is not None and made:
            raise BadInput("student-factory: makes the student; leave out --layers, --heads, --ffn and --hidden")
        if self.student is not None and made:
            raise BadInput("student: is given, so it has a shape; leave out --layers, --heads, --ffn and --hidden")
        if (self.student or self.student_factory) is None and not made and self.student_scheme is None:
            raise BadInput("no student: give --student DIR, a shape such as --layers 6, or --student-scheme w4a4")
        if self.student_scheme is not None and self.lora:
            raise BadInput("student-scheme: a quantized student is trained whole; leave out --lora")
        if self.shard and (
            self.student_scheme or self.lora or self.optimizer != "adamw" or self.task != DISTILLATION_TASKS[0]
        ):
            raise BadInput("shard: what is sharded is a causal LM in 32 bits, trained whole; leave out the other")
        if self.lora and not self.merge and self.student is None:
            raise BadInput("lora: adapters alone of a student that is made here have nothing to go with; add --merge")

    def _check_teacher(self) -> None:
        """Raises BadInput for what this kind of teacher has no use for."""
        if self.teacher_lr is not None and self.teacher != "together":
            raise BadInput("teacher-lr: this teacher is not trained; add --teacher together, or leave it out")
        if self.teacher == "together":
            if not self.classifies:
                raise BadInput("teacher together: is for classifiers; give --task, or another --teacher")
            if self.teacher_exits is not None:
                raise BadInput("teacher-exits: are compared where the teacher stays as it is; leave out one of the two")
        if self.cache is not None and self.teacher == "online":
            raise BadInput("cache: an online teacher keeps nothing; add --teacher top-k or drawn")
        if self.teacher != "online" and self.teacher_bits != "none":
            raise BadInput("teacher-bits: a teacher that is walked block by block needs no fewer bits; leave it out")

    def _check_rewards(self) -> None:
        """Raises BadInput for a loss that goes by rewards and has none, or no others to compare an answer with, and for
        options of rewards that change nothing."""
        terms = read_terms(self.loss)
        rewarded = [term.name for term in terms if term.name in REWARDED]
        if self.correct is not None and (self.on_policy != 1 or rewarded or {t.name for t in terms} & ON_POLICY.keys()):
            raise BadInput(
                "correct: is for --on-policy 1 and losses of distributions, such as forward-kl; "
                "others go by tokens that the student drew itself"
            )
        if self.reward is None:
            if rewarded:
                raise BadInput(f"loss {rewarded[0]}: goes by rewards; add --reward, such as exact, and --on-policy 1")
            return
        check_reward(self.reward)
        if self.task != DISTILLATION_TASKS[0]:
            raise BadInput("reward: is for what language models write; leave it out")
        if self.on_policy != 1:
            raise BadInput("reward: is of what the student writes; add --on-policy 1")
        if self.teacher_rows or self.answers_only:
            raise BadInput(
                "reward: every row is a prompt that the student answers; leave out --teacher-rows and --answers-only"
            )
        if rewarded and self.balance != "none":
            raise BadInput(f"balance: {rewarded[0]} is no loss that falls; leave it out")
        if rewarded and self.temperature != 1:
            raise BadInput(f"temperature: {rewarded[0]} is of answers written at 1; leave it out")
        if len(rewarded) > 1:
            raise BadInput(f"loss: {rewarded[0]} and {rewarded[1]} both decide what an answer is worth; take one")
        check_rewarded(rewarded[0] if rewarded else None, self)

    def _check_aligned(self) -> None:
        """Raises BadInput for what cannot be asked of a teacher that reads other tokens, or of rows that are read in
        both directions."""
        names = {term.name for term in read_terms(self.loss)}
        if names & BIDIRECTIONAL.keys() and (self.on_policy or self.shard or self.gradient_checkpointing):
            raise BadInput(
                "loss bico: reads given rows in both directions; leave out --on-policy, --shard and "
                "--gradient-checkpointing"
            )
        if not self.align_tokens:
            if names & UNMATCHED.keys():
                raise BadInput("loss uld: is of tokens that one of two vocabularies has; add --align-tokens")
            return
        allowed = {"ce", *FAITHFUL, *LEARNED, *UNMATCHED}
        if beyond := sorted(names - allowed):
            raise BadInput(
                f"loss {beyond[0]}: compares what only models of one tokenizer have alike; choose from "
                f"{', '.join(sorted(allowed))}"
            )
        for name in ("answers_only", "teacher_rows", "reward", "correct", "shard", "project"):
            if getattr(self, name):
                raise BadInput(f"{flag_name(name)}: wants one tokenizer for student and teacher; leave it out")
        if self.teacher != "online" or self.temperature != 1:
            raise BadInput("align-tokens: the teacher answers online, at temperature 1; leave out the other")

    @property
    def written(self) -> int:
        """Count the rows that the teacher is to write, beside the given ones."""
        if self.teacher_rows is not None:
            return self.teacher_rows
        listens = self.task == DISTILLATION_TASKS[0] and any(term.name != "ce" for term in read_terms(self.loss))
        own = self.on_policy or self.reward is not None or self.align_tokens or self.answers_only
        return 0 if self.data is not None or own or not listens else min(MOST_WRITTEN, self.steps * self.batch)

    @property
    def classifies(self) -> bool:
        """Whether the models are classifiers, of texts, of images or of tensors."""
        return self.task not in (DISTILLATION_TASKS[0], *TASKS_OF_TEXT)

    @property
    def sees_images(self) -> bool:
        """Whether rows are images or other tensors, and no text."""
        return self.task in IMAGES

    @property
    def learns_labels(self) -> bool:
        """Whether the loss knows the right answers, not only the teacher's."""
        return self.classifies or any(term.name in LABELED for term in read_terms(self.loss))

    @property
    def searches_rate(self) -> bool:
        """Whether the learning rate is found by a search; not where the student learns from its own answers, which
        every rate would change."""
        given = self.lr is not None or self.on_policy or self.reward is not None
        return not given and not self.classifies and self.steps >= LEAST_SEARCHED

    @property
    def rate(self) -> float:
        """The learning rate where there is no search."""
        return DEFAULT_LR if self.lr is None else self.lr

    @property
    def moved_at(self) -> float:
        """Learning rate of the teacher, 0 where it stays as it is."""
        if self.teacher != "together":
            return 0.0
        return TEACHER_LR if self.teacher_lr is None else self.teacher_lr

    @property
    def shape(self) -> StudentSize:
        """Sizes of a student that is made from the teacher, but for one of two stacks."""
        layers = None if isinstance(self.layers, str) else self.layers
        return StudentSize(layers, self.heads, self.ffn, self.hidden)

    def stacks(self, count: int) -> list[int]:
        """How many layers are asked for in each of `count` stacks of layers."""
        if self.layers is None:
            return []
        each = [int(part) for part in str(self.layers).split(",")]
        return each * count if len(each) == 1 else each
