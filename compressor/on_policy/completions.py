"""Prompts with a reward, answers that a model writes to them, and what two models think of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib import BadInput, Failed
from calib.data.corpus import Corpus
from calib.losses.chunked_head import Head, chunks
from calib.losses.divergences import forward_kl
from calib.runtime.precision import upcast
from compressor.on_policy.rewards import Prompt, RewardFunction
from compressor.on_policy.sampling import continued

SCORE_COPIES = 6  # of a chunk's logits: both models', their logarithms, and what is made of them


class Answering(Protocol):
    """A causal LM in memory: the library's `model`, its `head`, and what that sees of rows of ids."""

    model: Any
    head: Head

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> states (B, T, d)."""


@dataclass(frozen=True)
class RewardedPrompts:
    """Rows that end where an answer begins, and what an answer is worth.

    beginnings: ids (s,) of each; about: each as text with its answer and its row; length: tokens of a row with its
    answer at most.
    """

    beginnings: tuple[Tensor, ...]
    about: tuple[Prompt, ...]
    length: int
    reward: RewardFunction
    tokenizer: PreTrainedTokenizerBase

    def rewards(self, numbers: Sequence[int], ids: Tensor, written: Tensor) -> Tensor:
        """Rewards (P, G) of rows (P G, T), of which `written` is the answer, to the prompts of these numbers (P,).

        Raises Failed where a function of the user's fails.
        """
        group = len(ids) // max(1, len(numbers))
        texts = [
            self.tokenizer.decode(row[own], skip_special_tokens=True) for row, own in zip(ids, written, strict=True)
        ]
        found = [self.reward(self.about[numbers[i // group]], text) for i, text in enumerate(texts)]
        return torch.tensor(found).view(len(numbers), group)


@dataclass(frozen=True)
class Completions:
    """A group of answers to each of some prompts: rows ids (P G, T), which of their tokens were written (P G, T), the
    prompts' numbers (P,) and rewards (P, G)."""

    ids: Tensor
    written: Tensor
    numbers: list[int]
    rewards: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer (P, G)."""
        return self.written.sum(-1).view(self.rewards.shape)


def rewarded_prompts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None, reward: str) -> RewardedPrompts:
    """The prompts of a corpus with one record a row, up to the last answer of each.

    Raises BadInput where rows have no prompts or lack what the reward needs, or where a prompt or its answer was cut.
    """
    if tokenizer is None or not corpus.records:
        raise BadInput(f"{corpus.source}: has no prompts, which reward {reward} needs; give rows of {_LAYOUT}")
    if cut := corpus.about.get("cut_rows"):
        raise BadInput(
            f"{corpus.source}: {cut} rows are longer than {corpus.ids.shape[1]} tokens, so what they ask or answer is "
            "cut off; raise --length"
        )
    function = RewardFunction(reward, corpus.source)
    beginnings, about = list[Tensor](), list[Prompt]()
    for number, record in enumerate(corpus.records):
        ids, mask = corpus.ids[number], corpus.mask[number]
        answers = torch.zeros_like(mask) if corpus.answers is None else corpus.answers[number] & mask
        start, end = _last_run(answers) if answers.any() else (int(mask.sum()), int(mask.sum()))
        if (corpus.answers is None and not corpus.about.get("prompts_only")) or not start:
            raise BadInput(f"{corpus.source}, {record.place}: has no prompt; give {_LAYOUT}")
        if start >= corpus.ids.shape[1]:
            raise BadInput(
                f"{corpus.source}, {record.place}: its prompt fills all {corpus.ids.shape[1]} tokens of a row; raise "
                "--length"
            )
        beginnings.append(ids[:start])
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:end])]
        about.append(Prompt(texts[0], texts[1] if start < end else None, record))
        function.check(about[-1])
    made = RewardedPrompts(tuple(beginnings), tuple(about), corpus.ids.shape[1], function, tokenizer)
    try:
        function(about[0], about[0].answer or "")
    except Failed as error:
        raise BadInput(str(error)) from error
    return made


_LAYOUT = "'prompt' + 'completion', 'question' + 'answer', 'messages' or 'prompt' alone"


def _last_run(answers: Tensor) -> tuple[int, int]:
    """Where the last run of true values (T,) begins and ends."""
    end = int(answers.nonzero()[-1]) + 1
    before = (~answers[:end]).nonzero()
    return (int(before[-1]) + 1 if len(before) else 0), end


def write_completions(model: Any, prompts: RewardedPrompts, numbers: list[int], group: int, head: Head) -> Completions:
    """Let the library's `model` answer each of some prompts `group` times, at temperature 1."""
    beginnings = [prompts.beginnings[number] for number in numbers for _ in range(group)]
    ids, written = continued(model, beginnings, prompts.length, head.weight.device, head.vocab)
    return Completions(ids, written, numbers, prompts.rewards(numbers, ids, written))


@dataclass(frozen=True)
class CompletionScores:
    """Scores of each answer (n,), in nats: its log-probability under student and teacher, and, summed over its tokens,
    the student's entropy, KL(student || teacher) and KL(teacher || student), given what comes before."""

    log_pi: Tensor
    log_base: Tensor
    entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


@torch.no_grad()
def score_completions(
    student: Answering, teacher: Answering, ids: Tensor, written: Tensor, at_once: int = 4096
) -> CompletionScores:
    """Score rows (n, T) by student and teacher, at the tokens (n, T) that were written; on the CPU.

    `at_once` tokens pass through the models together; logits exist for some positions at a time.
    """
    sums = torch.zeros(5, len(ids), dtype=torch.float64)
    vocab, device = len(student.head.rows), student.head.weight.device
    for rows in torch.arange(len(ids)).split(max(1, at_once // ids.shape[1])):
        width = max(2, int(written[rows].any(0).nonzero().max()) + 1) if written[rows].any() else 2
        here, counted = ids[rows, :width].to(device), written[rows, 1:width].to(device)
        states = [model.hidden(here)[:, :-1][counted] for model in (student, teacher)]
        following, row = here[:, 1:][counted], rows[:, None].expand(-1, width - 1)[counted.cpu()]
        for some in chunks(len(following), SCORE_COPIES * vocab):
            q, p = (
                upcast(model.head(x[some])).log_softmax(-1) for model, x in zip((student, teacher), states, strict=True)
            )
            of = following[some, None]
            values = [q.gather(-1, of)[:, 0], p.gather(-1, of)[:, 0], -(q.exp() * q).sum(-1), forward_kl(q, p),
                      forward_kl(p, q)]  # fmt: skip
            sums.index_add_(1, row[some], torch.stack(values).double().cpu())
    return CompletionScores(*sums)
