"""A teacher and a student that learn together: online BD-KD, against closed forms and a loop of two optimizers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from calib import BadInput
from calib.data.corpus import batch_order
from calib.data.targets import MULTI, REGRESSION, SINGLE
from calib.jobs.recipe import read_recipe
from cli.replay import replay_recipe
from compressor import Distill, distill
from compressor.distillation.classifiers.online import teacher_losses
from compressor.distillation.losses.decoupled import bd_kd
from tests import classifiers
from tests.compressor.distillation.classifiers.test_classification import sentences
from tests.kills import digest

HOW = Distill(
    task="image-classification", student=Path("student"), held_out=24, steps=8, batch=16, lr=5e-3, warmup=2,
    loss="ce+bd-kd", teacher="together", teacher_lr=2e-3, precision="float32", device="cpu", max_grad_norm=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    classifiers.save_rows(folder / "rows.safetensors", 120)
    for seed, name in enumerate(("vit", "student")):
        classifiers.save("vit", folder / name, seed)
    classifiers.save("resnet", folder / "resnet")
    return folder


def options_of(place: Path, **more: Any) -> Distill:
    return replace(HOW, **{"data": place / "rows.safetensors", "student": place / "student"} | more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_teacher_s_objective_is_cross_entropy_and_the_reverse_kl() -> None:
    """(4.2) by plain sums, and without a gradient into the student."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    y = torch.tensor([0, 3, 1, 1, 2])
    found = teacher_losses(p, q, y, SINGLE, 2.0)
    soft_p, soft_q = (z.div(2).softmax(-1) for z in (p, q))
    for row in range(5):
        kl = sum(float(b * math.log(b / a)) for a, b in zip(soft_p[row].tolist(), soft_q[row].tolist(), strict=True))
        assert float(found["teacher: kl"][row].detach()) == pytest.approx(4 * kl, abs=1e-9)
        assert float(found["teacher: ce"][row].detach()) == pytest.approx(
            -float(p[row].detach().log_softmax(-1)[y[row]]), abs=1e-9
        )
    (found["teacher: kl"] + found["teacher: ce"]).sum().backward()
    assert q.grad is None and p.grad is not None and p.grad.abs().min() > 0
    sets = torch.tensor([[1.0, 0, 1, 0]] * 5)
    of_labels = teacher_losses(p, q, sets, MULTI, 1.0)["teacher: ce"]
    plain = torch.nn.functional.binary_cross_entropy_with_logits(p, sets.double(), reduction="none").sum(-1)
    assert torch.allclose(of_labels.double(), plain, atol=1e-6)
    numbers = teacher_losses(p[:, :1], q[:, :1], torch.zeros(5), REGRESSION, 1.0)
    assert torch.allclose(numbers["teacher: kl"].double(), (p[:, 0] - q[:, 0]).square(), atol=1e-6)


def test_where_both_agree_neither_pulls_at_the_other() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    p, q = z.clone().requires_grad_(), z.clone().requires_grad_()
    bd_kd(p.detach().log_softmax(-1), q.log_softmax(-1), heavier=1.0).sum().backward()
    teacher_losses(p, q, torch.zeros(6).long(), SINGLE, 1.0)["teacher: kl"].sum().backward()
    for gradient in (p.grad, q.grad):
        assert gradient is not None and gradient.abs().max() < 1e-12


def test_twins_stay_twins_and_learn_as_if_alone(place: Path, tmp_path: Path) -> None:
    """From one start at one rate both follow cross-entropy alone, as their divergences and these' gradients are 0."""
    options = options_of(place, student=place / "vit", loss="ce+bd-kd(1)", teacher_lr=HOW.lr, steps=5)
    report = distill(place / "vit", tmp_path / "out", options, allow_damage=True)
    alone = replace(options, loss="ce", teacher="online", teacher_lr=None)
    distill(place / "vit", tmp_path / "alone", alone, allow_damage=True)
    assert max(report["curves"]["bd-kd(1)"] + report["curves"]["teacher: kl"]) < 1e-6
    moved = 0.0
    for name, tensor in weights(tmp_path / "alone").items():
        start = weights(place / "vit")[name]
        moved = max(moved, float((tensor - start).abs().max()))
        for folder in (tmp_path / "out", tmp_path / "out/teacher"):
            assert torch.allclose(weights(folder)[name], tensor, atol=1e-4), name
    assert moved > 1e-2


def test_against_a_plain_loop_of_two_optimizers(place: Path, tmp_path: Path) -> None:
    options = options_of(place, steps=4)
    report = distill(place / "vit", tmp_path / "out", options, allow_damage=True)
    rows, labels = classifiers.pictures(120)
    apart = torch.randperm(120, generator=torch.Generator().manual_seed(0))[24:]
    rows, labels = rows[apart], labels[apart]
    student, teacher = (AutoModelForImageClassification.from_pretrained(place / n) for n in ("student", "vit"))
    rates = {student: HOW.lr, teacher: HOW.teacher_lr}
    steps = {m: torch.optim.AdamW(m.parameters(), betas=(0.9, 0.95), weight_decay=0.0) for m in rates}
    for step, chosen in enumerate(batch_order(96, 4, 16, 0)):
        q, p = (m(pixel_values=rows[chosen]).logits for m in (student, teacher))
        log_p, log_q, y = p.log_softmax(-1), q.log_softmax(-1), labels[chosen]
        kl_of_q = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        losses = {
            student: cross_entropy(q, y) + bd_kd(log_p.detach(), log_q).mean(),
            teacher: cross_entropy(p, y) + (log_q.exp().detach() * (log_q.detach() - log_p)).sum(-1).mean(),
        }
        assert report["curves"]["teacher: kl"][step] == pytest.approx(float(kl_of_q.detach()), rel=1e-3)
        for loss in losses.values():
            loss.backward()
        for model, optimizer in steps.items():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            rate = min(1.0, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 4))
            optimizer.param_groups[0]["lr"] = rates[model] * rate  # type: ignore[operator]
            optimizer.step()
            optimizer.zero_grad()
    for model, folder in ((student, tmp_path / "out"), (teacher, tmp_path / "out/teacher")):
        made = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        assert all(torch.allclose(made[name], p, atol=2e-4) for name, p in model.named_parameters())


def test_a_teacher_that_does_not_move_is_today_s_job_to_the_bit(place: Path, tmp_path: Path) -> None:
    still = distill(place / "vit", tmp_path / "still", options_of(place, teacher_lr=0.0), allow_damage=True)
    online = options_of(place, teacher="online", teacher_lr=None)
    today = distill(place / "vit", tmp_path / "today", online, allow_damage=True)
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("still", "today")]
    assert read[0] == read[1] and still["curves"] == today["curves"] and still["quality"] == today["quality"]
    before = weights(place / "vit")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "still/teacher").items())
    # At a rate that is next to nothing the teacher answers anew in each step, and says the same.
    hardly = distill(place / "vit", tmp_path / "hardly", options_of(place, teacher_lr=1e-12), allow_damage=True)
    for name, curve in today["curves"].items():
        assert hardly["curves"][name] == pytest.approx(curve, rel=1e-3)


def test_interrupted_and_resumed_both_models_have_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.jobs import training_loop

    options = options_of(place, ema=0.5)
    report = distill(place / "resnet", tmp_path / "out", options, allow_damage=True)
    whole = digest(tmp_path / "out")
    assert "teacher/model.safetensors" in {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*")}
    teacher_before = (tmp_path / "out/teacher/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop, "asked_to_stop", iter([False, False, False, True]).__next__)
        distill(place / "resnet", tmp_path / "out", options, allow_damage=True)
    distill(place / "resnet", tmp_path / "out", options, resume=True, allow_damage=True)
    assert digest(tmp_path / "out") == whole
    assert (tmp_path / "out/teacher/model.safetensors").read_bytes() == teacher_before
    stages = report["quality_by_stage"]
    assert list(stages) == ["teacher", "teacher after", "before", "after"]
    assert stages["teacher after"]["kl"] > 0 == stages["teacher"]["kl"] and "ece" in stages["teacher after"]
    # Norms of the teacher keep their statistics; what was moved is a checkpoint like any other, whose recipe says so.
    moved, start = weights(tmp_path / "out/teacher"), weights(place / "resnet")
    assert all(torch.equal(moved[name], t) for name, t in start.items() if "running" in name)
    assert any(not torch.equal(moved[name], t) for name, t in start.items() if "running" not in name)
    assert read_recipe(tmp_path / "out/teacher")[-1]["kept"] == "teacher"
    with pytest.raises(BadInput, match="the teacher of a job that trained two models; replay the directory above"):
        replay_recipe(tmp_path / "out/teacher", tmp_path / "again")
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees
    # An output with a teacher in it is replaced like any other.
    distill(place / "resnet", tmp_path / "out", options_of(place, teacher="online", teacher_lr=None), allow_damage=True)
    assert not (tmp_path / "out/teacher").exists()


def test_texts_too(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(60)))
    options = replace(
        HOW, task="sequence-classification", student=bert, data=file, held_out=12, length=16, teacher_lr=1e-2, steps=32
    )
    report = distill(bert, tmp_path / "out", options, allow_damage=True)
    stages = report["quality_by_stage"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/teacher")
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12].tolist()
    texts, labels = zip(*(sentences(60)[row] for row in rows), strict=True)
    with torch.no_grad():
        answers = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    right = [model.config.id2label[a] == label for a, label in zip(answers, labels, strict=True)]
    assert sum(right) / 12 == pytest.approx(stages["teacher after"]["accuracy"])
    curve = json.loads((tmp_path / "out/report.json").read_text())["curves"]["teacher: ce"]
    assert sum(curve[-8:]) < sum(curve[:8])


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"teacher": "online"}, "teacher-lr: this teacher is not trained"),
        ({"task": "causal-lm", "loss": "bd-kd"}, "teacher together: is for classifiers"),
        ({"loss": "ce"}, "cross-entropy listens to no teacher"),
        ({"loss": "ce+cka", "exits": "a", "teacher_exits": "b"}, "compared where the teacher stays as it is"),
        ({"teacher_lr": -1.0}, "teacher-lr is -1.0"),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        replace(HOW, **more)
