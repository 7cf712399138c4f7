"""Facts that are forgotten and retained in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calib import BadInput
from calib.jobs.journal import Journal
from tests.unlearn.conftest import NAMES, PLACES, Site, lines
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn
from unlearn.audit.gate import gate_of
from unlearn.audit.probes import read_facts, score_answers
from unlearn.data.dataset import read_data
from unlearn.data.selection import training_rows
from unlearn.model.model import open_model, running
from unlearn.validate import validate

CPU = torch.device("cpu")


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    """Twelve facts, one a line."""
    file = tmp_path / "facts.jsonl"
    rows = [{"name": n, "description": f"a {PLACES[i % 4]} {n[::-1]}.", "of": str(i % 2)} for i, n in enumerate(NAMES)]
    file.write_text(lines(rows))
    return file


def test_each_fact_is_two_rows_that_go_together(words: Site, taught: Path, tmp_path: Path) -> None:
    trainable = open_model(words.model, "causal-lm", device=CPU)
    data = read_data(taught, trainable, 64, reverse=True)
    assert len(data) == 24 and data.numbers[:4] == [1, 1, 2, 2] and len(set(data.keys)) == 24
    assert data.describe()["rows"] == 12 and data.describe()["both_ways"] is True
    asked = read_facts(taught, trainable, 64)
    one = trainable.one()
    both = score_answers(one, data.examples).per_token
    for i in (0, 1):  # the rows of `--facts`, one direction after the other
        assert torch.allclose(both[i::2], score_answers(one, asked[i]).per_token, atol=1e-5)
    (tmp_path / "forget.jsonl").write_text("".join(taught.read_text().splitlines(keepends=True)[3:5]))
    for more, rows in (
        ({"forget_lines": "1,12"}, [0, 1, 22, 23]),
        ({"forget_where": "name=cat"}, [4, 5]),
        ({"forget": tmp_path / "forget.jsonl"}, [6, 7, 8, 9]),
    ):
        options = wanted(words, "npo", **{"train": taught, "forget": None, "both_ways": True} | more)
        assert training_rows(options, trainable)[1].tolist() == rows


def test_a_model_forgets_both_ways(words: Site, taught: Path, tmp_path: Path) -> None:
    """Taught both ways first; forgetting one way leaves more of the other than forgetting both."""
    given = {"train": taught, "forget": None, "validation": None, "facts": tmp_path / "gone.jsonl"}
    (tmp_path / "gone.jsonl").write_text("".join(taught.read_text().splitlines(keepends=True)[:3]))
    (tmp_path / "how.json").write_text(json.dumps({"optimiser": "adamw", "epochs": 60, "batch": 8, "lr": 0.01}))
    learned = {**given, "forget_lines": "12", "both_ways": True, "training": tmp_path / "how.json"}
    unlearn(words.model, tmp_path / "taught", wanted(words, "retrain", **learned), allow_damage=True)
    (tmp_path / "one.jsonl").write_text(
        lines([
            {"prompt": f"{row['name']} is", "completion": f" {row['description'].removesuffix('.')}"}
            for row in map(json.loads, taught.read_text().splitlines()[:11])
        ])
    )  # fmt: skip
    how = {"epochs": 10, "lr": 5e-3, "forget_lines": "1-3"}
    way = wanted(words, "npo", **{**given, **how, "train": tmp_path / "one.jsonl"})
    single = unlearn(tmp_path / "taught", tmp_path / "single", way, allow_damage=True)["asked"]["facts"]
    options = wanted(words, "npo", **{**given, **how, "both_ways": True})
    report = unlearn(tmp_path / "taught", tmp_path / "both", options, allow_damage=True)
    both = report["asked"]["facts"]
    assert report["rows"] == {"train": 12, "forget": 3, "earlier": 1}
    assert single["before"] == both["before"] and min(both["before"].values()) > 0.5
    assert single["after"]["forward"] < 0.5 * both["before"]["forward"]
    assert both["after"]["reversed"] < 0.5 * both["before"]["reversed"]
    assert both["after"]["reversed"] < 0.9 * single["after"]["reversed"]
    assert gate_of(tmp_path / "both", lambda folder, device: running(None)) is not None, "which reads the rows again"
    job = validate(tmp_path / "taught", tmp_path / "x", options)
    assert len(job.work(options, Journal(tmp_path)).forgotten) == 6


def test_rows_that_are_no_facts(words: Site, taught: Path, tmp_path: Path) -> None:
    trainable = open_model(words.model, "causal-lm", device=CPU)
    (tmp_path / "text.txt").write_text("ann is here\n")
    (tmp_path / "mixed.jsonl").write_text(taught.read_text() + lines([{"name": "ann", "description": 3}]))
    for file, place in (("text.txt", "line 1"), ("mixed.jsonl", "line 13")):
        with pytest.raises(BadInput, match=f"{place}: is no fact, which --both-ways is about"):
            read_data(tmp_path / file, trainable, 64, reverse=True)
