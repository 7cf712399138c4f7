"""What a sequence classifier is asked for in each row: one class, several labels, or a number.

A model's `problem_type` says which, in its config.json as the transformers library reads it; labels that contradict it
are refused, never bent to fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.labeled import LabeledRows
from calib.losses.divergences import dense, forward_kl

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BOOLS = {"false": 0, "true": 1}


def problem_of(config: Any, source: object) -> str:
    """SINGLE, MULTI or REGRESSION: what a config of the library's says, else REGRESSION for one output and SINGLE for
    more.  Raises BadInput, naming `source`, where that is none of these or does not fit the number of outputs."""
    stated, outputs = getattr(config, "problem_type", None), int(config.num_labels)
    if stated is None:
        return REGRESSION if outputs == 1 else SINGLE
    if stated not in (SINGLE, MULTI, REGRESSION):
        raise BadInput(f"{source}: problem_type '{stated}' is none of {SINGLE}, {MULTI}, {REGRESSION}; correct it")
    if stated == REGRESSION and outputs != 1:
        raise BadInput(
            f"{source}: problem_type is {REGRESSION} with {outputs} outputs; only a single output can be used"
        )
    return str(stated)


def classification_targets(data: LabeledRows, label2id: Mapping[str, int], outputs: int, problem: str) -> Tensor:
    """Labels as losses take them, for a model of `outputs` outputs whose classes `label2id` names.

    SINGLE: class numbers, int (n,). MULTI: which labels hold, float of 0 and 1 (n, outputs). REGRESSION: float (n,).
    Raises BadInput, naming the row, for a label that does not fit the problem.
    """
    if problem == REGRESSION:
        return torch.tensor([_number_of(data, row) for row in range(len(data.labels))])
    if problem == MULTI:
        return _label_sets(data, label2id, outputs)
    return numbers_of(data, label2id)


def numbers_of(data: LabeledRows, label2id: Mapping[str, int]) -> Tensor:
    """Labels as the model numbers its classes, int (n,).  Raises BadInput for one that it does not know."""
    known = _known(label2id)
    return torch.tensor([_class_of(data, row, label, known, label2id) for row, label in enumerate(data.labels)])


def label_logits(logits: Tensor) -> Tensor:
    """(..., C) -> (..., C, 2): each label as a distribution of its own, over "does not hold" and "holds", so that what
    compares classes compares labels one by one: a softmax over these two is the sigmoid."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def output_distances(reference: Tensor, logits: Tensor, problem: str) -> Tensor:
    """Distance of each row's answer from the reference's: (n, C), (n, C) -> (n,).

    KL(reference || model) in nats; for MULTI the sum over labels of the KL of Bernoulli distributions; for REGRESSION
    the squared difference.
    """
    if problem == REGRESSION:
        return (reference - logits).square().sum(-1)
    if problem == MULTI:
        return dense(forward_kl, label_logits(reference), label_logits(logits)).sum(-1)
    return dense(forward_kl, reference, logits)


def _whole(text: str) -> int | None:
    """The whole number that a text writes, "1.0" too: so pandas writes 1 in a column that has gaps."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return int(value) if abs(value) < 1e9 and value.is_integer() else None


def _known(label2id: Mapping[str, int]) -> dict[str, int]:
    """What a label may be called: a class by its name, or by its number where names are not numbers themselves (of
    stars, say, from 1); of two classes also false and true."""
    known: dict[str, int] = {}
    if len(label2id) == 2:
        known |= {word: value for name, value in _BOOLS.items() for word in (name, name.title(), name.upper())}
    if not all(_whole(name) is not None for name in label2id):
        known |= {str(number): number for number in label2id.values()}
    return known | dict(label2id)


def _class_of(
    data: LabeledRows, row: int, label: str | list[str], known: Mapping[str, int], label2id: Mapping[str, int]
) -> int:
    where = f"{data.source}, {data.place(row)}"
    if isinstance(label, list):
        raise BadInput(
            f"{where}: its label is a list ({', '.join(label)[:40]}), and the model chooses one class a row; give one, "
            f"or set problem_type to {MULTI} in config.json"
        )
    number = known.get(label)
    if number is None and (whole := _whole(label)) is not None:
        number = known.get(str(whole))
    if number is None:
        raise BadInput(
            f"{where}: label '{label[:40]}' is none of the model's {len(label2id)}: "
            f"{', '.join(sorted(label2id))[:200]}; give those or their numbers"
        )
    return number


def _number_of(data: LabeledRows, row: int) -> float:
    label, where = data.labels[row], f"{data.source}, {data.place(row)}"
    if isinstance(label, list):
        raise BadInput(f"{where}: its label is a list, and the model gives one number ({REGRESSION}); give a number")
    value = float(label) if _NUMBER.fullmatch(label) else math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise BadInput(
            f"{where}: label '{label[:40]}' is no finite number, and the model gives one ({REGRESSION}); correct or "
            "remove it"
        )
    return value


def _label_sets(data: LabeledRows, label2id: Mapping[str, int], outputs: int) -> Tensor:
    """Lists of names or of numbers, or 0/1 vectors of all labels; in one file all rows are vectors or none is."""
    rows = [_listed(label, label2id) for label in data.labels]
    lists = [row if isinstance(row, list) else [row] for row in rows]
    if all(isinstance(row, str) and row not in label2id and _whole(row) is not None for row in rows):
        raise BadInput(
            f"{data.source}: has one number as the label of each row, and the model gives several labels ({MULTI}); "
            "give lists, or set problem_type in config.json"
        )
    flags = [[_BOOLS.get(v.lower(), _whole(v)) for v in listed] for listed in lists]
    if all(len(row) == outputs and set(row) <= {0, 1} for row in flags):
        return torch.tensor(flags, dtype=torch.float32)
    known, targets = _known(label2id), torch.zeros(len(lists), outputs)
    for row, listed in enumerate(lists):
        numbers = [_class_of(data, row, name, known, label2id) for name in listed]
        if len(set(numbers)) < len(numbers):
            raise BadInput(
                f"{data.source}, {data.place(row)}: its labels ({', '.join(listed)[:40]}) name one twice; give names "
                f"or numbers, or in every row a vector of {outputs} zeros and ones"
            )
        targets[row, numbers] = 1
    return targets


def _listed(label: str | list[str], label2id: Mapping[str, int]) -> str | list[str]:
    """A cell of a table with names or numbers between commas or semicolons, in brackets or not, as a list."""
    if isinstance(label, list) or label in label2id:
        return label
    inner = label.strip()
    bracketed = inner[:1] in ("[", "(") and inner[-1:] in ("]", ")")
    inner = inner[1:-1] if bracketed else inner
    separator = next((mark for mark in ";," if mark in inner), None)
    if separator is None and not bracketed:
        return inner
    return [v.strip().strip("\"'") for v in inner.split(separator) if v.strip()]  # numpy writes spaces
