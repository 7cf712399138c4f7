"""Two processes on the CPU give the answer of one.

Through rounding, single-precision noise in a gradient grows from step to step, whoever adds it up; so learning is
compared in double precision, far more closely than that, and the whole command without learning.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny, two_processes
from tests.processes import command, torchrun


def test_statistics_losses_learned_transforms_and_students(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of("llama")), tmp_path / "model")
    for model_type in two_processes.BUILT:
        (tmp_path / model_type).mkdir()
        tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / model_type)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two_processes.run(folder, tmp_path / "one/result")
    ran = torchrun("-m", "tests.two_processes", folder, tmp_path / "two/result")
    assert ran.returncode == 0, ran.stderr
    one, two = (load_file(tmp_path / name / "result") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("w4a8kvfp8-head-channel", []),
        (
            "w4a8-channel",
            ["--tell-apart", 0.66, "--candidate-bits", "3,4", "--profile-rows", 3, "--halves", "--like"],
        ),
    ],
)
def test_the_command_without_learning(
    scheme: str, more: list[object], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = [
        "--data",
        text_file,
        "--samples",
        5,
        "--held-out",
        3,
        "--length",
        32,
        "--scheme",
        scheme,
        "--no-learn",
    ]
    more = [*more, text_file] if more else []
    job = [*options, *more, "--device", "cpu", "--json", "--allow-damage"]
    one = command("quantize", tiny_folder, tmp_path / "one", *job)
    two = torchrun("-m", "cli.main", "quantize", tiny_folder, tmp_path / "two", *job)
    assert two.returncode == 0, two.stderr
    a, b = json.loads(one.stdout), json.loads(two.stdout)
    for figure, value in a["quality"].items():
        assert b["quality"][figure] == pytest.approx(value, rel=1e-5), figure
    if more:
        for here, there in zip(a["precision"]["parts"], b["precision"]["parts"], strict=True):
            assert here["bits"] == there["bits"] and here["linears"] == there["linears"]
            assert there["kl"] == pytest.approx(here["kl"], rel=1e-2, abs=1e-6)
        assert a["like"] == b["like"]
        assert [one["target_bits"] for one in a["tell_apart"]["tried"]] == [3.25, 3.0]
        for here, there in zip(a["tell_apart"]["tried"], b["tell_apart"]["tried"], strict=True):
            assert there["target_bits"] == here["target_bits"] and there["rate"] == pytest.approx(
                here["rate"], rel=1e-4
            )
        assert b["samples"]["halves"] == pytest.approx(a["samples"]["halves"], rel=1e-4)
    for here, there in zip(a["layers"], b["layers"], strict=True):
        assert here["name"] == there["name"]
        assert there["output_error"] == pytest.approx(here["output_error"], rel=1e-3)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    scales = [name for name in first if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == (2 * 2 if "kvfp8" in scheme else 0)  # keys and values of two blocks
    for name in scales:
        assert torch.allclose(first[name].float(), second[name].float(), rtol=1e-2), name  # bfloat16 apart at most
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}


def test_a_student_that_is_shared_out(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Rows and held-out rows that do not divide by two; what one process writes is what two write, and is loaded."""
    options = ["--data", text_file, "--samples", 5, "--held-out", 3, "--length", 16, "--layers", 1, "--steps", 3]
    options += ["--batch", 3, "--ema", 0.5, "--gradient-checkpointing", "--loss", "forward-kl+hidden", "--lr", 0.01]
    job = [*map(str, options), "--device", "cpu", "--json", "--allow-damage"]
    one = command("distill", tiny_folder, tmp_path / "one", *job)
    two = torchrun("-m", "cli.main", "distill", tiny_folder, tmp_path / "two", *job, "--shard")
    assert two.returncode == 0, two.stderr
    a, b = json.loads(one.stdout), json.loads(two.stdout)
    for figure, value in a["quality"].items():
        assert b["quality"][figure] == pytest.approx(value, rel=1e-4), figure
    assert a["parameters"] == b["parameters"] and a["bytes"] == b["bytes"]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert first.config.to_dict() == second.config.to_dict() | {"_name_or_path": first.config._name_or_path}
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4), name
    refused = command("distill", tiny_folder, tmp_path / "three", *job, "--shard")
    assert refused.returncode == 2 and "torchrun" in refused.stderr


def test_what_the_first_process_refuses_all_refuse(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    ran = torchrun("-m", "cli.main", "quantize", tiny_folder, tmp_path / "out", "--scheme", "w4a16-channel")
    assert ran.returncode != 0 and ran.stderr.count("parewell:") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_budget_is_measured_by_all(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    job = ["--data", text_file, "--samples", 8, "--held-out", 2, "--length", 16, "--scheme", "w4a16-channel"]
    ran = torchrun(
        "-m", "cli.main", "quantize", tiny_folder, tmp_path / "out", *job, "--device", "cpu", "--budget", "1s"
    )
    told = [line for line in ran.stderr.splitlines() if line.startswith("parewell: budget")]
    assert len(told) == 1 and "this job takes about" in told[0], ran.stderr
    assert not list(tmp_path.iterdir())
