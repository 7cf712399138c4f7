"""Presets: they fill in what is not given, a recipe has what came of it, and dry runs compare them."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from calib import BadInput
from calib.jobs.options import PRESET_NAMES, Preset
from calib.jobs.recipe import read_recipe
from calib.model.task import Task
from cli.main import parewell
from compressor import Distill, Quantize
from compressor.distillation.options import DISTILL_PRESETS
from compressor.quantization.options import QUANTIZE_PRESETS
from tests import tasks
from tests.unlearn.conftest import Site, words  # noqa: F401
from unlearn import Unlearn
from unlearn.options.unlearning import UNLEARN_PRESETS

TABLES: dict[type[Any], dict[str, Preset]] = {
    Quantize: QUANTIZE_PRESETS, Distill: DISTILL_PRESETS, Unlearn: UNLEARN_PRESETS
}  # fmt: skip
NEEDED: dict[type[Any], dict[str, Any]] = {
    Quantize: {}, Distill: {"layers": 2}, Unlearn: {"train": Path("a"), "forget": Path("b")}
}  # fmt: skip
SMALL = ("--samples", "4", "--held-out", "2", "--length", "32", "--device", "cpu")


def invoked(*typed: object) -> str:
    result = CliRunner().invoke(parewell, [str(word) for word in typed], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("job", TABLES)
def test_a_preset_fills_in_what_is_not_given(job: type[Any]) -> None:
    table, needed = TABLES[job], NEEDED[job]
    assert tuple(table) == PRESET_NAMES
    assert all(f.default is not MISSING for f in fields(job))
    assert job.preset("default", **needed) == job(**needed)
    for name, preset in table.items():
        made = job.preset(name, **needed)
        assert made == replace(job(**needed), **preset.values)
        for option, value in preset.values.items():
            other = (not value) if isinstance(value, bool) else value + 1
            assert getattr(job.preset(name, **needed, **{option: other}), option) == other
    with pytest.raises(BadInput, match="preset 'fastest' is unknown; choose from fast, default, best"):
        job.preset("fastest", **needed)


def test_a_preset_leaves_alone_what_means_nothing_beside_what_is_given() -> None:
    assert Quantize.preset("best", rounding="none").tune_steps is None
    assert Quantize.preset("best", learn=False).steps == Quantize().steps
    for method in ("retrain", "exact"):
        assert Unlearn.preset("best", method=method, **NEEDED[Unlearn]).epochs == Unlearn.epochs
    assert Unlearn.preset("best", estimator="folds", **NEEDED[Unlearn]).epochs == 20
    assert Unlearn.preset("best", method="dmm", **NEEDED[Unlearn]).epochs == 20


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], (50, 256, 4)),
        (["--preset", "best"], (200, 256, 4)),
        (["--preset", "fast"], (0, 256, 4)),
        (["--preset", "best", "--tune-steps", "7"], (7, 256, 4)),
        (["--tune-steps", "50", "--preset", "best"], (50, 256, 4)),  # also where that is the default
        (["--config", "FILE", "--preset", "best"], (9, 256, 2)),
        (["--preset", "best", "--config", "FILE"], (9, 256, 2)),
        (["--config", "FILE", "--preset", "best", "--tune-steps", "7"], (7, 256, 2)),
        (["--config", "PRESET"], (200, 256, 4)),
        (["--config", "PRESET", "--preset", "fast"], (0, 256, 4)),
        (["--recipe", "ostquant"], (0, 1000, 16)),
        (["--recipe", "ostquant", "--top-k", "256", "--config", "FILE"], (9, 256, 2)),
    ],
)
def test_command_line_before_file_before_preset(
    typed: list[str], expected: tuple[int, int, int], tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = list[Quantize]()

    def taken(model: str, out: Path, options: Quantize, **more: object) -> None:
        found.append(options)
        raise BadInput("taken")

    monkeypatch.setattr("compressor.quantize", taken)
    (tmp_path / "job.toml").write_text("tune-steps = 9\nbatch = 2\n")
    (tmp_path / "preset.toml").write_text('preset = "best"\n')
    files = {"FILE": str(tmp_path / "job.toml"), "PRESET": str(tmp_path / "preset.toml")}
    with pytest.raises(BadInput, match="taken"):
        invoked("quantize", tiny_folder, tmp_path / "out", *(files.get(word, word) for word in typed))
    assert (found[0].tuned, found[0].top_k, found[0].batch) == expected


def test_a_recipe_has_what_came_of_a_preset_and_is_replayed(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoked("quantize", tiny_folder, out, "--preset", "fast", "--scheme", "w4a16-channel", *SMALL, "--allow-damage")
    options = read_recipe(out)[0]["options"]
    assert [options[name] for name in ("init", "learn", "block_steps", "tune_steps")] == ["none", False, 50, 0]
    assert "preset" not in options
    assert "byte for byte" in invoked("replay", out, tmp_path / "again")


@pytest.mark.parametrize(("model_type", "task"), [("t5", Task.SEQ_TO_SEQ_LM), ("bert", Task.EMBEDDING)])
def test_a_model_that_cannot_be_tuned_does_without_the_steps_of_a_preset(
    model_type: str, task: Task, tmp_path: Path
) -> None:
    tasks.save(model_type, task, tmp_path / "model")
    rows = tasks.rows_file(tmp_path, pairs=task is Task.SEQ_TO_SEQ_LM)
    small = ("--data", rows, "--scheme", "w4a16-channel", *SMALL, "--length", "8", "--allow-damage")
    for name, blocks in (("fast", 50), ("default", 75), ("best", 300)):
        invoked("quantize", tmp_path / "model", tmp_path / name, *small, "--preset", name)
        options = read_recipe(tmp_path / name)[0]["options"]
        assert options["tune_steps"] == 0
        assert options["block_steps"] == (0 if task is Task.SEQ_TO_SEQ_LM else blocks)
    assert "byte for byte" in invoked("replay", tmp_path / "default", tmp_path / "again")
    with pytest.raises(BadInput, match=r"tune-steps: of .* there is no tuning"):
        invoked("quantize", tmp_path / "model", tmp_path / "out", *small, "--tune-steps", "7")


def test_dry_runs_compare_presets(tiny_folder: Path, tmp_path: Path, words: Site) -> None:  # noqa: F811
    commands: dict[str, list[object]] = {
        "quantize": [tiny_folder, tmp_path / "out", "--scheme", "w4a16-channel", *SMALL],
        "distill": [tiny_folder, tmp_path / "out", "--layers", "1", *SMALL],
        "unlearn": [
            words.model, tmp_path / "out", "--train", words.train, "--forget", words.forget, "--method", "npo",
            "--length", "64",
        ],
    }  # fmt: skip
    for command, typed in commands.items():
        plain = json.loads(invoked(command, *typed, "--dry-run", "--json"))
        presets = plain["presets"]
        assert tuple(presets) == PRESET_NAMES
        assert presets["default"]["seconds"] == pytest.approx(plain["seconds"])
        assert presets["fast"]["seconds"] < presets["default"]["seconds"] < presets["best"]["seconds"]
        assert presets["default"]["peak_bytes"] == plain["peak_bytes"]
        assert presets["default"]["folder_bytes"] == plain["folder_bytes"]
        assert "by --preset" in invoked(command, *typed, "--dry-run", "--preset", "best")
        option = {"quantize": "--tune-steps", "distill": "--steps", "unlearn": "--epochs"}[command]
        assert "by --preset" not in invoked(command, *typed, "--dry-run", option, "3")
    assert not (tmp_path / "out").exists()
