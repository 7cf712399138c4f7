"""What a language model answers: how likely its answers are, and files of questions that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import GenerationConfig

from calib import BadInput
from calib.data.prompts import Document, answered, prompt_format
from calib.data.records import read_rows
from calib.data.rows import positions_of, row_length
from calib.data.token_rows import encode_documents, from_documents
from calib.runtime.progress import watched
from calib.stats.classification import calibration_error
from unlearn.audit.memorization import (
    answer_probability,
    choice_probability,
    model_utility,
    per_token,
    rouge_l_recall,
    truth_ratio,
    truth_score,
)
from unlearn.data.facts import reversed_pair
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import IGNORED, Examples
from unlearn.model.model import TrainableModel

SPOKEN = 100  # tokens of an answer that is written


@dataclass(frozen=True)
class AnswerScores:
    """Scores of a group of rows (n, T): the log-probability of each label, whether it is the likeliest, and which
    count."""

    log_p: Tensor
    right: Tensor
    mask: Tensor

    @property
    def per_token(self) -> Tensor:
        """Mean log-probability of each row's labels (n,)."""
        return per_token(self.log_p, self.mask)


@torch.no_grad()
def score_answers(model: Ensemble, rows: Examples) -> AnswerScores:
    """Score the labels of rows by one model."""
    width = int(rows.counts.max())
    log_p, right = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    mask = torch.arange(width) < rows.counts[:, None].cpu()
    targets = rows.targets
    own, likeliest = log_p.new_zeros(len(targets)), right.new_zeros(len(targets))
    for at, logits in watched("answers", model.answers(rows), len(targets), "decisions"):
        own[at] = log_softmax(logits, -1).gather(-1, targets[at][:, None])[:, 0].cpu()
        likeliest[at] = (logits.argmax(-1) == targets[at]).cpu()
    log_p[mask], right[mask] = own, likeliest
    return AnswerScores(log_p, right, mask)


def rows_of(documents: Sequence[Document], trainable: TrainableModel, length: int | None, source: str) -> Examples:
    """Rows in which what follows the prompts is decided, on the model's device."""
    if trainable.tokenizer is None:
        raise BadInput(f"{source}: text, but the model folder has no tokenizer; copy its files beside config.json")
    length = row_length(length, positions_of(trainable.module.config))
    corpus = from_documents(documents, trainable.tokenizer, length=length, source=source, by_document=True)
    assert corpus.answers is not None
    labels = torch.full_like(corpus.ids, IGNORED)
    labels[:, :-1] = corpus.ids[:, 1:].where((corpus.mask & corpus.answers)[:, 1:], IGNORED)
    if (labels == IGNORED).all(1).any():
        raise BadInput(f"{source}: nothing of an answer fits in {length} tokens; raise --length")
    return Examples({"input_ids": corpus.ids}, labels).to(trainable.device)


def read_records(path: Path, texts: Sequence[str], lists: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of any kind of file that calib.data.records reads, which have these fields.  Raises BadInput."""
    records = list[dict[str, Any]]()
    for row in read_rows(path):
        fields, where = row.fields, f"{path}, {row.place}"
        for name in texts:
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise BadInput(f"{where}: needs a text in '{name}'")
        for name in lists:
            found = fields.get(name)
            if not isinstance(found, list) or not found or not all(isinstance(w, str) and w.strip() for w in found):
                raise BadInput(f"{where}: needs a list of texts in '{name}'")
        records.append(fields)
    if not records:
        raise BadInput(f"{path}: is empty; give some records")
    return records


@dataclass(frozen=True)
class Probes:
    """Questions: the right answer as it is and in other words (n), and wrong ones (n) each."""

    asked: list[Document]
    answers: list[str]
    paraphrased: bool
    right: Examples
    other_words: Examples
    wrong: list[Examples]


def read_probes(
    path: Path, trainable: TrainableModel, length: int | None, prompts: str = "auto", *, paraphrased: bool
) -> Probes:
    """Rows with question, perturbed_answer (a list), and paraphrased_answer or answer, as TOFU has them, put as the
    prompt format `prompts` says.  Raises BadInput, also where `paraphrased` answers are missing or there are fewer
    than two."""
    if trainable.task != "causal-lm":
        raise BadInput(f"{path}: has questions to a language model, which this is not; leave it out")
    texts = ["question", "paraphrased_answer" if paraphrased else "answer"]
    records = read_records(path, texts, ["perturbed_answer"])
    if len(records) < 2:
        raise BadInput(f"{path}: has one question; samples are compared, give at least two")
    counts = {len(record["perturbed_answer"]) for record in records}
    if len(counts) > 1:
        raise BadInput(f"{path}: has from {min(counts)} to {max(counts)} wrong answers a question; give all as many")

    form = prompt_format(prompts, trainable.tokenizer)

    def with_answers(replies: Sequence[str]) -> Examples:
        pairs = zip((record["question"] for record in records), replies, strict=True)
        return rows_of([form.question(q, a, str(path)) for q, a in pairs], trainable, length, str(path))

    right = [record.get("answer") or record["paraphrased_answer"] for record in records]
    return Probes(
        [form.prompt_of(record["question"], str(path)) for record in records],
        right,
        all("paraphrased_answer" in record for record in records),
        with_answers(right),
        with_answers([record.get("paraphrased_answer") or record["answer"] for record in records]),
        [with_answers([record["perturbed_answer"][i] for record in records]) for i in range(counts.pop())],
    )


def truth_ratios(model: Ensemble, probes: Probes) -> Tensor:
    """Truth ratio of each probe (n,)."""
    wrong = torch.stack([score_answers(model, rows).per_token for rows in probes.wrong], 1)
    return truth_ratio(score_answers(model, probes.other_words).per_token, wrong)


def utility(trainable: TrainableModel, model: Ensemble, sets: Mapping[str, Probes]) -> dict[str, float]:
    """TOFU's: of each set of questions probability, ROUGE-L recall and truth score, and the harmonic mean of all; and
    the calibration error of choices (ECE), which is no part of the mean.

    The probability is that of the answer, a mean over tokens, or, where a set has no answers in other words, of the
    answer among the wrong ones. A choice is among the answer and the wrong ones, as likely as they are a token.
    """
    found, errors = dict[str, float](), dict[str, float]()
    for name, probes in sets.items():
        right = score_answers(model, probes.right)
        probability = answer_probability(right.log_p, right.mask)
        wrong = torch.stack([score_answers(model, rows).per_token for rows in probes.wrong], 1)
        if not probes.paraphrased:
            probability = choice_probability(right.per_token, wrong)
        errors[f"{name}: ECE of choices"] = choice_error(right.per_token, wrong)
        generated = generate_answers(trainable, model, probes.asked)
        found[f"{name}: probability"] = float(probability.mean())
        found[f"{name}: ROUGE-L recall"] = mean(
            rouge_l_recall(a, b) for a, b in zip(probes.answers, generated, strict=True)
        )
        found[f"{name}: truth"] = float(truth_score(truth_ratios(model, probes)).mean())
    return found | {"utility": model_utility(found)} | errors


def choice_error(right: Tensor, wrong: Tensor) -> float:
    """Calibration error (ECE) of choosing among a right answer and wrong ones by their probability a token.

    `per_token` of the right answer (n,) and of the wrong ones (n, w).
    """
    chosen = torch.cat([right[:, None], wrong], 1).softmax(1)
    return calibration_error(chosen, torch.zeros(len(chosen), dtype=torch.long))


def chosen_alternatives(model: Ensemble, forgotten: Examples, alternatives: Examples) -> dict[str, float]:
    """Measure how often a model prefers alternative answers to the forgotten ones, by their probability a token; the
    calibration error of that choice, in which the alternative is right; and that probability itself."""
    other, own = score_answers(model, alternatives), score_answers(model, forgotten).per_token
    return {
        "preferred": float((other.per_token > own).double().mean()),
        "ECE of choices": choice_error(other.per_token, own[:, None]),
        "probability": float(answer_probability(other.log_p, other.mask).mean()),
    }


@torch.no_grad()
def generate_answers(trainable: TrainableModel, model: Ensemble, prompts: Sequence[Document]) -> list[str]:
    """Answer prompts greedily.  Prompts of a length go together: padding would change what small models say."""
    tokenizer, module = trainable.tokenizer, trainable.module
    assert tokenizer is not None
    before = {name: p.data for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        p.data = model.params[name][0]
    ends = module.generation_config.eos_token_id  # type: ignore[union-attr]
    options = GenerationConfig(do_sample=False, max_new_tokens=SPOKEN, pad_token_id=0, eos_token_id=ends)
    coded = [one.ids.tolist() for one in encode_documents(prompts, tokenizer, "prompts")]
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(coded):
        groups.setdefault(len(ids), []).append(i)
    generated = [""] * len(prompts)
    try:
        for some in groups.values():
            ids = torch.tensor([coded[i] for i in some], device=module.device)  # type: ignore[arg-type]
            made = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)  # type: ignore[operator]
            for i, row in zip(some, made[:, ids.shape[1] :], strict=True):
                generated[i] = str(tokenizer.decode(row, skip_special_tokens=True))
    finally:
        for name, p in module.named_parameters():
            p.data = before[name]
    return generated


def read_facts(path: Path, trainable: TrainableModel, length: int | None) -> tuple[Examples, Examples]:
    """JSON lines with name and description: asked for the description, and the other way round.  Raises BadInput."""
    if trainable.task != "causal-lm":
        raise BadInput(f"{path}: has facts for a language model, which this is not; leave it out")
    pairs = [reversed_pair(record) for record in read_records(path, ["name", "description"])]

    def direction(which: int) -> Examples:
        some = [pair[which] for pair in pairs]
        return rows_of([answered(p, r) for p, r in some], trainable, length, str(path))

    return direction(0), direction(1)


def recalled(model: Ensemble, facts: tuple[Examples, Examples]) -> dict[str, float]:
    """Mean probability a token of what is asked for, in both directions: what was forgotten in one may be had in the
    other."""
    found = (score_answers(model, rows) for rows in facts)
    forward, back = (float(answer_probability(a.log_p, a.mask).mean()) for a in found)
    return {"forward": forward, "reversed": back}
