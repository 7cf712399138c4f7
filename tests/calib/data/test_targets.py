"""Labels of classes, of several labels and of numbers, from files of every kind, against what they were made of."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

from calib import BadInput
from calib.data.labeled import LabeledRows, read_labeled
from calib.data.targets import (
    MULTI,
    REGRESSION,
    SINGLE,
    classification_targets,
    label_logits,
    output_distances,
    problem_of,
)

NAMES = {"joy": 0, "anger": 1, "fear": 2}


def read(path: Path, problem: str, names: dict[str, int] = NAMES) -> list[Any]:
    return classification_targets(read_labeled(path), names, len(names), problem).tolist()  # type: ignore[no-any-return]


def write(path: Path, labels: list[Any], column: str = "label") -> Path:
    """As Python's own writers have it, or pandas and pyarrow through Parquet."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": "w", column: label}) + "\n" for label in labels))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": "w", column: label} for label in labels]))
    elif path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": ["w"] * len(labels), column: labels}), path)
    else:
        with path.open("w", newline="") as stream:
            csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
                [["text", column], *(["w", label] for label in labels)]
            )
    return path


def test_what_a_config_says_and_what_it_leaves_open() -> None:
    assert problem_of(BertConfig(num_labels=1), "x") == REGRESSION
    assert problem_of(BertConfig(num_labels=2), "x") == problem_of(BertConfig(num_labels=5), "x") == SINGLE
    assert problem_of(BertConfig(num_labels=3, problem_type=MULTI), "x") == MULTI
    with pytest.raises(BadInput, match="x: problem_type is regression with 3 outputs"):
        problem_of(BertConfig(num_labels=3, problem_type=REGRESSION), "x")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("column", ["label", "labels"])
def test_classes_by_name_and_number(ending: str, column: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / f"n.{ending}", ["fear", "joy"], column), SINGLE) == [2, 0]
    assert read(write(tmp_path / f"i.{ending}", [1, 2, 0], column), SINGLE) == [1, 2, 0]
    assert read(write(tmp_path / f"f.{ending}", [1.0, 2.0], column), SINGLE) == [1, 2], "as pandas writes them"
    assert read(write(tmp_path / f"b.{ending}", [True, False], column), SINGLE, {"no": 0, "yes": 1}) == [1, 0]


@pytest.mark.parametrize("labels", [["1", "5", "3"], [1, 5, 3], [1.0, 5.0, 3.0]])
def test_names_that_are_numbers_are_names(labels: list[Any], tmp_path: Path) -> None:
    """Stars from 1 to 5: "1" is the first class, not the second; 0 is none."""
    stars = {str(n): n - 1 for n in range(1, 6)}
    assert read(write(tmp_path / "x.jsonl", labels), SINGLE, stars) == [0, 4, 2]
    with pytest.raises(BadInput, match=r"line 1: label '0' is none of the model's 5"):
        read(write(tmp_path / "y.jsonl", [0]), SINGLE, stars)


SETS = [["joy", "fear"], [], ["anger"], ["joy", "anger", "fear"]]
VECTORS = [[float(name in row) for name in NAMES] for row in SETS]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_several_labels(ending: str, tmp_path: Path) -> None:
    """Lists of names, of numbers, and vectors; csv writes a list as Python prints it."""
    for name, labels in (
        ("names", SETS),
        ("numbers", [[NAMES[label] for label in row] for row in SETS]),
        ("vectors", [[int(v) for v in row] for row in VECTORS]),
        ("floats", VECTORS),
    ):
        assert read(write(tmp_path / f"{name}.{ending}", labels, "labels"), MULTI) == VECTORS, name
    if ending != "parquet":
        flags = [[bool(v) for v in row] for row in VECTORS]
        assert read(write(tmp_path / f"flags.{ending}", flags), MULTI) == VECTORS


@pytest.mark.parametrize("separator", [",", ";", ", ", " ; "])
def test_several_labels_in_one_cell(separator: str, tmp_path: Path) -> None:
    full = [row for row in SETS if row]
    expected = [row for row in VECTORS if any(row)]
    assert read(write(tmp_path / "n.csv", [separator.join(row) for row in full]), MULTI) == expected
    numbers = [separator.join(str(NAMES[name]) for name in row) for row in full]
    assert read(write(tmp_path / "i.csv", numbers), MULTI) == expected
    vectors = [separator.join(str(int(v)) for v in row) for row in VECTORS]
    assert read(write(tmp_path / "v.csv", vectors), MULTI) == VECTORS
    assert read(write(tmp_path / "p.csv", ["[1 0 1]", "[0. 1. 0.]"]), MULTI) == [[1, 0, 1], [0, 1, 0]], (
        "numpy prints so"
    )
    assert read(write(tmp_path / "c.csv", ["a, b", "c"]), MULTI, {"a, b": 0, "c": 1}) == [[1, 0], [0, 1]]


def test_numbers(tmp_path: Path) -> None:
    values = [0, 2.5, 5.0, -1, 3e-2]
    for ending in ("jsonl", "csv", "tsv", "json"):
        assert read(write(tmp_path / f"x.{ending}", values), REGRESSION) == pytest.approx(values)
    assert read(write(tmp_path / "s.jsonl", ["3.80"]), REGRESSION) == pytest.approx([3.8])


@pytest.mark.parametrize(
    ("labels", "problem", "word"),
    [
        (["joy", math.nan], SINGLE, "line 2: its label holds NaN"),
        (["joy", None], SINGLE, "line 2"),
        (["joy", ""], SINGLE, "line 2"),
        ([0, -1], SINGLE, "line 2: label '-1' is none of the model's 3"),
        ([0, 3], SINGLE, "line 2: label '3' is none"),
        ([0, 0.5], SINGLE, "line 2: label '0.5' is none"),
        ([0, "nan"], SINGLE, "line 2: label 'nan' is none"),
        ([0, [1]], SINGLE, "line 2: its label is a list .*problem_type"),
        ([[1, 0, 1]], SINGLE, "line 1: its label is a list"),
        ([{"joy": 1}], SINGLE, "line 1: its label holds"),
        ([["joy"], ["joy", None]], MULTI, "line 2: its label list holds null"),
        ([["joy"], [math.nan]], MULTI, "line 2: its label list holds NaN"),
        ([["joy"], [["fear"]]], MULTI, "line 2: its label list holds"),
        ([["joy"], ["gloom"]], MULTI, "line 2: label 'gloom' is none"),
        ([["joy"], ["joy", "joy"]], MULTI, "line 2: .*name one twice"),
        ([[1, 0, 1], [0, 1]], MULTI, "line 1: .*name one twice"),
        ([[0.2, 0.7, 1]], MULTI, "line 1: label '0.2' is none"),
        ([0, 2, 1], MULTI, "one number as the label of each row.*problem_type"),
        ([0.5, "high"], REGRESSION, "line 2: label 'high' is no finite number"),
        ([0.5, math.nan], REGRESSION, "line 2: its label holds NaN"),
        ([0.5, "NaN"], REGRESSION, "line 2: label 'NaN' is no finite number"),
        ([0.5, math.inf], REGRESSION, "line 2: label 'inf'"),
        ([0.5, 1e300], REGRESSION, "line 2"),
        ([0.5, True], REGRESSION, "line 2: label 'True'"),
        ([0.5, [1.0]], REGRESSION, "line 2: its label is a list"),
        (["1,5"], REGRESSION, "line 1: label '1,5'"),
    ],
)
def test_labels_that_do_not_fit(labels: list[Any], problem: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"x\.jsonl.*{word}"):
        read(write(tmp_path / "x.jsonl", labels), problem)


@given(st.integers(0, 1000))
def test_distances_are_those_of_torch_distributions(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, 4, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    kl = torch.distributions.kl_divergence
    one = kl(torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
    many = kl(torch.distributions.Bernoulli(logits=p), torch.distributions.Bernoulli(logits=q)).sum(-1)
    assert torch.allclose(output_distances(p, q, SINGLE), one)
    assert torch.allclose(output_distances(p, q, MULTI), many)
    assert torch.allclose(output_distances(p[:, :1], q[:, :1], REGRESSION), (p - q)[:, 0] ** 2)
    assert torch.allclose(label_logits(p).softmax(-1)[..., 1], p.sigmoid())


SCALARS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.sampled_from([*NAMES, "1;0", "[0, 1]", "[]", "()", "1.0"]),
    st.text(max_size=6),
)  # fmt: skip


@given(st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(), SCALARS)), max_size=3))
def test_any_label_is_understood_or_refused(tmp_path_factory: pytest.TempPathFactory, labels: list[Any]) -> None:
    for problem, shape in ((SINGLE, ()), (MULTI, (3,)), (REGRESSION, ())):
        file = write(tmp_path_factory.getbasetemp() / "any.jsonl", labels)
        try:
            found = classification_targets(read_labeled(file), NAMES, 3, problem)
        except BadInput:
            continue
        assert found.shape == (len(labels), *shape) and found.isfinite().all()
        assert problem == REGRESSION or (found.min() >= 0 and found.max() <= (2 if problem == SINGLE else 1))


def test_rows_keep_their_places_when_drawn(tmp_path: Path) -> None:
    data = read_labeled(write(tmp_path / "x.jsonl", [0, 1, 2]))[[2, 0]]
    assert [data.place(row) for row in range(2)] == ["line 3", "line 1"]
    assert LabeledRows([("a",)], ["joy"], "here").place(0) == "row 0"
