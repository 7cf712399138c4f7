"""Texts with labels, from any kind of file of rows."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.data.records import is_prose, read_rows

TEXTS = (
    "text", "sentence", "sentence1", "question", "question1", "premise", "text_pair", "sentence2", "question2",
    "hypothesis",
)  # fmt: skip
LABELS = ("label", "labels")


@dataclass(frozen=True)
class LabeledRows:
    """Rows of a labeled file: one or two texts and a label each (a list of labels where the file has lists), the line
    or row of the file by number and in words, and all fields by name."""

    texts: list[tuple[str, ...]]
    labels: list[str | list[str]]
    source: str
    numbers: list[int] = field(default_factory=list)
    fields: list[dict[str, str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def inputs(self) -> list[tuple[str, ...]]:
        """Texts by row, as a classifier is given them."""
        return self.texts

    def __getitem__(self, rows: slice | list[int]) -> LabeledRows:
        chosen = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        return LabeledRows(
            [self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.source,
            [self.numbers[i] for i in chosen if self.numbers], [self.fields[i] for i in chosen if self.fields],
            [self.places[i] for i in chosen if self.places],
        )  # fmt: skip

    def place(self, row: int) -> str:
        """Name a row for messages, such as "line 3"."""
        return self.places[row] if self.places else f"row {row}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of texts and labels, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


def read_labeled(path: Path) -> LabeledRows:
    """Rows of any kind of file that calib.data.records reads.  Raises BadInput, naming the line, where a text or a
    label is missing."""
    if is_prose(path):
        raise BadInput(f"{path}: is running text; rows with labels are .tsv, .csv, .jsonl, .json or .parquet files")
    texts, labels, numbers = list[tuple[str, ...]](), list[str | list[str]](), list[int]()
    fields, places = list[dict[str, str]](), list[str]()
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
        labels.append(_label(answer, f"{where}: its {label}"))
        numbers.append(row.number)
        places.append(row.place)
        fields.append({name: str(row.fields[name]) for name in (*named, label)})
    if not texts:
        raise BadInput(f"{path}: is empty, or its first line names no columns; give some rows")
    return LabeledRows(texts, labels, str(path), numbers, fields, places)


def _label(value: Any, what: str) -> str | list[str]:
    """As text, or a list of texts.  Raises BadInput, which begins with `what`, where something is missing in it."""
    if isinstance(value, list | tuple):
        return [_scalar(item, f"{what} list") for item in value]
    return _scalar(value, what)


def _scalar(value: Any, what: str) -> str:
    if isinstance(value, float) and math.isnan(value):
        raise BadInput(f"{what} holds NaN, which is no label; mend or remove the line")
    if value is None or value == "" or isinstance(value, list | tuple | dict):
        raise BadInput(f"{what} holds {json.dumps(value)[:40]}, which is no label; mend or remove the line")
    return str(value)


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
