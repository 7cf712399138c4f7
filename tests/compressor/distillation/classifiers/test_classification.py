"""Encoders: a tiny BERT taught by another, on sentences whose label is one of their words."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from calib import BadInput
from calib.data.labeled import LabeledRows, read_labeled
from calib.data.targets import numbers_of
from calib.jobs.recipe import read_recipe
from calib.stats.classification import calibration_error, classification_metrics
from compressor import Distill, distill
from compressor.distillation.classifiers.classification import with_layers_left
from compressor.distillation.classifiers.texts import open_classifier
from compressor.report.common import cut_rows
from tests.kills import digest
from tests.processes import command, torchrun

SMALL = Distill(
    task="sequence-classification", layers=1, held_out=12, length=16, steps=30, batch=8, lr=3e-3,
    loss="0.5*ce+0.5*forward-kl", precision="float32", device="cpu",
)  # fmt: skip


def sentences(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(rows):
        label = int(torch.randint(2, (), generator=g))
        words = [f"w{int(i)}" for i in torch.randint(20, (6,), generator=g)]
        words.insert(int(torch.randint(7, (), generator=g)), ("bad", "good")[label])
        result.append((" ".join(words), ("no", "yes")[label]))
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("labelled") / "data.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(96)))
    return file


@pytest.fixture(scope="module")
def teacher(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours: the tiny BERT, trained on the labels."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    report = distill(bert, out, replace(SMALL, layers=None, student=bert, data=data, loss="ce", steps=60))
    assert report["quality"]["accuracy"] > 0.9
    return out


def test_a_student_learns_from_its_teacher_and_loads_in_the_library(
    bert: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    report = distill(teacher, tmp_path / "out", replace(SMALL, layers=None, student=bert, data=data, steps=60))
    stages = report["quality_by_stage"]
    assert stages["after"]["kl"] < 0.5 * stages["before"]["kl"] and stages["after"]["accuracy"] > 0.8
    assert set(stages["after"]) >= {"accuracy", "mcc", "f1", "ece"} and stages["teacher"]["kl"] == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "no", 1: "yes"}
    # The figures of the report, from the folder and the library alone.
    rows = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:12].tolist()
    lines = data.read_text().splitlines()[1:]
    right = 0
    for row in rows:
        text, label = lines[row].split("\t")
        with torch.no_grad():
            right += model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] == label
    assert right / 12 == pytest.approx(stages["after"]["accuracy"])
    page = (tmp_path / "out/report.html").read_text()
    assert "calibration error" in page


@pytest.mark.parametrize("loss", ["forward-kl+0.1*sinkhorn", "ce+0.8*sinkhorn-sharp(0.1,20)", "nkd", "bd-kd", "ofa"])
def test_losses(loss: str, bert: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    report = distill(teacher, tmp_path / "out", replace(SMALL, layers=None, student=bert, data=data, loss=loss))
    stages = report["quality_by_stage"]
    assert stages["after"]["kl"] < stages["before"]["kl"]


def test_a_loss_of_sets_pulls_at_the_student(teacher: Path, data: Path, tmp_path: Path) -> None:
    options = replace(SMALL, data=data, steps=3, loss="forward-kl")
    alone = distill(teacher, tmp_path / "alone", options)
    beside = distill(teacher, tmp_path / "beside", replace(options, loss="forward-kl+sinkhorn"))
    assert alone["quality"]["kl"] != beside["quality"]["kl"]
    assert all(error < 0.5 for error in beside["curves"]["marginal error of sinkhorn"])


def test_an_encoder_without_a_head_teaches_nothing(bert: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(bert, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if not name.startswith("classifier")},
        bare / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(BadInput, match="has no classification head"):
        distill(bare, tmp_path / "out", replace(SMALL, data=data, loss="forward-kl"))
    assert {p.name for p in tmp_path.iterdir()} == {"bare"}
    distill(bare, tmp_path / "out", replace(SMALL, data=data, layers=None, student=bare, loss="ce", steps=2))


def test_texts_are_cut_to_what_the_model_has_positions_for(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.tsv"
    file.write_text("sentence\tlabel\n" + f"good {'w1 ' * 90}\tyes\nbad {'w2 ' * 90}\tno\n" * 12)
    report = distill(teacher, tmp_path / "out", replace(SMALL, data=file, held_out=4, length=None, steps=2))
    assert 0 <= report["quality"]["accuracy"] <= 1
    rows = {name: of["rows"] for name, of in report["data"].items()}
    assert rows == {name: of["cut_rows"] for name, of in report["data"].items()}
    assert list(cut_rows(report)) == [
        f"{rows[name]} texts of the {kind} data were longer than --length and were cut."
        for name, kind in (("training", "training"), ("held_out", "held-out"))
    ]


def test_two_processes(teacher: Path, data: Path, tmp_path: Path) -> None:
    """Without dropout, which each process draws for itself."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config | still))
    options = ["--task", "sequence-classification", "--layers", 1, "--data", data, "--held-out", 12, "--length", 16]
    options += ["--steps", 4, "--batch", 5, "--lr", 1e-3, "--device", "cpu", "--json", "--allow-damage"]
    one = command("distill", folder, tmp_path / "one", *options)
    two = torchrun("-m", "cli.main", "distill", folder, tmp_path / "two", *options)
    assert two.returncode == 0, two.stderr
    a, b = json.loads(one.stdout), json.loads(two.stdout)
    assert b["quality"]["kl"] == pytest.approx(a["quality"]["kl"], rel=1e-3)


def test_a_student_of_some_of_the_blocks(teacher: Path, data: Path, tmp_path: Path) -> None:
    report = distill(teacher, tmp_path / "out", replace(SMALL, data=data, steps=2))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == len(report["cut"]) == 1


def test_the_same_job_twice_and_interrupted_gives_the_same_bytes(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.jobs import training_loop as fitting

    options = replace(SMALL, data=data, steps=6, ema=0.5)
    distill(teacher, tmp_path / "out", options)
    whole = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "asked_to_stop", iter([False, False, True]).__next__)
        distill(teacher, tmp_path / "out", options)
    distill(teacher, tmp_path / "out", options, resume=True)
    assert digest(tmp_path / "out") == whole


def test_blocks_are_left_out_by_what_their_absence_costs(teacher: Path, data: Path) -> None:
    """Brute force over single drops."""
    whole = open_classifier(teacher, SMALL)
    texts = read_labeled(data).texts[:40]
    _, [left] = with_layers_left(whole, 2, texts)
    reference, costs = whole.answers(texts).log_softmax(-1), {}
    for without in range(3):
        other = open_classifier(teacher, SMALL)
        del other.model.bert.encoder.layer[without]
        answers = other.answers(texts).log_softmax(-1)
        costs[without] = float((reference.exp() * (reference - answers)).sum(-1).mean())
    assert left == [i for i in range(3) if i != min(costs, key=costs.__getitem__)]


def test_pairs_of_texts_and_json_lines(tmp_path: Path) -> None:
    tsv, lines = tmp_path / "x.tsv", tmp_path / "x.jsonl"
    tsv.write_text('index\tsentence1\tsentence2\tlabel\n0\ta "b\tc\tyes\n1\td\te\tno\n')
    rows = [
        {"sentence1": 'a "b', "sentence2": "c", "label": "yes"},
        {"sentence1": "d", "sentence2": "e", "label": "no"},
    ]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for file in (tsv, lines):
        data = read_labeled(file)
        assert data.texts == [('a "b', "c"), ("d", "e")] and data.labels == ["yes", "no"]
    assert numbers_of(data, {"no": 0, "yes": 1}).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("sentence\nhello\n", "no label"),
        ("gj04\t1\t\tThe sailors rode\ngj04\t1\t\tThe weights\n", "names no text"),
        ("", "is empty"),
        ("sentence\tlabel\nhello\n", "line 2: has 1 fields, the first line names 2"),
        ("sentence\tlabel\nhello\t\n", "line 2"),
    ],
)
def test_files_without_labels_are_refused(content: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    file.write_text(content)
    with pytest.raises(BadInput, match=word):
        read_labeled(file)


def test_line_ends_of_any_kind_and_long_fields(tmp_path: Path) -> None:
    file, long = tmp_path / "x.tsv", "w" * 200_000
    for end in ("\n", "\r\n", "\r"):
        file.write_bytes(end.join(["sentence\tlabel", f"{long}\tyes", "b\tno", ""]).encode())
        assert read_labeled(file).texts == [(long,), ("b",)]
    nested = tmp_path / "x.jsonl"
    nested.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BadInput, match="line 1: not JSON"):
        read_labeled(nested)


def test_labels_that_the_model_does_not_know_are_refused() -> None:
    data = LabeledRows([("a",), ("b",)], ["yes", "maybe"], "here")
    with pytest.raises(BadInput, match=r"here, row 1: label 'maybe' is none of the model's 2: no, yes"):
        numbers_of(data, {"no": 0, "yes": 1})
    with pytest.raises(BadInput, match="'7'"):
        numbers_of(LabeledRows([("a",)], ["7"], "here"), {"no": 0, "yes": 1})


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layers": 9}, "the teacher has 3, 9 were asked for"),
        ({"on_policy": 0.5}, "on-policy: is for language models"),
        ({"loss": "ce+sinkhorn-sequence"}, "is for language models"),
        ({"data": None}, "needs texts with labels"),
        ({"heads": 2}, "heads: is for language models"),
    ],
)
def test_what_a_classifier_has_no_use_for_is_refused(
    options: dict[str, object], word: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=word):
        distill(teacher, tmp_path / "out", replace(SMALL, data=data, **options) if "data" not in options else SMALL)
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 1000))
def test_calibration_error_against_plain_loops(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(40, 3, generator=g).softmax(-1).double()
    labels = torch.randint(3, (40,), generator=g)
    expected = 0.0
    for b in range(15):
        here = [i for i in range(40) if b / 15 < p[i].max() <= (b + 1) / 15]
        if here:
            confidence = sum(float(p[i].max()) for i in here) / len(here)
            accuracy = sum(int(p[i].argmax() == labels[i]) for i in here) / len(here)
            expected += len(here) / 40 * abs(confidence - accuracy)
    assert calibration_error(p, labels) == pytest.approx(expected, abs=1e-12)


def test_a_classifier_that_is_sure_and_right_is_calibrated() -> None:
    logits = torch.tensor([[20.0, -20.0], [-20.0, 20.0]])
    perfect = classification_metrics(logits, torch.tensor([0, 1]), logits)
    assert perfect.accuracy == perfect.mcc == perfect.f1 == 1 and perfect.ece < 1e-6 and perfect.kl == 0
    coin = classification_metrics(torch.zeros(100, 2), torch.arange(100) % 2, torch.zeros(100, 2))
    assert coin.accuracy == 0.5 and coin.ece == pytest.approx(0, abs=1e-6) and not math.isnan(coin.mcc)


def test_the_recipe_begins_with_that_of_what_the_student_came_from(
    bert: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    distill(teacher, tmp_path / "cut", replace(SMALL, data=data, steps=2))
    assert len(read_recipe(tmp_path / "cut")) == 2 and read_recipe(tmp_path / "cut")[:1] == read_recipe(teacher)
    distill(teacher, tmp_path / "given", replace(SMALL, layers=None, student=bert, data=data, steps=2))
    assert len(read_recipe(tmp_path / "given")) == 1
