"""Means of models: weights against torch's own mean, figures against plain transformers, and what has no mean."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib import BadInput, Damaged, embedded
from compressor import Distill, Evaluate, Quantize, Soup, distill, evaluate, quantize, soup
from compressor.merging.soup import mean_tensor
from compressor.report.soup import barrier_of
from tests.cli.test_report import run

SMALL = Soup(held_out=4, length=32)


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The embedded model, trained on in two ways."""
    folder = tmp_path_factory.mktemp("outs")
    made = []
    for seed in range(2):
        made.append(folder / f"way{seed}")
        options = Distill(
            student=embedded.MODEL, samples=8, held_out=2, length=32, steps=4, lr=1e-3, loss="ce", seed=seed
        )
        distill(embedded.MODEL, made[-1], options, allow_damage=True)
    return made


def test_the_mean_and_the_way_to_it(outs: list[Path], tmp_path: Path) -> None:
    report = soup(outs, tmp_path / "out", replace(SMALL, weights="0.75,0.25", points=5))
    a, b, made = (load_file(folder / "model.safetensors") for folder in (*outs, tmp_path / "out"))
    for name in made:
        expected = (0.75 * a[name].double() + 0.25 * b[name].double()).to(a[name].dtype)
        assert torch.equal(made[name], expected), name
    line = report["line"]
    assert [point["share"] for point in line] == [0, 0.25, 0.5, 0.75, 1]
    assert line[1]["perplexity"] == pytest.approx(report["quality"]["perplexity"], rel=1e-6) != line[3]["perplexity"]
    assert [line[0]["perplexity"], line[-1]["perplexity"]] == [model["perplexity"] for model in report["models"]]
    figures = evaluate(tmp_path / "out", Evaluate(rows=4, length=32, reference=str(outs[0])))
    assert figures.asdict() == pytest.approx(report["quality"], rel=1e-6)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    losses = [math.log(point["perplexity"]) for point in line]
    straight = [losses[0] + (losses[4] - losses[0]) * i / 4 for i in range(5)]
    assert barrier_of(report) == pytest.approx(max(a - b for a, b in zip(losses, straight, strict=True)), abs=1e-12)
    told = run("report", tmp_path / "out")
    assert "perplexity" in told and "way1" in told
    shown = run("show", tmp_path / "out")
    assert "averaged from way0" in shown and "and: way1" in shown
    assert "From way0 to way1" in (tmp_path / "out/report.html").read_text()


def test_three_models_from_the_command_line_and_the_ancestor_among_them(outs: list[Path], tmp_path: Path) -> None:
    said = json.loads(run("soup", *outs, embedded.MODEL, tmp_path / "out", "--held-out", 2, "--length", 32, "--json"))
    assert said["line"] == [] and [model["share"] for model in said["models"]] == [pytest.approx(1 / 3)] * 3
    again = soup([tmp_path / "out", outs[0]], tmp_path / "again", SMALL)
    assert again["job"] == "soup", "a soup of a soup has the same ancestor"
    assert "the soup" in run("soup", *outs, tmp_path / "other", "--held-out", 2, "--length", 32)


def test_models_in_different_valleys_have_no_mean(tmp_path: Path) -> None:
    """The neurons of each block in another order: the same function, and a mean of neither."""
    turned = Path(shutil.copytree(embedded.MODEL, tmp_path / "turned"))
    tensors = load_file(turned / "model.safetensors")
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        if kind in ("gate_proj", "up_proj"):
            tensors[name] = tensor.flip(0).contiguous()
        elif kind == "down_proj":
            tensors[name] = tensor.flip(1).contiguous()
    save_file(tensors, turned / "model.safetensors", metadata={"format": "pt"})
    own = evaluate(embedded.MODEL, Evaluate(rows=2, length=32)).asdict()["perplexity"]
    assert evaluate(turned, Evaluate(rows=2, length=32)).asdict()["perplexity"] == pytest.approx(own, rel=1e-4)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match="comes from another model than"):
        soup([embedded.MODEL, turned], tmp_path / "out", SMALL)
    step = {"job": "distill", "options": {}, "data": {}, "versions": {}, "quality": {}}
    from calib.blockwise.model import BlockwiseModel
    from calib.model.config import read_config
    from calib.model.weights import Weights

    ancestor = BlockwiseModel(read_config(embedded.MODEL), Weights(embedded.MODEL), torch.device("cpu")).verify()
    recipe = {"recipe": [step | {"model": {"name": "model", "sha256": ancestor}}]}
    (turned / "parewell.json").write_text(json.dumps(recipe))
    with pytest.raises(Damaged, match="they do not lie in one valley"):
        soup([embedded.MODEL, turned], tmp_path / "out", SMALL)
    assert sorted(tmp_path.iterdir()) == before
    report = soup([embedded.MODEL, turned], tmp_path / "out", SMALL, allow_damage=True)
    assert barrier_of(report) > 0.5 and "they do not lie in one valley" in run("report", tmp_path / "out")


def test_a_model_and_what_was_made_to_forget_from_it(tmp_path: Path) -> None:
    """One ancestor, though unlearning knows it by its files; and what is forgotten must last in what is made of the
    mean."""
    from calib.jobs.options import hash_of
    from calib.jobs.recipe import forgettings

    forgetful = Path(shutil.copytree(embedded.MODEL, tmp_path / "forgetful"))
    step = {"job": "unlearn", "options": {}, "versions": {}, "quality": {}, "data": {"forget": {"rows": 2}}}
    model = {"name": "model", "sha256": hash_of(embedded.MODEL.glob("*.safetensors"))}
    (forgetful / "parewell.json").write_text(json.dumps({"recipe": [step | {"model": model}]}))
    soup([embedded.MODEL, forgetful], tmp_path / "out", SMALL, allow_recovery=True)
    assert [found["job"] for found in forgettings(tmp_path / "out")] == ["unlearn"]
    with pytest.raises(BadInput, match="was made to forget, which rounding may undo"):
        quantize(tmp_path / "out", tmp_path / "rounded", Quantize(scheme="w8a16-channel", learn=False))


def test_students_that_were_cut_in_two_ways_have_no_mean(tmp_path: Path, tiny_folder: Path, text_file: Path) -> None:
    rows = Distill(data=text_file, samples=4, held_out=2, length=16, steps=1, lr=1e-6, ffn=24)
    for name, options in (("a", rows), ("b", replace(rows, lr=1e-3)), ("other", replace(rows, seed=1))):
        distill(tiny_folder, tmp_path / name, options, allow_damage=True)
    soup([tmp_path / "a", tmp_path / "b"], tmp_path / "out", SMALL, allow_damage=True)
    with pytest.raises(BadInput, match="or was cut in another way"):
        soup([tmp_path / "a", tmp_path / "other"], tmp_path / "no", SMALL)
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(BadInput, match=r"rms_norm_eps is 0\.1, and 1e-06"):
        soup([tmp_path / "a", tmp_path / "b"], tmp_path / "no", SMALL)


def test_whole_numbers_have_no_mean() -> None:
    assert torch.equal(mean_tensor([torch.tensor([3]), torch.tensor([5])], [0.5, 0.5]), torch.tensor([3]))
    halves = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)]
    assert mean_tensor(halves, [0.5, 0.5]).dtype is torch.bfloat16


def test_what_has_no_mean_is_refused(outs: list[Path], tiny_folder: Path, tmp_path: Path) -> None:
    quantize(
        outs[0], tmp_path / "rounded", Quantize(scheme="w8a16-channel", learn=False, samples=2, held_out=2, length=32)
    )
    forgetful = Path(shutil.copytree(outs[1], tmp_path / "forgetful"))
    recipe = json.loads((forgetful / "parewell.json").read_text())
    recipe["recipe"].append({**recipe["recipe"][0], "job": "unlearn", "data": {"forget": {"rows": 2}}})
    (forgetful / "parewell.json").write_text(json.dumps(recipe))
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    for models, options, word in (
        ([outs[0]], SMALL, "wants two models or more"),
        ([outs[0], outs[0]], SMALL, "is given twice"),
        ([outs[0], tmp_path / "rounded"], SMALL, "codes have no mean"),
        ([outs[0], tiny_folder], SMALL, "has not the same tensors|give models of one shape"),
        (outs, replace(SMALL, weights="0.2,0.3,0.5"), "are 3, and there are 2 models"),
        ([outs[0], forgetful], SMALL, "was made to forget, which a mean with others may undo"),
    ):
        with pytest.raises(BadInput, match=word):
            soup(models, out, options)
    for weights, word in (("a,b", "should be numbers"), ("0.2,0.3", "add up to 0.5"), ("0,1", "must be above 0")):
        with pytest.raises(BadInput, match=word):
            Soup(weights=weights)
    assert "points is 2" in run("soup", *outs, out, "--points", 2, status=2)
    assert sorted(tmp_path.iterdir()) == before
