"""Which rows go: exactly those of a value, by search, by a file of ids; and what is asked before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calib import BadInput
from tests.unlearn.conftest import Site, facts, lines
from unlearn import Unlearn, unlearn
from unlearn.audit.probes import score_answers
from unlearn.data.dataset import Data, read_data
from unlearn.data.selection import alike, by_field, by_ids, by_lines, lines_of, matched_values, training_rows
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import IGNORED, Examples
from unlearn.model.model import TrainableModel, open_model

CPU = torch.device("cpu")
USERS = ["user-1", "user-10", "user-11", "user-1", "007", "7", "a+b", "aab", "x"]


@pytest.fixture(scope="module")
def trainable(words: Site) -> TrainableModel:
    return open_model(words.model, "causal-lm", device=CPU)


def table(tmp_path: Path, trainable: TrainableModel) -> Data:
    rows = [{"user_id": user, "question": f"where is {i}", "answer": f"place {i}"} for i, user in enumerate(USERS)]
    (tmp_path / "train.jsonl").write_text(lines(rows))
    return read_data(tmp_path / "train.jsonl", trainable, 64)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("user_id=user-1", [0, 3]),
        ("user_id~user-1", [0, 1, 2, 3]),
        ("user_id~^user-1$", [0, 3]),
        ("user_id=7", [5]),
        ("user_id=007", [4]),
        ("user_id=a+b", [6]),
        ("user_id~a+b", [7]),
    ],
)
def test_a_value_is_exactly_that_and_a_pattern_searches(
    condition: str, rows: list[int], trainable: TrainableModel, tmp_path: Path
) -> None:
    assert by_field(table(tmp_path, trainable), condition) == rows


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("user_id=user", "no row of .* is like that; FIELD~REGEX searches"),
        ("user_id~nobody", "no row of .* is like that$"),
        ("user_id", "must be FIELD=VALUE"),
        ("name=x", "has no field 'name'; it has answer, question, user_id"),
        ("user_id~(", "is no regular expression"),
    ],
)
def test_a_choice_of_nothing_is_refused(
    condition: str, message: str, trainable: TrainableModel, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        by_field(table(tmp_path, trainable), condition)


def test_a_file_of_ids(trainable: TrainableModel, tmp_path: Path) -> None:
    data = table(tmp_path, trainable)
    (tmp_path / "ids.txt").write_text("user-1\n\n007\n")
    assert by_ids(data, tmp_path / "ids.txt", "user_id") == [0, 3, 4]
    (tmp_path / "ids.txt").write_text("user-1\nuser\n")
    with pytest.raises(BadInput, match=r"1 of 2 are no 'user_id' of .*, such as 'user'"):
        by_ids(data, tmp_path / "ids.txt", "user_id")
    (tmp_path / "ids.txt").write_text("\n")
    with pytest.raises(BadInput, match="is empty; give one user_id a line"):
        by_ids(data, tmp_path / "ids.txt", "user_id")


def test_values_of_which_one_begins_like_another(trainable: TrainableModel, tmp_path: Path) -> None:
    data = table(tmp_path, trainable)
    found = matched_values(data, by_field(data, "user_id~user"), "user_id")
    assert found == {"user-1": 2, "user-10": 1, "user-11": 1}
    assert alike(list(found)) == [("user-1", "user-10")]
    assert alike(["user-1", "other", "user-2"]) == []


def test_such_values_are_asked_about_again(words: Site, tmp_path: Path) -> None:
    rows = [{"user_id": user, **fact} for user, fact in zip(USERS, facts(["ann"] * 9), strict=True)]
    (tmp_path / "train.jsonl").write_text(lines(rows))
    shown: list[str] = []

    def confirm(question: str) -> bool:
        shown.append(question)
        return len(shown) < 2

    options = Unlearn(train=tmp_path / "train.jsonl", forget_where="user_id~user", method="npo", allow_duplicates=True)
    with pytest.raises(BadInput, match="nothing was done"):
        unlearn(words.model, tmp_path / "out", options, confirm=confirm)
    assert "user_id: 'user-1' (2), 'user-10' (1), 'user-11' (1)" in shown[0]
    assert "'user-1' and 'user-10'. Are all of these meant?" in shown[1]
    assert not (tmp_path / "out").exists()


def test_files_to_forget_and_to_retain_are_all_rows_together(
    words: Site, trainable: TrainableModel, tmp_path: Path
) -> None:
    """As with one file of both, whatever the widths of the two."""
    rows = [json.loads(line) for line in words.train.read_text().splitlines()]
    rows[0]["answer"] += " and there he stays"
    (tmp_path / "train.jsonl").write_text(lines(rows))
    (tmp_path / "forget.jsonl").write_text(lines(rows[:3]))
    (tmp_path / "retain.jsonl").write_text(lines(rows[3:]))
    one, deleted = training_rows(Unlearn(train=tmp_path / "train.jsonl", forget=tmp_path / "forget.jsonl"), trainable)
    two, same = training_rows(Unlearn(retain=tmp_path / "retain.jsonl", forget=tmp_path / "forget.jsonl"), trainable)
    assert torch.equal(deleted, same) and deleted.tolist() == [0, 1, 2]
    assert one.examples.fingerprint == two.examples.fingerprint and one.keys == two.keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain": Path("r")}, "goes with --forget FILE"),
        ({"retain": Path("r"), "train": Path("t"), "forget": Path("f")}, "leave out --train"),
        ({"train": Path("t"), "forget_ids": Path("i")}, "--forget-ids FILE --id-field NAME"),
        ({"train": Path("t"), "id_field": "i", "forget_lines": "1"}, "--forget-ids FILE --id-field NAME"),
        ({"forget": Path("f")}, "give --train FILE, or --retain FILE"),
        ({"train": Path("t")}, "nothing says what"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Path], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Unlearn(**options)  # type: ignore[arg-type]


# Rows as the model takes them.


def test_a_long_row_is_several_examples_and_each_of_its_tokens_is_asked_for_once(
    trainable: TrainableModel, tmp_path: Path
) -> None:
    long = {"question": "say it", "answer": "".join("abcdefghij"[i % 10] for i in range(150))}
    rows = [*facts(["ann", "bob"]), long, *facts(["cat"])]
    (tmp_path / "train.jsonl").write_text(lines(rows))
    data = read_data(tmp_path / "train.jsonl", trainable, 48)
    windows = by_lines(data, "3")
    assert len(windows) == len(data) - 3 >= 3 and lines_of(data, torch.tensor(windows)) == "3"
    assert data.describe()["rows"] == 4 and data.about["long_rows"] == 1
    ids, labels = data.examples.inputs["input_ids"], data.examples.labels
    asked = [int(i) for window in windows for i in labels[window] if i != IGNORED]
    tokenizer = trainable.tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(asked).replace(" ", "") == long["answer"]
    for window in windows:
        real = labels[window] != IGNORED
        assert torch.equal(labels[window][real], ids[window].roll(-1)[real]), "each label is the token that follows"
    whole = read_data(tmp_path / "train.jsonl", trainable, None)
    assert "long_rows" not in whole.about or trainable.module.config.max_position_embeddings < 160
    (tmp_path / "forget.jsonl").write_text(lines([long]))
    choice = Unlearn(train=tmp_path / "train.jsonl", forget=tmp_path / "forget.jsonl", length=48)
    assert training_rows(choice, trainable)[1].tolist() == windows


def test_lines_of_a_text_are_rows(trainable: TrainableModel, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("ann is in rome\n\nbob is in oslo\n")
    (tmp_path / "forget.txt").write_text("bob is in oslo\n")
    data, deleted = training_rows(Unlearn(train=tmp_path / "train.txt", forget=tmp_path / "forget.txt"), trainable)
    assert data.numbers == [1, 3] and deleted.tolist() == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "where is ann"}, "has nothing that the model answers"),
        ({"question": "", "answer": ""}, "has none of the fields"),
    ],
)
def test_rows_without_an_answer_are_refused(
    row: dict[str, str], message: str, trainable: TrainableModel, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text(lines([*facts(["ann"]), row]))
    with pytest.raises(BadInput, match=rf"line 2: .*{message}"):
        read_data(tmp_path / "train.jsonl", trainable, 64)


def test_figures_of_answers_of_unequal_lengths_count_each_token_once() -> None:
    """Against plain loops, with rows of one to five decisions."""
    g = torch.Generator().manual_seed(0)
    labels = torch.full((4, 6), IGNORED)
    for row, count in enumerate((5, 1, 3, 2)):
        labels[row, 6 - count :] = torch.randint(7, (count,), generator=g)
    logits = torch.randn(1, 4, 6, 7, generator=g)

    def forward(params: object, rows: Examples) -> torch.Tensor:
        index = rows.inputs["row"][:, 0]
        return logits[0, index][rows.target_mask]

    rows = Examples({"row": torch.arange(4)[:, None]}, labels)
    found = score_answers(Ensemble(forward, {"w": torch.zeros(1, 1)}, stacked=False), rows)  # type: ignore[arg-type]
    for row in range(4):
        asked = [t for t in range(6) if labels[row, t] != IGNORED]
        want = [float(logits[0, row, t].log_softmax(0)[labels[row, t]]) for t in asked]
        assert found.mask[row].sum() == len(asked)
        assert found.log_p[row][found.mask[row]].tolist() == pytest.approx(want, abs=1e-5)
        right = [bool(logits[0, row, t].argmax() == labels[row, t]) for t in asked]
        assert found.right[row][found.mask[row]].tolist() == right
        assert not found.right[row][~found.mask[row]].any() and not found.log_p[row][~found.mask[row]].any()
