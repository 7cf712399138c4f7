"""Texts with labels, from any kind of file of rows; and how well a classifier does on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

from calib import BadInput
from calib.records import is_prose, read_rows

TEXTS = (
    "text", "sentence", "sentence1", "question", "question1", "premise", "text_pair", "sentence2", "question2",
    "hypothesis",
)  # fmt: skip
LABELS = ("label", "labels")
BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Labelled:
    """One or two texts and a label for each row; the line or row of the file that it is, and its fields by name."""

    texts: list[tuple[str, ...]]
    labels: list[str]
    source: str
    numbers: list[int] = field(default_factory=list)
    fields: list[dict[str, str]] = field(default_factory=list)

    def __getitem__(self, rows: slice | list[int]) -> Labelled:
        chosen = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        return Labelled(
            [self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.source,
            [self.numbers[i] for i in chosen if self.numbers], [self.fields[i] for i in chosen if self.fields],
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


def read_labelled(path: Path) -> Labelled:
    """Rows of any kind of file that calib.records reads.  Raises BadInput, naming the line, where a text or a label is
    missing."""
    if is_prose(path):
        raise BadInput(f"{path}: is running text; rows with labels are .tsv, .csv, .jsonl, .json or .parquet files")
    texts, labels, numbers, fields = list[tuple[str, ...]](), list[str](), list[int](), list[dict[str, str]]()
    named, label = list[str](), ""
    for row in read_rows(path):
        where = f"{path}, {row.place}"
        if not texts:
            named, label = _columns(list(row.fields), path)
        values = [row.fields.get(name) for name in named]
        answer = row.fields.get(label)
        if any(value is None or value == "" for value in (*values, answer)) or not all(
            isinstance(value, str) for value in values
        ):
            raise BadInput(f"{where}: has no {', '.join(named)} or no {label}; mend or remove the line")
        if any("\ud800" <= c <= "\udfff" for value in (*values, answer) for c in str(value)):
            raise BadInput(f"{where}: has half a surrogate pair, which is no text; mend or remove the line")
        texts.append(tuple(str(value) for value in values))
        labels.append(str(answer))
        numbers.append(row.number)
        fields.append({name: str(row.fields[name]) for name in (*named, label)})
    if not texts:
        raise BadInput(f"{path}: is empty, or its first line names no columns; give some rows")
    return Labelled(texts, labels, str(path), numbers, fields)


def _columns(columns: list[str], path: Path) -> tuple[list[str], str]:
    """Names of the texts and of the label."""
    named, label = [name for name in columns if name in TEXTS], next((n for n in LABELS if n in columns), "")
    if not named or not label:
        raise BadInput(
            f"{path}: its first line names no text ({', '.join(TEXTS)}) or no label ({', '.join(LABELS)}); it names "
            f"{', '.join(columns)[:80]}"
        )
    if len(named) > 2:
        raise BadInput(f"{path}: has the columns {', '.join(columns)}; one or two texts and a label are read")
    return named, label


def numbers_of(data: Labelled, label2id: Mapping[str, int]) -> Tensor:
    """Labels as the model numbers them (n,).  Raises BadInput for one that it does not know."""
    classes = set(label2id.values())
    numbers = []
    for row, label in enumerate(data.labels):
        number = label2id.get(label, int(label) if label.isdecimal() and len(label) < 9 else -1)
        if number not in classes:
            raise BadInput(
                f"{data.source}: label '{label[:40]}' (row {row}) is none of the model's {len(classes)}: "
                f"{', '.join(sorted(label2id))}; give those or their numbers"
            )
        numbers.append(number)
    return torch.tensor(numbers)


@dataclass(frozen=True)
class Skill:
    """Of a classifier on `rows` rows: accuracy, Matthews correlation, F1 (of class 1 where there are two, else the mean
    over classes), calibration error, and, against the reference, mean KL in nats and the share of equal answers."""

    rows: int
    accuracy: float
    mcc: float
    f1: float
    ece: float
    kl: float
    top1_agreement: float

    def asdict(self) -> dict[str, float]:
        return asdict(self)


def skill(logits: Tensor, labels: Tensor, reference: Tensor) -> Skill:
    """logits, reference (n, C), labels (n,)."""
    answers, log_q, log_p = logits.argmax(-1), logits.log_softmax(-1), reference.log_softmax(-1)
    kind = "binary" if logits.shape[-1] == 2 else "macro"
    return Skill(
        len(labels),
        float((answers == labels).double().mean()),
        float(matthews_corrcoef(labels.numpy(), answers.numpy())),
        float(f1_score(labels.numpy(), answers.numpy(), average=kind, zero_division=0)),
        calibration_error(log_q.exp(), labels),
        float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean()),
        float((answers == reference.argmax(-1)).double().mean()),
    )


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean gap of confidence and accuracy over BINS equal bins of confidence (ECE, arXiv:1706.04599).  (n, C), (n,)."""
    confidence, answers = probabilities.double().max(-1)
    right = (answers == labels).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, right - confidence)
    return float(gap.abs().sum() / len(labels))
