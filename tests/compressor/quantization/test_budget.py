"""As many steps of tuning as a budget has time for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib import BadInput
from compressor import Quantize, quantize
from compressor.quantization.cost import MOST_STEPS, Measured, StageEstimate, estimate_quantization, steps_within
from compressor.quantization.job import QuantizationJob, validate_quantization
from compressor.quantization.options import seconds_of

SMALL = Quantize(
    scheme="w3a16-channel", samples=8, held_out=3, length=32, batch=2, top_k=8, learn=False, init="none",
    precision="float32", budget="1h",
)  # fmt: skip
QUANTIZE = "compressor.quantization.quantize"


def test_times_are_read() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1.5H", " 2 d")] == [90, 1800, 5400, 172_800]


@pytest.mark.parametrize("text", ["", "soon", "30", "-1h", "0s", "infh", "nanm", "2 weeks"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no time; write one such as"):
        replace(SMALL, budget=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune_steps": 5}, "leave one of them out"),
        ({"halves": True}, "halves runs it on parts of the rows"),
        ({"tell_apart": "52%"}, "tell-apart tries several widths"),
        ({"rounding": "none", "init": "hadamard"}, "leaves no scales to tune"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(SMALL, **options)


def test_the_best_preset_leaves_the_number_of_steps_to_a_budget() -> None:
    found = Quantize.preset("best", budget="2h")
    assert (found.tune_steps, found.block_steps) == (None, None)
    assert (found.tuned, found.block_tuned) == (1, 2)
    some = found.within_budget(7)
    assert (some.budget, some.tuned, some.block_tuned) == (None, 7, 14)
    assert Quantize(budget="2h", block_steps=5).within_budget(7).block_tuned == 5


def test_steps_are_those_that_fit(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Rounding takes two seconds a row, a step of the model three, one of all blocks one, and all else nothing."""
    options = replace(SMALL, data=text_file)
    job = validate_quantization(tiny_folder, tmp_path / "out", options)
    told = {
        at: {"round (gptq)": 2.0 * at[1], "tune": 3.0, "tune block": 1.0} for at in ((1, 1), (2, 1), (1, 2), (2, 2))
    }
    measured = Measured(told, 1, StageEstimate("check weights", 0.0, 0, 0))
    found = [steps_within(job, options, measured, seconds) for seconds in (21, 25.9, 26, 49)]
    assert found == [1, 1, 2, 6]
    assert steps_within(job, options, measured, 1e9) == MOST_STEPS
    line = "budget 1m: this job takes about 1:01 with a single step of tuning; give more"  # 40 seconds are over already
    with pytest.raises(BadInput, match=line):
        steps_within(job, replace(options, budget="1m"), measured, 20.0)
    assert steps_within(job, replace(options, block_steps=0), measured, 19) == 1


def test_a_budget_is_the_steps_that_it_has_time_for_also_when_the_job_is_resumed(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SMALL, data=text_file)
    monkeypatch.setattr(sys.modules[QUANTIZE], "measured_blocks", lambda *_: "some measurements")
    monkeypatch.setattr(sys.modules[QUANTIZE], "steps_within", lambda *_: 3)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["compressor.quantization.stages"], "tune", interrupted)
        quantize(tiny_folder, tmp_path / "out", options)
    monkeypatch.setattr(sys.modules[QUANTIZE], "steps_within", lambda *_: 5)  # a busier machine
    with pytest.raises(BadInput, match=r"options\.budget was 1h and is now 2h"):
        quantize(tiny_folder, tmp_path / "out", replace(options, budget="2h"), resume=True)
    report = quantize(tiny_folder, tmp_path / "out", options, resume=True)
    assert report["budget"] == {"asked": "1h", "block_steps": 6, "tune_steps": 3} and len(report["curves"]["tune"]) == 3
    counted = replace(options, budget=None, block_steps=6, tune_steps=3)
    quantize(tiny_folder, tmp_path / "counted", counted)
    parts = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "counted")]
    assert parts[0] == parts[1]
    recipes = [json.loads((tmp_path / name / "parewell.json").read_text())["recipe"][-1] for name in ("out", "counted")]
    assert recipes[0]["options"] == recipes[1]["options"]


def test_a_budget_shorter_than_the_shortest_job_writes_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a better start looked for first."""
    monkeypatch.setattr(sys.modules[QUANTIZE], "_from_better_start", None)
    monkeypatch.setattr(QuantizationJob, "tries_starts", True)
    with pytest.raises(BadInput, match=r"budget 0.01s: this job takes about .* with a single step of tuning"):
        quantize(tiny_folder, tmp_path / "out", replace(SMALL, data=text_file, budget="0.01s"))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_steps_that_fill_the_time(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    cost = estimate_quantization(tiny_folder, tmp_path / "out", replace(SMALL, data=text_file, budget="1m"))
    (tuning,) = (each for each in cost.stages if each.name == "tune")
    assert cost.seconds <= 60 and tuning.tokens >= 2 * 32
    assert tuning.tokens == MOST_STEPS * 2 * 32 or cost.seconds > 55
