"""Dry runs against the jobs themselves: bytes of OUT within TOLERANCE or SLACK, whichever is more; time by hand."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.jobs.cost import HOUR
from calib.runtime.progress import recording
from cli.quantize import quantize_command as command
from compressor import Distill, Quantize, distill, quantize
from compressor.distillation.cost import estimate_distillation
from compressor.quantization.cost import (
    Measured,
    StageEstimate,
    estimate_quantization,
    shorter_quantizations,
    stages_of,
)
from compressor.quantization.job import validate_quantization
from tests import tiny

TOLERANCE = 0.02
SLACK = 20_000  # bytes, as reports of small jobs outweigh their models


def bytes_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def close(foretold: int, out: Path) -> bool:
    real = bytes_of(out)
    return abs(foretold - real) <= max(TOLERANCE * real, SLACK)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that weights outweigh what is said of them."""
    config = tiny.config_of("llama", hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=1024)
    return tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize(
    "more",
    [
        {"scheme": "w4a16-g64", "init": "none"},
        {"scheme": "w3a16-g32-asym"},
        {"scheme": "w4a4kv4"},
        {"scheme": "nf4"},
        {"scheme": "w4a16-channel", "rounding": "none"},
        {"scheme": "w4a16-g64", "target_bits": 3.5},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_quantization_weighs_what_was_foretold(
    wide: Path, text_file: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = Quantize(**{"data": text_file, "samples": 2, "held_out": 1, "length": 16, "learn": False, **more})
    cost = estimate_quantization(wide, tmp_path / "out", options)
    report = quantize(wide, tmp_path / "out", options, allow_damage=True)
    assert close(cost.folder_bytes, tmp_path / "out"), (cost.folder_bytes, bytes_of(tmp_path / "out"))
    assert cost.out_bytes == pytest.approx(report["bytes"]["after"], rel=TOLERANCE)
    assert sum(cost.out_parts.values()) == cost.out_bytes and cost.out_parts["embedding"] == 1024 * 128 * 4
    assert cost.out_parts["head"] == (1024 * 128 * 4 if report["untied"] else 0)
    assert len(cost.costliest) == 2 and not cost.savings


def test_of_a_real_model(data: Path, tmp_path: Path) -> None:
    model = data / "stories260k"
    options = Quantize(scheme="w4a16-channel", samples=2, held_out=1, length=32, steps=2, tune_steps=1, batch=2)
    cost = estimate_quantization(model, tmp_path / "out", options)
    quantize(model, tmp_path / "out", options, allow_damage=True)
    assert close(cost.folder_bytes, tmp_path / "out")


@pytest.mark.parametrize(
    "more", [{"layers": 1}, {"student_scheme": "w4a16-channel"}, {"layers": 1, "teacher": "top-k"}]
)
def test_a_distillation_weighs_what_was_foretold(
    wide: Path, text_file: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = Distill(data=text_file, samples=40, held_out=2, length=16, steps=30, batch=2, **more)
    cost = estimate_distillation(wide, tmp_path / "out", options)
    with recording() as log:
        report = distill(wide, tmp_path / "out", options, allow_damage=True)
    assert close(cost.folder_bytes, tmp_path / "out") and cost.out_bytes == report["bytes"]["after"]
    assert {each.name for each in cost.stages} - {"everything else"} == {name for name, units in log.items() if units}
    assert cost.seconds == pytest.approx(sum(each.seconds for each in cost.stages))


LAYERS, FEW = 2, 1
MEASURED = Measured(  # a second for each block and row of what is learned, tuned and rounded, and nothing else
    {
        (deep, rows): {name: float(deep * rows) for name in ("learn", "tune block", "tune", "round (gptq)")}
        | {"teacher": 0.0}
        for deep in (1, 2)
        for rows in (FEW, 2 * FEW)
    },
    FEW,
    StageEstimate("check weights", 0.0, 0, 0),
)


def test_stages_of_other_options_are_what_a_sum_says(wide: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(
        data=text_file, samples=32, held_out=1, length=16, learn=True, block_steps=20, tune_steps=50, batch=4
    )
    job = validate_quantization(wide, tmp_path / "out", options)

    def seconds(options: Quantize) -> dict[str, float]:
        return {each.name: each.seconds for each in stages_of(job, options, MEASURED) if each.seconds}

    told = {"learn": 100.0 * LAYERS * 4, "tune block": 20.0 * LAYERS * 4, "tune": 50.0 * LAYERS * 4}
    told["round (gptq)"] = 32.0 * LAYERS
    assert seconds(options) == pytest.approx(told)
    assert seconds(replace(options, steps=10, samples=16)) == pytest.approx(
        told | {"learn": 10.0 * LAYERS * 4, "round (gptq)": 16.0 * LAYERS}
    )
    assert seconds(options.without_learning()) == pytest.approx({"round (gptq)": 32.0 * LAYERS})
    halves = 2 * (told["learn"] + told["tune block"] + told["tune"] + 16 * LAYERS)
    assert seconds(replace(options, halves=True)) == pytest.approx(told | {"halves": halves})


def test_what_shortens_a_long_job_exists_and_does_as_foretold(wide: Path, text_file: Path, tmp_path: Path) -> None:
    settings = Quantize(
        data=text_file,
        samples=64,
        held_out=1,
        length=16,
        steps=800,
        block_steps=20,
        tune_steps=50,
        batch=4,
        halves=True,
    )
    job = validate_quantization(wide, tmp_path / "out", settings)
    found = shorter_quantizations(job, settings, MEASURED)
    assert [saving.options for saving in found] == [
        "--no-halves", "--steps 100", "--steps 100 --block-steps 0 --tune-steps 0 --no-learn --init hadamard"
    ]  # fmt: skip
    whole = sum(each.seconds for each in stages_of(job, settings, MEASURED))
    assert whole == 3 * (800 + 20 + 50) * LAYERS * 4 + (64 + 2 * 32) * LAYERS > HOUR
    assert found[0].seconds == whole - 2 * (800 + 20 + 50) * LAYERS * 4 - 2 * 32 * LAYERS
    for saving in found:  # as the command line reads it
        options = ["model", "out", *shlex.split(saving.options)]
        command.make_context("quantize", options)
