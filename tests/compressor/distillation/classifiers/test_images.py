"""Classifiers of images taught by others of another architecture: ResNet, ViT, ConvNeXt, and modules of one's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from calib import BadInput
from calib.jobs.recipe import read_recipe
from cli.replay import replay_recipe
from compressor import Distill, distill
from compressor.distillation.classifiers.images import open_image_classifier
from compressor.distillation.loss_expression import BY_PROBLEM
from compressor.distillation.loss_syntax import EXITS, FEATURES
from tests import classifiers
from tests.kills import digest
from unlearn.model.model import open_model

HOW = Distill(
    task="image-classification", student=Path("student"), held_out=24, steps=60, batch=16, lr=5e-3,
    loss="0.5*ce+0.5*forward-kl", precision="float32", device="cpu",
)  # fmt: skip
CONVOLUTION, PERCEPTRON = "tests.classifiers:convolution", "tests.classifiers:perceptron"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows as tensors and as a directory of files, a ResNet that was taught by labels, and a ViT that was not."""
    folder = tmp_path_factory.mktemp("images")
    classifiers.save_rows(folder / "rows.safetensors", 160)
    classifiers.save_folder(folder / "files", 60)
    classifiers.save("vit", folder / "vit")
    classifiers.save("resnet", folder / "plain")
    options = replace(HOW, data=folder / "rows.safetensors", student=folder / "plain", loss="ce", lr=1e-2, steps=40)
    assert distill(folder / "plain", folder / "resnet", options)["quality"]["accuracy"] > 0.9
    return folder


def taught(place: Path, **more: Any) -> Distill:
    return replace(HOW, **{"data": place / "rows.safetensors", "student": place / "vit"} | more)


def of_the_report(out: Path, answers: Callable[[torch.Tensor], torch.Tensor], data: Path, held_out: int = 24) -> float:
    """The accuracy of what lies in OUT on the rows that were held out, by a way of its own."""
    rows = load_file(data)
    apart = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(0))[:held_out]
    with torch.no_grad():
        found = answers(rows["inputs"][apart]).argmax(-1)
    return float((found == rows["labels"][apart]).double().mean())


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_convolution_teaches_another_architecture_which_the_library_then_opens(
    kind: str, place: Path, tmp_path: Path
) -> None:
    student = classifiers.save(kind, tmp_path / "student")
    report = distill(place / "resnet", tmp_path / "out", taught(place, student=student))
    stages = report["quality_by_stage"]
    assert stages["after"]["kl"] < 0.7 * stages["before"]["kl"]
    assert all({"accuracy", "ece", "mcc"} <= of.keys() for of in stages.values()) and stages["teacher"]["kl"] == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == classifiers.NAMES
    accuracy = of_the_report(tmp_path / "out", lambda x: model(pixel_values=x).logits, place / "rows.safetensors")
    assert accuracy == pytest.approx(stages["after"]["accuracy"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == classifiers.SIZE
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "calibration error" in page and "AutoModelForImageClassification" in card
    assert "pipeline_tag: image-classification" in card and report["task"] == "image-classification"


def test_files_go_through_each_model_s_own_processor(place: Path, tmp_path: Path) -> None:
    """A student that sees twice the size learns from files that both read; tensors of one size cannot serve it."""
    student = classifiers.save("vit", tmp_path / "student", image_size=16)
    classifiers.processor_of(16).save_pretrained(student)
    report = distill(place / "resnet", tmp_path / "out", taught(place, data=place / "files", student=student))
    assert report["quality"]["kl"] < report["quality_by_stage"]["before"]["kl"]
    assert report["data"]["training"]["rows"] == 36
    with pytest.raises(BadInput, match=r"rows\.safetensors: the model cannot take these inputs \(.*16"):
        distill(place / "resnet", tmp_path / "other", taught(place, student=student))
    # Without a processor of its own, it reads as its teacher does.
    bare = Path(shutil.copytree(place / "vit", tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    one, two = (
        distill(place / "resnet", tmp_path / name, taught(place, data=place / "files", student=of, steps=3))
        for name, of in (("bare-out", bare), ("own-out", place / "vit"))
    )
    assert one["quality"] == two["quality"] and (tmp_path / "bare-out/preprocessor_config.json").is_file()


def test_files_and_tensors_of_the_same_pictures_teach_alike(place: Path, tmp_path: Path) -> None:
    options = taught(place, steps=4, held_out=12, data=place / "files")
    by_file = distill(place / "resnet", tmp_path / "files", options)
    classifier = open_image_classifier(place / "vit", None, HOW, files=True)
    files = sorted((place / "files").glob("*/*.png"))
    assert classifier.read is not None
    rows = {
        "inputs": classifier.read(files),
        "labels": torch.tensor([list(classifiers.NAMES.values()).index(file.parent.name) for file in files]),
    }
    save_file(rows, tmp_path / "rows.safetensors")
    by_tensor = distill(place / "resnet", tmp_path / "out", replace(options, data=tmp_path / "rows.safetensors"))
    assert by_file["quality"] == by_tensor["quality"] and by_file["curves"] == by_tensor["curves"]


LOGITS = BY_PROBLEM["single_label_classification"] - {"ce"} - EXITS.keys() - FEATURES


@pytest.mark.parametrize("loss", sorted(LOGITS))
def test_every_loss_of_logits_teaches_a_vit(loss: str, place: Path, tmp_path: Path) -> None:
    written = f"ce+0.5*{loss}" if loss in ("sinkd", "sinkhorn", "sinkhorn-sharp") else loss
    report = distill(place / "resnet", tmp_path / "out", taught(place, loss=written, steps=8), allow_damage=True)
    curve = report["curves"][loss]
    assert sum(curve[-3:]) < sum(curve[:3]) if loss != "dac" else len(curve) == 8


def test_a_vit_with_fewer_layers_is_cut_out_of_one_and_a_resnet_is_not(place: Path, tmp_path: Path) -> None:
    report = distill(place / "vit", tmp_path / "out", taught(place, student=None, layers=2, loss="ce", steps=5))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 == len(report["cut"])
    with pytest.raises(BadInput, match="layers: the teacher has None, 2 were asked for"):
        distill(place / "resnet", tmp_path / "other", taught(place, student=None, layers=2))


def test_a_factory_s_student_is_drawn_taught_and_opened_again_by_unlearn(place: Path, tmp_path: Path) -> None:
    """Batch norm's statistics are learned, and the output teaches a module of another kind in turn."""
    options = taught(place, student=None, student_factory=CONVOLUTION, task="causal-lm")
    assert options.task == "tensors"
    report = distill(place / "resnet", tmp_path / "out", options)
    assert report["quality"]["accuracy"] > 0.9 and report["student"] == "convolution" and report["task"] == "tensors"
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert int(tensors["1.num_batches_tracked"]) == 60 and not torch.equal(tensors["1.running_mean"], torch.zeros(6))
    trainable = open_model(tmp_path / "out", "tensors", factory=CONVOLUTION, device=torch.device("cpu"))
    accuracy = of_the_report(tmp_path / "out", trainable.module, place / "rows.safetensors")
    assert accuracy == pytest.approx(report["quality"]["accuracy"])
    assert "load_state_dict" in (tmp_path / "out/README.md").read_text()
    again = replace(options, factory=CONVOLUTION, student_factory=PERCEPTRON, loss="forward-kl")
    second = distill(tmp_path / "out/model.safetensors", tmp_path / "second", again)
    assert second["quality"]["kl"] < 0.5 * second["quality_by_stage"]["before"]["kl"]
    step = read_recipe(tmp_path / "second")[0]
    assert step["teacher"] == read_recipe(tmp_path / "out") and len(step["factories"]) == 2
    # Its weights go on where they were left, in a job that is taught by a directory.
    third = replace(again, student=tmp_path / "second", steps=1, lr=1e-6)
    before = distill(tmp_path / "out", tmp_path / "third", third)["quality_by_stage"]["before"]
    assert before == second["quality"] and len(read_recipe(tmp_path / "third")) == 2
    assert replay_recipe(tmp_path / "out", tmp_path / "replayed").agrees


def test_batch_statistics_are_resumed_and_averaged_with_the_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.jobs import training_loop

    options = taught(place, student=None, student_factory=CONVOLUTION, steps=6, ema=0.5)
    distill(place / "resnet", tmp_path / "out", options)
    whole = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop, "asked_to_stop", iter([False, False, False, True]).__next__)
        distill(place / "resnet", tmp_path / "out", options)
    distill(place / "resnet", tmp_path / "out", options, resume=True)
    assert digest(tmp_path / "out") == whole
    plain = distill(place / "resnet", tmp_path / "plain", replace(options, ema=0.0))
    means = [load_file(tmp_path / name / "model.safetensors")["1.running_mean"] for name in ("out", "plain")]
    assert plain["curves"] == json.loads((tmp_path / "out/report.json").read_text())["curves"]
    assert not torch.equal(*means)


def test_batch_norm_is_for_one_process(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.distillation.classifiers.images.world_size", lambda: 2)
    options = taught(place, steps=1)
    with pytest.raises(BadInput, match="batch norm sees the rows of one process only"):
        distill(place / "resnet", tmp_path / "out", replace(options, student=None, student_factory=CONVOLUTION))
    distill(place / "resnet", tmp_path / "out", options)
