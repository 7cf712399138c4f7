"""Texts with labels: TSV with a header line, or JSON lines; and how well a classifier does on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

from calib import BadInput

TEXTS = ("text", "sentence", "sentence1", "question", "premise", "text_pair", "sentence2", "hypothesis")
BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Labelled:
    """One or two texts and a label for each row."""

    texts: list[tuple[str, ...]]
    labels: list[str]
    source: str

    def __getitem__(self, rows: slice | list[int]) -> Labelled:
        chosen = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        return Labelled([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.source)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


def read_labelled(path: Path) -> Labelled:
    """Raises BadInput, naming the line, where a text or a label is missing."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a .tsv or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    records: list[tuple[int, Any]] = []
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
        columns = list(records[0][1]) if records and isinstance(records[0][1], dict) else []
    else:  # quotation marks mean nothing in a TSV of sentences
        columns = lines[0].split("\t")
        cells = ((number, line.split("\t")) for number, line in enumerate(lines[1:], 2) if line.strip())
        records = [(number, dict(zip(columns, row, strict=False))) for number, row in cells]
    named = [name for name in columns if name in TEXTS]
    if not records or not named or "label" not in columns:
        raise BadInput(f"{path}: its first line names no text ({', '.join(TEXTS)}) or no label; name the columns")
    if len(named) > 2 or len(set(columns)) < len(columns):
        raise BadInput(
            f"{path}: has the columns {', '.join(columns)}; one or two texts and a label are read, each once"
        )
    texts, labels = [], []
    for number, record in records:
        values = [record.get(name) if isinstance(record, dict) else None for name in (*named, "label")]
        if any(value is None or value == "" for value in values) or not all(isinstance(v, str) for v in values[:-1]):
            raise BadInput(f"{path}, line {number}: has no {', '.join(named)} or no label; mend or remove the line")
        if any("\ud800" <= c <= "\udfff" for value in values for c in str(value)):
            raise BadInput(
                f"{path}, line {number}: has half a surrogate pair, which is no text; mend or remove the line"
            )
        texts.append(tuple(str(value) for value in values[:-1]))
        labels.append(str(values[-1]))
    return Labelled(texts, labels, str(path))


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
