"""Which rows are chosen, by what a person would say of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from calib import BadInput, embedded
from calib.data.prompts import prompt_format
from tests import tiny
from unlearn.data.dataset import Data, read_answers, read_data
from unlearn.data.selection import alike, by_field, by_file, by_ids, by_lines, nearly
from unlearn.model.model import open_model

USERS = [
    "user-1",
    "user-10",
    "user-11",
    "007",
    7,
    7.0,
    None,
    "null",
    "a.b",
    "axb",
    "a+b",
    "True",
    True,
    "Zoë",
    "Zoe\u0308",
]


def read(path: Path) -> Data:
    return read_answers(path, AutoTokenizer.from_pretrained(embedded.MODEL), 32, prompt_format("plain", None))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Data:
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    rows = [{"text": f"row number {i}", "user": user} for i, user in enumerate(USERS)] + [{"text": "of nobody"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return read(file)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("user=user-1", [0]),
        ("user~user-1", [0, 1, 2]),
        ("user~^user-1$", [0]),
        ("user=007", [3]),
        ("user=7", [4]),
        ("user=7.0", [5]),
        ("user=null", [7]),  # the word, not what is missing
        ("user=a.b", [8]),
        ("user~a.b", [8, 9, 10]),
        ("user=a+b", [10]),
        ("user=True", [11]),
        ("user=true", [12]),
        ("user=Zoë", [13]),
        ("user~^(?!user)", [3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14]),  # none that has no user
        ("user~", [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14]),
    ],
)
def test_rows_by_a_field(condition: str, rows: list[int], train: Data) -> None:
    assert by_field(train, condition) == rows


@pytest.mark.parametrize("condition", ["user=", "user=USER-1", "user=user-1 ", "user=7.00", "user=None"])
def test_what_no_row_is_exactly_like_is_refused(condition: str, train: Data) -> None:
    with pytest.raises(BadInput, match="no row of"):
        by_field(train, condition)


def test_rows_by_a_file_of_ids(train: Data, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeffuser-1\r\n\r\n007\r\nuser-1\r\na+b".encode())
    assert by_ids(train, tmp_path / "ids.txt", "user") == [0, 3, 10]
    (tmp_path / "ids.txt").write_text("user-1\nuser-12\n")
    with pytest.raises(BadInput, match=r"1 of 2 are no 'user'.*'user-12'"):
        by_ids(train, tmp_path / "ids.txt", "user")


def test_rows_of_a_file_are_taken_as_often_as_they_stand_there(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one two\nthree four\none two\nfive six\n")
    (tmp_path / "forget.txt").write_text("one two\nfive six\n")
    whole, asked = read(tmp_path / "train.txt"), read(tmp_path / "forget.txt")
    assert by_file(whole, asked) == [0, 3] and by_lines(whole, "1,4") == [0, 3]
    (tmp_path / "forget.txt").write_text("one two\n" * 3)
    with pytest.raises(BadInput, match="1 of 3 rows are not in"):
        by_file(whole, read(tmp_path / "forget.txt"))


def test_values_that_are_nearly_the_same(train: Data, tmp_path: Path) -> None:
    assert nearly(train, ["Zoë"], "user") == ["Zoe\u0308"] and nearly(train, ["user-1"], "user") == []
    assert nearly(train, ["true"], "user") == ["True"] and nearly(train, ["USER-1 "], "user") == ["user-1"]


def test_values_that_begin_alike() -> None:
    assert alike(["user-1", "user-10", "user-2"]) == [("user-1", "user-10")]


def test_tokens_that_have_no_embedding_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of("qwen2", vocab_size=5), dtype=torch.float32), tmp_path / "model")
    (tmp_path / "train.txt").write_text("abc\nab\n")
    trainable = open_model(folder, "causal-lm", device=torch.device("cpu"))
    with pytest.raises(BadInput, match="token id 5 is beyond the model's vocabulary of 5"):
        read_data(tmp_path / "train.txt", trainable)
