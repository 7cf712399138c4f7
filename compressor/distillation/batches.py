"""What a student's step is made of: rows of the corpus, rows that it writes itself, and what counts in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from calib.data.corpus import Corpus
from calib.data.task_rows import Masking
from calib.data.teacher_cache import TeacherCache
from calib.jobs.training_loop import OptimizerConfig
from calib.model.bidirectional import hidden_tokens
from calib.runtime.distributed import rank, world_size
from compressor.distillation.cross_tokenizer import CrossTokenizerTeacher
from compressor.distillation.loss_expression import BIDIRECTIONAL_LOSSES, LossTerm
from compressor.distillation.models import ModelInputs, Student, Teacher, inputs_on
from compressor.on_policy.options import OnPolicyOptions
from compressor.on_policy.policy import Credit, Policy
from compressor.on_policy.sampling import beginning_of
from compressor.on_policy.trial import write_rows

Speaking = Teacher | CrossTokenizerTeacher | TeacherCache


@dataclass(frozen=True)
class Relations:
    """Places where queries, keys and values are compared: the linears that make them, of both models, and the number of
    heads that they are cut into."""

    teacher: Sequence[nn.Module]
    student: Sequence[nn.Module]
    heads: int


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Losses that are trained on, and how long and how fast."""

    terms: list[LossTerm]
    descent: OptimizerConfig
    lr: float
    batch: int  # rows a step
    seed: int
    temperature: float = 1.0
    balance: str = "none"
    on_policy: float = 0.0  # share of a step's rows that the student writes itself
    ema: float = 0.0  # decay of the average of weights that is kept in the end; 0: the last weights
    layers: list[tuple[int, int]] = field(default_factory=list)  # states that are compared: teacher's, student's
    policy: Policy | None = None  # how a student is rewarded that writes whole steps
    writing: OnPolicyOptions = field(default_factory=OnPolicyOptions)  # how it is corrected
    lr_scale: float = 0.0  # of the logarithms of a fake-quantized student's scales
    at_once: int = 4096  # tokens that pass through the student together
    masking: Masking | None = None  # how tokens are hidden from a masked language model
    relations: Relations | None = None  # of attention, that are compared


@dataclass(frozen=True)
class Batch:
    """A step's rows of this process: ids (b, T), what counts in them (b, T - 1), their numbers in the corpus (of those
    that the student wrote, -1), how many tokens count in the rows of all processes; and where spans are given, which
    tokens that count are followed in theirs by one that counts too (b, T - 1), and how many in all rows.  credit is of
    rows that are rewarded."""

    ids: Tensor
    counted: Tensor
    numbers: list[int]
    tokens: int
    followed: Tensor | None = None
    pairs: int = 0
    credit: Credit | None = None
    real: Tensor | None = None  # (b, T), of tokens that are no padding
    hidden: Tensor | None = None  # (b, T), of those that are hidden where the loss asks for them
    inputs: Mapping[str, Tensor] | None = None  # (b, ...), what other models than causal ones are given, by name
    ahead: bool = True  # a token is told at the position before it; else at its own

    def given(self, some: slice, device: torch.device) -> ModelInputs:
        """Inputs of models for some rows, on a device."""
        return inputs_on(self.ids if self.inputs is None else self.inputs, device, some)

    @property
    def width(self) -> int:
        """Tokens of a row that pass through a model, of an encoder and of a decoder."""
        both = self.inputs is not None and "decoder_input_ids" in self.inputs
        return self.ids.shape[1] + (self.inputs["input_ids"].shape[1] if both and self.inputs is not None else 0)


def step_batch(
    student: Student, teacher: Speaking | None, corpus: Corpus, targets: Tensor, rows: list[int],
    step: int, config: TrainingConfig,
) -> Batch:  # fmt: skip
    """Make a step's batch of the rows of these numbers, or of what the student writes in their place."""
    ids, counted, numbers, credit = corpus.ids[rows], targets[rows], list(rows), None
    written = [
        math.floor(config.on_policy * config.batch * (step + i)) for i in (0, 1)
    ]  # by the student, up to this step
    speaking = teacher if isinstance(teacher, Teacher) else None
    # Every process writes all of them, alike: only so do all know how many tokens count.
    if config.policy is not None:
        policy = config.policy
        answers = policy.answers(
            rows, *write_rows(student, speaking, policy.beginnings(rows), policy.prompts.length, config.writing)
        )
        with student.answering():
            credit = policy.credit(answers, student, speaking, step)
        ids, counted, numbers = answers.ids, answers.written[:, 1:], [-1] * len(answers.ids)
    elif count := written[1] - written[0]:
        beginnings = [beginning_of(ids[place], counted[place]) for place in range(count)]
        ids[:count], real = write_rows(student, speaking, beginnings, ids.shape[1], config.writing)
        counted[:count], numbers[:count] = real[:, 1:], [-1] * count
    inputs: Mapping[str, Tensor] | None = None
    if corpus.hidden is not None and config.masking is not None:
        counted, inputs = config.masking.drawn(corpus, rows, config.seed + 1_000_003 * step)
    elif corpus.sources is not None:
        inputs = corpus[rows].inputs
    there: Tensor | None = None
    hidden: Tensor | None = None
    if -1 not in numbers:
        there, hidden = corpus.mask[rows], _hidden(corpus, rows, step, config)
    followed: Tensor | None = None
    if corpus.spans is not None:
        of = corpus.spans[rows][:, 1:].where(torch.tensor(numbers)[:, None] >= 0, -1)
        followed = torch.zeros_like(counted)
        followed[:, :-1] = counted[:, :-1] & counted[:, 1:] & (of[:, :-1] == of[:, 1:]) & (of[:, 1:] >= 0)
    # All processes take equally many rows, as passing a shared student wants; what is too many counts nowhere.
    places = range(rank(), -(-len(ids) // world_size()) * world_size(), world_size())
    local = [place if place < len(ids) else 0 for place in places]
    own = (torch.tensor(places) < len(ids))[:, None]
    if credit is not None:
        credit = replace(credit, advantage=credit.advantage[local], pull=credit.pull[local])
    return Batch(
        ids[local],
        counted[local] & own,
        [numbers[place] for place in local],
        max(1, int(counted.sum())),
        None if followed is None else followed[local],
        0 if followed is None else int(followed.sum()),
        credit,
        None if there is None else there[local] & own,
        None if hidden is None else hidden[local] & own,
        None if inputs is None else {name: value[local] for name, value in inputs.items()},
        corpus.hidden is None,
    )


def _hidden(corpus: Corpus, rows: list[int], step: int, config: TrainingConfig) -> Tensor | None:
    """Tokens (b, T) of rows that are hidden in a step, row by row the same ones in whatever company."""
    term = next((term for term in config.terms if term.name in BIDIRECTIONAL_LOSSES), None)
    if term is None:
        return None
    share, seed = float(term.arguments.get("share", 0.15)), config.seed + 1_000_003 * step
    draws = (torch.Generator().manual_seed(seed + 104_729 * row) for row in rows)
    return torch.cat([
        hidden_tokens(corpus.mask[row : row + 1], share, draw) for row, draw in zip(rows, draws, strict=True)
    ])  # fmt: skip
