"""Requests that follow each other: what was forgotten before is not taught again."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import BadInput
from calib.jobs.journal import Journal
from tests.unlearn.conftest import HOW, NAMES, Site, facts, lines, make
from tests.unlearn.test_unlearn import wanted
from unlearn import Unlearn, unlearn
from unlearn.data.dataset import read_data
from unlearn.model.ensemble import initial_ensemble, train_ensemble
from unlearn.model.examples import plain_examples
from unlearn.model.model import open_model
from unlearn.validate import validate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def first(net: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's ten rows are forgotten, in OUT."""
    out = tmp_path_factory.mktemp("first") / "out"
    unlearn(net.model, out, wanted(net, "npo", max_retain_loss=1.0))
    return out


def then(net: Site, method: str, rows: str = "40-44", **more: Any) -> Unlearn:
    return wanted(net, method, forget=None, forget_lines=rows, max_retain_loss=1.0, **more)


def edited(out: Path, into: Path, edit: Any) -> Path:
    """A copy of a folder, with another recipe."""
    shutil.copytree(out, into)
    recipe = json.loads((into / "parewell.json").read_text())
    edit(recipe["recipe"])
    (into / "parewell.json").write_text(json.dumps(recipe))
    return into


def test_rows_that_were_forgotten_before_have_no_part_in_what_follows(first: Path, net: Site, tmp_path: Path) -> None:
    """Rows 0 to 9 went first, 40 to 44 go now: a model is retrained on the other 75."""
    report = unlearn(first, tmp_path / "out", then(net, "retrain"))
    assert report["rows"] == {"train": 90, "forget": 5, "earlier": 10}
    assert list(report["quality_by_stage"]["after"]) == ["forget", "retain", "validation", "earlier"]
    tensors = load_file(net.train)
    left = torch.cat([torch.arange(10, 90)])
    rows = plain_examples(tensors["inputs"][left], tensors["labels"][left])
    expected = train_ensemble(initial_ensemble(make, [0]), rows, ((left < 40) | (left > 44))[None], [0], HOW)
    made = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.allclose(made[name], p[0], atol=1e-6) for name, p in expected.params.items())
    steps = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert [step["data"]["forget"]["rows"] for step in steps] == [10, 5] and steps[1]["data"]["earlier"]["rows"] == 10
    assert "forgotten before" in validate(first, tmp_path / "x", then(net, "npo")).summary()
    assert "Earlier requests: accuracy" in (tmp_path / "out/report.html").read_text()


def test_nothing_that_dmm_is_made_of_knows_them(first: Path, net: Site, tmp_path: Path) -> None:
    job = validate(first / "model.safetensors", tmp_path / "out", options := then(net, "dmm", calibrate=2))
    work = job.work(options, Journal(tmp_path))
    assert work.trainer is not None and len(work.rows) == len(work.trainer.rows) == 80
    tensors = load_file(net.train)
    deleted = {x.numpy().tobytes() for x in tensors["inputs"][:10]}
    assert deleted.isdisjoint(x.numpy().tobytes() for x in work.rows.inputs[""])
    assert torch.equal(work.rows[work.forgotten].inputs[""], tensors["inputs"][40:45])
    assert job.retained.tolist() == [*range(10, 40), *range(45, 90)]
    assert torch.equal(work.rows[work.retained].inputs[""], tensors["inputs"][job.retained])
    report = unlearn(first, tmp_path / "out", replace(options, audit=2))
    assert all(40 <= shown["row"] < 45 for shown in report["audit"]["shown"])


def test_a_row_may_be_forgotten_twice(first: Path, net: Site, tmp_path: Path) -> None:
    report = unlearn(first, tmp_path / "out", then(net, "npo", "5,40-44"))
    assert report["rows"] == {"train": 90, "forget": 6, "earlier": 9}
    again = unlearn(tmp_path / "out", tmp_path / "again", then(net, "npo", "0-9"))
    assert again["rows"] == {"train": 90, "forget": 10, "earlier": 5}, "of both requests, once each"
    with pytest.raises(BadInput, match="all 90 rows, 5 of them already, would be forgotten"):
        unlearn(tmp_path / "out", tmp_path / "more", then(net, "npo", "0-39,45-89"))


def test_a_recipe_has_keyed_digests_and_no_rows(first: Path, net: Site) -> None:
    (step,) = json.loads((first / "parewell.json").read_text())["recipe"]
    tensors = load_file(net.train)
    contents = [
        hashlib.sha256(x.numpy().tobytes() + f"\0{int(y)}".encode()).digest()
        for x, y in zip(tensors["inputs"][:10], tensors["labels"][:10], strict=True)
    ]
    secret = step["model"]["sha256"].encode()
    assert step["data"]["forget"]["digests"] == sorted(hmac.digest(secret, c, "sha256")[:12].hex() for c in contents)
    assert not any(c.hex()[:24] in json.dumps(step) for c in contents), "nobody finds a row by its plain hash"
    page = (first / "report.html").read_text()
    assert "digests 10 entries" in page and step["data"]["forget"]["digests"][0] not in page


def test_rows_are_known_by_content_in_another_file(first: Path, net: Site, tmp_path: Path) -> None:
    """In another order, with new rows; and where some were deleted from it, that is said."""
    tensors = load_file(net.train)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    order = order[order != 3]
    save_file({name: t[order] for name, t in tensors.items()}, tmp_path / "train.safetensors")
    other = replace(net, train=tmp_path / "train.safetensors")
    row = int((order == 50).nonzero())
    job = validate(first, tmp_path / "out", then(other, "npo", str(row)))
    assert sorted(order[job.earlier.rows].tolist()) == [0, 1, 2, *range(4, 10)]
    assert "1 of 10 rows that an earlier request was about are not in" in job.summary()
    report = unlearn(first, tmp_path / "out", then(other, "npo", str(row)))
    assert report["rows"]["earlier"] == 9 and "1 of 10 rows" in report["notes"][0]
    assert "1 of 10 rows" in (tmp_path / "out/report.html").read_text()


def test_an_old_recipe_has_lines_of_the_same_file(first: Path, net: Site, tmp_path: Path) -> None:
    def older(steps: list[dict[str, Any]]) -> None:
        del steps[0]["data"]["forget"]["digests"]

    old = edited(first, tmp_path / "old", older)
    job = validate(old, tmp_path / "out", then(net, "npo"))
    assert job.earlier.rows.tolist() == list(range(10)) and not job.earlier.notes
    tensors = load_file(net.train)
    save_file({name: t.flip(0).contiguous() for name, t in tensors.items()}, tmp_path / "train.safetensors")
    job = validate(old, tmp_path / "out", then(replace(net, train=tmp_path / "train.safetensors"), "npo"))
    assert not len(job.earlier.rows)
    (note,) = job.notes
    assert "which 10 rows an earlier request was about cannot be told" in note and "\n" not in note


def test_training_on_what_is_retained_does_not_bring_them_back(words: Site, tmp_path: Path) -> None:
    """Of a language model; beside the same without its recipe, which learns them again."""
    unlearn(words.model, tmp_path / "first", wanted(words, "npo", epochs=20, lr=5e-3))
    bare = shutil.copytree(tmp_path / "first", tmp_path / "bare")
    (bare / "parewell.json").unlink()
    options = wanted(
        words, "retain", forget=None, forget_where="question~gus", epochs=60, lr=3e-3, retain_multiplier=11.0
    )
    report = unlearn(tmp_path / "first", tmp_path / "second", options)
    assert report["rows"] == {"train": 12, "forget": 1, "earlier": 3}
    unlearn(bare, tmp_path / "taught", options)
    trainable = open_model(tmp_path / "second", "causal-lm", device=CPU)
    rows = read_data(words.forget, trainable, 64).examples
    nats = {}
    for name in ("first", "second", "taught"):
        model = open_model(tmp_path / name, "causal-lm", device=CPU)
        nats[name] = float(torch.nn.functional.cross_entropy(model.one().logits(rows)[0], rows.targets))
    assert report["quality_by_stage"]["after"]["earlier"]["nats"] == pytest.approx(nats["second"], rel=1e-4)
    assert report["quality_by_stage"]["before"]["earlier"]["nats"] == pytest.approx(nats["first"], rel=1e-4)
    assert nats["taught"] < 0.6 * nats["first"] and nats["second"] > 1.5 * nats["taught"]


def test_copies_of_rows_that_went_are_not_retained_either(words: Site, tmp_path: Path) -> None:
    unlearn(words.model, tmp_path / "first", wanted(words, "npo"))
    (tmp_path / "train.jsonl").write_text(lines([*facts(NAMES), *facts(NAMES)[:3]]))
    options = wanted(
        replace(words, train=tmp_path / "train.jsonl"), "npo", forget=None, forget_where="question~gus|ann"
    )
    job = validate(tmp_path / "first", tmp_path / "out", replace(options, allow_duplicates=True))
    assert len(job.forgotten) == 3 and job.earlier.rows.tolist() == [1, 2, 13, 14]
