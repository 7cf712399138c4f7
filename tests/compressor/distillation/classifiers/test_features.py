"""States inside classifiers: found by name, pooled, answered from, and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from calib import BadInput
from compressor import Distill, distill
from compressor.distillation.classifiers.features import (
    ExitBranch,
    drawn_branches,
    matching_modules,
    pooled_output,
    states_of,
    watched_states,
)
from compressor.distillation.classifiers.images import open_image_classifier
from compressor.distillation.losses.decoupled import uskd
from tests import classifiers

HOW = Distill(
    task="image-classification", student=Path("student"), held_out=24, steps=10, batch=16, lr=5e-3,
    precision="float32", device="cpu",
)  # fmt: skip
VIT, RESNET = "vit.layers.*", "resnet.encoder.stages.*"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    classifiers.save_rows(folder / "rows.safetensors", 120)
    classifiers.save("vit", folder / "vit")
    classifiers.save("resnet", folder / "resnet")
    return folder


def test_a_star_stays_within_one_level_of_a_name() -> None:
    model = nn.ModuleDict(
        {"stages": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ReLU()]), "head": nn.Linear(2, 2)}
    )
    assert matching_modules(model, "stages.*", "exits") == ["stages.0", "stages.1"]
    assert matching_modules(model, "head, stages.[0]", "exits") == ["head", "stages.0"]
    assert matching_modules(model, "stages.*.0,stages.0.0", "exits") == ["stages.0.0"]
    with pytest.raises(BadInput, match=r"exits 'layer\*': fits no module of the model, such as stages"):
        matching_modules(model, "layer*", "exits")


def test_states_are_means_over_places_or_tokens() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(pooled_output(x), x.flatten(2).mean(-1))
    assert torch.allclose(pooled_output((x[:, 0], 1)), torch.stack([row[0].mean(0) for row in x]))
    assert pooled_output({"hidden": x[:, 0, 0].double()}).dtype == torch.float32
    for wrong in (x[0, 0, 0], 3, (), torch.arange(4).view(2, 2), x[None]):
        with pytest.raises(BadInput, match="exits: a module gives"):
            pooled_output(wrong)


def test_states_of_the_library_s_models_are_what_the_library_calls_hidden_states(place: Path) -> None:
    for kind, patterns in (("vit", VIT), ("resnet", RESNET)):
        classifier = open_image_classifier(place / kind, None, HOW, files=False)
        images, _ = classifiers.pictures(70)
        found = states_of(classifier, images, matching_modules(classifier.model, patterns, "exits"))
        model = AutoModelForImageClassification.from_pretrained(place / kind).eval()
        with torch.no_grad():
            hidden = model(pixel_values=images, output_hidden_states=True).hidden_states[1:]
        assert len(found) == len(hidden)
        for state, expected in zip(found, hidden, strict=True):
            assert torch.allclose(state, expected.mean((2, 3) if kind == "resnet" else 1), atol=1e-5)


def test_hooks_go_and_what_does_not_run_is_told(place: Path) -> None:
    classifier = open_image_classifier(place / "vit", None, HOW, files=False)
    images, _ = classifiers.pictures(2)
    with watched_states(classifier.model, ["vit.layernorm"]) as states:
        classifier.logits(images)
    states.clear()
    classifier.logits(images)
    assert not states
    classifier.model.spare = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="module spare does not run"):
        states_of(classifier, images, ["spare"])


def test_a_branch_is_a_norm_and_a_line_drawn_by_its_seed() -> None:
    one, again, other = (drawn_branches([6, 4], 3, seed, torch.device("cpu"))[0] for seed in (0, 0, 1))
    x = torch.randn(5, 6)
    assert torch.equal(one(x), again(x)) and not torch.equal(one(x), other(x))
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(one(x), normal @ one.head.weight.mT + one.head.bias, atol=1e-6)
    assert isinstance(one, ExitBranch)


def test_the_first_step_of_exits_is_ofa_of_each_branch_against_a_plain_sum(place: Path, tmp_path: Path) -> None:
    """(6.1) at every exit, from the teacher's probabilities and the branches' own, by hand."""
    options = replace(
        HOW, data=place / "rows.safetensors", student=place / "vit", steps=1, batch=96, exits=VIT,
        loss="ofa(1.4)+ofa-exits(1.4)",
    )  # fmt: skip
    report = distill(place / "resnet", tmp_path / "out", options, allow_damage=True)
    rows, labels = classifiers.pictures(120)
    apart = torch.randperm(120, generator=torch.Generator().manual_seed(0))[24:]
    rows, labels = rows[apart], labels[apart]
    student, teacher = (open_image_classifier(place / name, None, HOW, files=False) for name in ("vit", "resnet"))
    states = states_of(student, rows, matching_modules(student.model, VIT, "exits"))
    branches = drawn_branches([8, 8, 8], 3, 0, torch.device("cpu"))
    p = teacher.answers(rows).softmax(-1)
    own = nn.functional.one_hot(labels, 3).float()

    def expected(logits: torch.Tensor) -> float:
        return float(-(((p + own) ** 1.4 - own) * logits.detach().log_softmax(-1)).sum(-1).mean())

    values = [expected(branch(state)) for branch, state in zip(branches, states, strict=True)]
    assert report["curves"]["ofa-exits(1.4)"][0] == pytest.approx(sum(values) / 3, rel=1e-4)
    assert report["curves"]["ofa(1.4)"][0] == pytest.approx(expected(student.answers(rows)), rel=1e-4)


def test_the_weak_head_of_uskd_reads_the_last_exit(place: Path, tmp_path: Path) -> None:
    options = replace(HOW, data=place / "rows.safetensors", student=place / "vit", steps=2, batch=96, loss="uskd")
    plain = distill(place / "resnet", tmp_path / "plain", options, allow_damage=True)
    weak = distill(place / "resnet", tmp_path / "weak", replace(options, exits=VIT), allow_damage=True)
    rows, labels = classifiers.pictures(120)
    apart = torch.randperm(120, generator=torch.Generator().manual_seed(0))[24:]
    student = open_image_classifier(place / "vit", None, HOW, files=False)
    (branch,) = drawn_branches([8], 3, 0, torch.device("cpu"))
    states = states_of(student, rows[apart], matching_modules(student.model, VIT, "exits"))
    answers = [branch(state).detach() for state in states]
    expected = [float(uskd(student.answers(rows[apart]), labels[apart], weak_logits=a).mean()) for a in answers]
    assert weak["curves"]["uskd"][0] == pytest.approx(expected[2], abs=1e-6)
    assert abs(expected[2] - expected[0]) > 5e-6
    assert weak["curves"]["uskd"][0] != plain["curves"]["uskd"][0]


@pytest.mark.parametrize("loss", ["ce+hidden", "ce+cka", "ce+gram", "ofa+ofa-exits+cka", "ce+uskd+hidden"])
def test_states_of_unlike_models_come_nearer(loss: str, place: Path, tmp_path: Path) -> None:
    options = replace(
        HOW, data=place / "rows.safetensors", student=place / "vit", loss=loss, exits="vit.layers.0,vit.layers.2",
        teacher_exits=RESNET, project="hidden" in loss, steps=30,
    )  # fmt: skip
    curves = distill(place / "resnet", tmp_path / "out", options, allow_damage=True)["curves"]
    for name in set(loss.split("+")) & {"hidden", "cka", "gram", "ofa-exits"}:
        assert sum(curves[name][-5:]) < sum(curves[name][:5]), name
