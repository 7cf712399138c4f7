"""Students of models that give several labels, or a number: losses by the library's own, jobs end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from calib import BadInput
from calib.data.targets import MULTI, REGRESSION, SINGLE
from calib.losses.divergences import DIVERGENCES
from cli.report import read_report
from compressor import Distill, distill
from compressor.distillation.loss_expression import BY_PROBLEM, check_problem, of_problem, parse_loss
from compressor.distillation.loss_syntax import FEATURES
from tests import encoders

SMALL = Distill(
    task="sequence-classification", layers=2, held_out=12, steps=30, batch=16, lr=3e-3, loss="ce",
    precision="float32", device="cpu",
)  # fmt: skip
LABELS = ["good", "bad", "w0"]


def rows(count: int, seed: int = 0) -> list[tuple[str, list[str], float]]:
    """Sentences, which of three words are in them, and how many of their words are low numbers."""
    g, result = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        words = [f"w{int(i)}" for i in torch.randint(1, 20, (5,), generator=g)]
        labels = [name for name in LABELS if torch.rand((), generator=g) < 0.5]
        result.append((" ".join([*labels, *words]), labels, float(len(labels)) + 0.5))
    return result


def held_out_of(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [lines[i] for i in torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[:12].tolist()]


@torch.no_grad()
def by_the_library(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    many = "".join(json.dumps({"text": text, "labels": labels}) + "\n" for text, labels, _ in rows(120))
    (folder / "many.jsonl").write_text(many)
    one = "".join(json.dumps({"text": text, "label": number}) + "\n" for text, _, number in rows(120))
    (folder / "one.jsonl").write_text(one)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoders.save(folder / "many", "bert", LABELS, problem_type=MULTI, **still)
    encoders.save(folder / "one", "bert", ["score"], **still)
    return folder


def test_several_labels_are_learned_and_measured(place: Path, tmp_path: Path) -> None:
    options = replace(SMALL, data=place / "many.jsonl", steps=150, layers=None, student=place / "many")
    report = distill(place / "many", tmp_path / "out", options)
    before, after = report["quality_by_stage"]["before"], report["quality_by_stage"]["after"]
    assert report["problem_type"] == MULTI and after["f1_micro"] > before["f1_micro"] + 0.1
    # The figures, from the folder, the library and scikit-learn alone.
    held_out = held_out_of(place / "many.jsonl")
    answers = (by_the_library(tmp_path / "out", [row["text"] for row in held_out]).sigmoid() >= 0.5).int()
    truth = [[int(name in row["labels"]) for name in LABELS] for row in held_out]
    assert after["f1_micro"] == pytest.approx(f1_score(truth, answers, average="micro"))
    assert after["f1_macro"] == pytest.approx(f1_score(truth, answers, average="macro"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["problem_type"] == MULTI
    assert "F1, micro" in (tmp_path / "out/report.html").read_text() and read_report(tmp_path / "out")
    student = distill(tmp_path / "out", tmp_path / "cut", replace(SMALL, data=place / "many.jsonl", loss="forward-kl"))
    assert len(student["cut"]) == 2 and student["quality"]["kl"] < student["quality_by_stage"]["before"]["kl"]


def test_a_number_is_learned_and_measured(place: Path, tmp_path: Path) -> None:
    options = replace(SMALL, data=place / "one.jsonl", steps=150, layers=None, student=place / "one")
    report = distill(place / "one", tmp_path / "out", options)
    after = report["quality_by_stage"]["after"]
    assert report["problem_type"] == REGRESSION and after["mse"] < 0.5 * report["quality_by_stage"]["before"]["mse"]
    held_out = held_out_of(place / "one.jsonl")
    values = by_the_library(tmp_path / "out", [row["text"] for row in held_out])[:, 0].numpy()
    truth = [row["label"] for row in held_out]
    assert after["pearson"] == pytest.approx(scipy.stats.pearsonr(values, truth).statistic, abs=1e-4)
    assert after["spearman"] == pytest.approx(scipy.stats.spearmanr(values, truth).statistic, abs=1e-4)
    assert "Pearson correlation" in (tmp_path / "out/report.html").read_text() and read_report(tmp_path / "out")
    student = distill(tmp_path / "out", tmp_path / "cut", replace(SMALL, data=place / "one.jsonl", loss="ce+mse"))
    assert student["quality"]["teacher_mse"] < student["quality_by_stage"]["before"]["teacher_mse"]
    assert student["curves"].keys() == {"ce", "mse"}


@given(st.integers(0, 1000), st.sampled_from([1.0, 2.5]))
def test_losses_of_labels_are_those_of_bernoulli_distributions(seed: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    target = (torch.rand(6, 4, generator=g) < 0.4).double()

    def loss(text: str) -> torch.Tensor:
        return of_problem(parse_loss(text)[0], MULTI, p, q, target, temperature)

    bce = F.binary_cross_entropy_with_logits(q, target, reduction="none").sum(-1)
    assert torch.allclose(loss("ce"), bce)
    P, Q = (torch.distributions.Bernoulli(logits=z / temperature) for z in (p, q))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(loss("forward-kl"), temperature**2 * kl(P, Q).sum(-1))
    assert torch.allclose(loss("reverse-kl"), temperature**2 * kl(Q, P).sum(-1))
    variation = (P.probs - Q.probs).abs().sum(-1)
    assert torch.allclose(loss("total-variation"), temperature**2 * variation)


@pytest.mark.parametrize("name", sorted(BY_PROBLEM[MULTI] - FEATURES))
def test_losses_of_labels_agree_where_student_and_teacher_do(name: str) -> None:
    p = torch.randn(4, 3, dtype=torch.float64)
    value = of_problem(parse_loss(name)[0], MULTI, p, p.clone().requires_grad_(), (p > 0).double(), 1.0)
    assert value.shape == (4,) and (name == "ce" or torch.allclose(value, torch.zeros(4, dtype=torch.float64)))
    assert name == "ce" or name == "bd-kd" or name in DIVERGENCES


def test_losses_of_a_number_are_squares() -> None:
    p, q, target = torch.randn(5, 1), torch.randn(5, 1), torch.randn(5)
    ce, mse = (of_problem(term, REGRESSION, p, q, target, 1.0) for term in parse_loss("ce+mse"))
    assert torch.allclose(ce, F.mse_loss(q[:, 0], target, reduction="none"))
    assert torch.allclose(mse, F.mse_loss(q[:, 0], p[:, 0], reduction="none"))


@pytest.mark.parametrize(
    ("loss", "problem"),
    [("forward-kl", REGRESSION), ("ce+0.1*sinkhorn", REGRESSION), ("nkd", REGRESSION), ("js(0.9)", REGRESSION),
     ("ce+0.1*sinkhorn", MULTI), ("ce+sinkd", MULTI), ("nkd", MULTI), ("uskd", MULTI), ("mse", MULTI), ("mse", SINGLE)],
)  # fmt: skip
def test_losses_that_make_no_sense_are_refused_by_name(loss: str, problem: str) -> None:
    name = parse_loss(loss)[-1].name
    with pytest.raises(BadInput, match=rf"loss {name}: compares .*\({problem}\); give --loss"):
        check_problem(parse_loss(loss), problem, 1.0)


@pytest.mark.parametrize(
    ("model", "data", "options", "word"),
    [
        ("one", "one", {"loss": "forward-kl"}, "loss forward-kl: compares distributions.*give --loss such as mse"),
        ("one", "one", {"loss": "ce+mse", "temperature": 2.0}, "temperature: divides logits"),
        ("one", "many", {}, "line 1: its label is a list, and the model gives one number"),
        ("many", "one", {}, r"label '\d\.5' is none of the model's 3"),
        ("plain", "many", {}, "its label is a list .* set problem_type to multi_label_classification"),
        ("many", "classes", {}, "one number as the label of each row"),
        ("odd", "many", {}, "odd: cannot be opened|problem_type 'odd'"),
        ("contrary", "many", {}, "problem_type is regression with 3 outputs"),
        ("plain", "missing", {}, "line 3: its label holds NaN"),
    ],
)
def test_what_contradicts_is_refused_before_anything_is_written(
    model: str, data: str, options: dict[str, Any], word: str, place: Path, tmp_path: Path
) -> None:
    teacher = place / model
    if model in ("plain", "odd", "contrary"):
        teacher = encoders.save(tmp_path / model, "bert", LABELS)
        stated = {"plain": None, "odd": "odd", "contrary": REGRESSION}[model]
        config = teacher / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"problem_type": stated}))
    file = place / f"{data}.jsonl"
    if not file.exists():
        file = tmp_path / f"{data}.jsonl"
        labels = {"classes": ["0", "1", "2", "0"], "missing": ["0", "1", "NaN", "2"]}[data]
        file.write_text("".join(f'{{"text": "w1", "label": {label}}}\n' for label in labels * 8))
    there = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(BadInput, match=word):
        distill(teacher, tmp_path / "out", replace(SMALL, data=file, **options))
    assert {p.name for p in tmp_path.iterdir()} == there


def test_mse_is_for_regressors() -> None:
    with pytest.raises(BadInput, match="loss mse: compares the numbers of regressors"):
        Distill(layers=1, loss="mse")
