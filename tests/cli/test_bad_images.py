"""Bad input to `parewell distill` of classifiers of images and of factories' modules: one line, exit status 2, nothing
written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import classifiers
from tests.cli.conftest import Refusal

CONVOLUTION = "tests.classifiers:convolution"
EXITS = ["--student", "MODELS/vit", "--exits", "vit.layers.*", "--loss"]
STAGES = "resnet.encoder.stages.*"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for kind in ("vit", "resnet"):
        classifiers.save(kind, root / kind)
    classifiers.save("vit", root / "large", image_size=16)
    classifiers.save("vit", root / "several", problem_type="multi_label_classification")
    classifiers.save_rows(root / "rows.safetensors", 40)
    classifiers.save_folder(root / "files", 30)
    return root


@pytest.fixture
def refused(models: Path, tmp_path: Path, refusal: Refusal) -> Refusal:
    """Run `parewell distill TEACHER OUT ...` and return the one line that it refuses with."""

    def run(teacher: object, *arguments: object) -> str:
        data = [] if "--data" in arguments else ["--data", models / "rows.safetensors"]
        task = [] if {"--task", "--factory", "--student-factory"} & {*arguments} else ["--task", "image-classification"]
        given = [str(word).replace("MODELS", str(models)) for word in arguments]
        return refusal("distill", models / str(teacher), tmp_path / "out", *task, "--steps", 2, *data, *given)

    return run


@pytest.mark.parametrize(
    ("teacher", "arguments", "word"),
    [
        ("resnet", [], "no student: give --student DIR"),
        ("resnet", ["--student", "MODELS/large"], "the model cannot take these inputs (Input image size (8*8) doesn't"),
        ("resnet", ["--student", "MODELS/vit", "--length", 16], "length: counts tokens, and images have none"),
        ("resnet", ["--student", "MODELS/vit", "--heads", 2], "leave out --layers, --heads"),
        ("resnet", ["--student", "MODELS/vit", "--on-policy", 1], "on-policy: is for language models"),
        ("resnet", ["--student", "MODELS/vit", "--loss", "ce+spans"], "loss spans: is for language models"),
        ("resnet", ["--student", "MODELS/vit", "--loss", "mse"], "loss mse: compares numbers"),
        ("resnet", ["--student", "MODELS/vit", "--samples", 90], "90 were asked for"),
        ("resnet", ["--student", "MODELS/vit", "--held-out", 40], "too few to train on and to hold out"),
        ("resnet", ["--student", "MODELS/vit", "--held-out-data", "MODELS/files"], "must be of the same kind"),
        ("several", ["--student", "MODELS/vit"], "multi_label_classification; images have one class each"),
        ("resnet", ["--layers", 1], "layers: the teacher has None"),
        ("resnet", ["--student", "MODELS/vit", "--task", "tensors"], "task tensors: needs to know a model"),
        ("resnet", ["--task", "sequence-classification", "--student-factory", CONVOLUTION], "takes tensors; leave out"),
        ("resnet", ["--student-factory", CONVOLUTION, "--layers", 1], "student-factory: makes the student"),
        ("resnet", ["--student-factory", "convolution"], "must be package.module:function"),
        ("resnet", ["--student-factory", "tests.classifiers:none"], "cannot be imported"),
        ("resnet", ["--student-factory", "tests.classifiers:SIZE"], "is no function"),
        ("resnet", ["--student-factory", "tests.classifiers:pictures"], "factory tests.classifiers:pictures: fails"),
        ("resnet", ["--student-factory", "tests.classifiers:without_parameters"], "without parameters"),
        ("resnet", ["--student-factory", "tests.classifiers:of_two_classes"], "chooses from 2 classes, the teacher"),
        ("resnet", ["--student-factory", CONVOLUTION, "--student", "MODELS"], "holds no model.safetensors"),
        ("resnet", ["--student-factory", CONVOLUTION, "--student", "MODELS/vit"], "tensor '0.weight' is missing"),
        ("vit", ["--factory", CONVOLUTION, "--student-factory", CONVOLUTION], "'0.weight' is missing"),
        ("vit", ["--factory", CONVOLUTION, "--layers", 1], "leave out --base-model, --dequantize and --layers"),
        ("resnet", ["--student", "MODELS/vit", "--teacher-lr", 1], "teacher-lr: this teacher is not trained"),
        ("resnet", ["--student", "MODELS/vit", "--teacher", "together", "--loss", "ce"], "listens to no teacher"),
        ("resnet", ["--student", "MODELS/vit", "--teacher", "top-k"], "teacher top-k: is for language models"),
        ("resnet", ["--layers", 1, "--task", "causal-lm", "--teacher", "together"], "together: is for classifiers"),
        ("resnet", ["--student", "MODELS/vit", "--exits", "vit.layers.*"], "exits: no loss reads them"),
        ("resnet", ["--student", "MODELS/vit", "--loss", "ofa+ofa-exits"], "loss ofa-exits: reads states inside"),
        ("resnet", [*EXITS, "ce+cka"], "loss cka: compares states; name the teacher's too, by --teacher-exits"),
        ("resnet", [*EXITS, "ofa-exits", "--teacher-exits", "resnet"], "teacher-exits: no loss compares them"),
        ("resnet", ["--student", "MODELS/vit", "--teacher-exits", "resnet"], "teacher-exits: changes nothing without"),
        ("resnet", [*EXITS, "ofa-exits", "--exits", "layer*"], "exits 'layer*': fits no module of the model, such as"),
        ("resnet", [*EXITS, "ce+cka", "--teacher-exits", "stages"], "teacher-exits 'stages': fits no module"),
        ("resnet", [*EXITS, "ce+cka", "--teacher-exits", "resnet.embedder"], "names 1 modules, --exits 3"),
        ("resnet", [*EXITS, "ce+hidden", "--exits", "vit.layers.[01]", "--teacher-exits", STAGES], "are 8, 8 wide"),
        ("resnet", [*EXITS, "ce+cka", "--teacher-exits", STAGES, "--project"], "project: no loss compares hidden"),
        ("resnet", [*EXITS, "ofa-exits", "--task", "sequence-classification"], "modules of classifiers of images"),
        ("resnet", ["--layers", 1, "--exits", "x", "--task", "causal-lm"], "exits: reads modules of classifiers of im"),
        (
            "resnet",
            ["--student-factory", "tests.classifiers:with_batch_statistics", "--batch", 1],
            "the model cannot take these inputs (Expected more than 1 value per channel",
        ),
    ],
)  # fmt: skip
def test_models_and_options_that_will_not_do(
    teacher: str, arguments: list[object], word: str, refused: Refusal
) -> None:
    assert word in refused(teacher, *arguments)


def test_rows_that_will_not_do(models: Path, refused: Refusal, tmp_path: Path) -> None:
    inputs, labels = classifiers.pictures(30)
    student = ["--student", models / "vit"]
    for name, tensors, word in [
        ("labels", {"inputs": inputs, "labels": labels + 1}, "is none of the model's 3 classes, which count from 0"),
        ("nan", {"inputs": inputs / (labels != 1)[:, None, None, None], "labels": labels}, "has NaN or Inf"),
        ("bytes", {"inputs": (inputs * 9).byte(), "labels": labels}, "cannot take these inputs"),
        ("colors", {"inputs": inputs.expand(-1, 3, -1, -1).clone(), "labels": labels}, "cannot take these inputs"),
        ("rows", {"pixels": inputs, "labels": labels}, "needs 'inputs' or 'pixel_values'"),
    ]:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert word in refused("resnet", *student, "--data", tmp_path / f"{name}.safetensors"), name
    assert "not a safetensors file" in refused("resnet", *student, "--data", models / "vit/config.json")
    inner = tmp_path / "out/rows.safetensors"  # of an output of ours
    inner.parent.mkdir()
    (tmp_path / "out/parewell.json").write_text('{"recipe": []}')
    shutil.copy(models / "rows.safetensors", inner)
    assert "contains what the job reads" in refused("resnet", *student, "--data", inner)


def test_directories_of_images_that_will_not_do(models: Path, refused: Refusal, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    student = ["--student", models / "vit", "--data"]
    files = Path(shutil.copytree(models / "files", tmp_path / "files"))
    (files / "left/000.png").write_bytes(b"\x89PNG nothing")
    assert "left/000.png: cannot be read as an image" in refused("resnet", *student, files)
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(files / "left/000.png")  # Pillow would make it white
    assert "it has more than 8 bits a channel, mode I;16" in refused("resnet", *student, files)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(files / "left/000.png")
    sized = Path(shutil.copytree(models / "resnet", tmp_path / "sized"))
    config = json.loads((sized / "preprocessor_config.json").read_text())
    (sized / "preprocessor_config.json").write_text(json.dumps(config | {"do_resize": False}))
    assert "does not make images of one size" in refused(sized, *student, files)
    (files / "left/000.png").unlink()
    (files / "notes.txt").write_text("")
    assert "holds notes.txt beside its directories" in refused("resnet", *student, files)
    (files / "notes.txt").unlink()
    (files / "top").rename(files / "bottom")
    assert "directory bottom: label 'bottom' is none of the model's 3" in refused("resnet", *student, files)
    weights = load_file(models / "vit/model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    assert "takes tensors; give .safetensors" in refused(
        "rows.safetensors", "--factory", CONVOLUTION, "--student-factory", CONVOLUTION, "--data", models / "files"
    )
    bare = {name: Path(shutil.copytree(models / name, tmp_path / name)) for name in ("resnet", "vit")}
    for folder in bare.values():
        (folder / "preprocessor_config.json").unlink()
    line = refused(bare["resnet"], "--student", bare["vit"], "--data", models / "files")
    assert "neither model has a processor that reads images" in line


def test_weights_that_are_no_numbers(models: Path, refused: Refusal, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = classifiers.convolution().state_dict()
    save_file(weights | {"1.running_var": torch.full((6,), torch.nan)}, tmp_path / "nan.safetensors")
    both = ["--student-factory", CONVOLUTION, "--student", tmp_path / "nan.safetensors"]
    assert "tensor '1.running_var' contains NaN or Inf" in refused("resnet", *both)
    save_file(weights | {"1.running_var": torch.full((6,), -1.0)}, tmp_path / "nan.safetensors")
    assert "answers to the first rows are NaN or infinite" in refused("resnet", *both)
