"""Where a job begins that says nothing of rotations: from none or from Hadamards, whichever is better in a trial."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calib.jobs.recipe import read_recipe
from calib.model.task import Task
from compressor import Quantize, quantize
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.job import STARTS, TRIAL_ROWS, validate_quantization
from compressor.quantization.objective import kept_back
from tests import tiny

SMALL = Quantize(
    scheme="w3a16-channel", samples=12, held_out=4, length=32, batch=2, block_steps=2, tune_steps=2, top_k=8,
    precision="float32",
)  # fmt: skip


def untied(folder: Path, loud: float) -> Path:
    """A model of which a few weights in a hundred are so much larger."""
    model = tiny.model_of(tiny.config_of("llama", tie_word_embeddings=False), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p[torch.rand(p.shape, generator=generator) < 0.04] *= loud
    return tiny.save(model, folder)


@pytest.fixture(scope="module", params=[1.0, 10.0], ids=["flat", "loud"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied(tmp_path_factory.mktemp("untied") / "model", request.param)


def test_the_better_start_in_a_trial_is_taken(folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = replace(SMALL, data=text_file)
    report = quantize(folder, tmp_path / "out", options, allow_damage=True)
    better = min(STARTS, key=report["starts"].__getitem__)
    assert read_recipe(tmp_path / "out")[-1]["options"]["init"] == better
    rows = validate_quantization(folder, tmp_path / "other", options).rows.calibration.ids
    back = kept_back(len(rows))
    save_file({"input_ids": rows[:TRIAL_ROWS].contiguous()}, tmp_path / "few.safetensors")
    save_file({"input_ids": rows[-back:].contiguous()}, tmp_path / "back.safetensors")
    for init in STARTS:  # what a job by that name on those rows comes to
        alone = Quantize(
            scheme=SMALL.scheme, init=init, learn=False, data=tmp_path / "few.safetensors", samples=TRIAL_ROWS,
            held_out_data=tmp_path / "back.safetensors", held_out=back, precision="float32",
        )  # fmt: skip
        kl = quantize(folder, tmp_path / init, alone, allow_damage=True)["quality"]["kl"]
        assert report["starts"][init] == pytest.approx(kl, rel=1e-3)
    quantize(folder, tmp_path / "named", replace(options, init=better), allow_damage=True)
    parts = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "named")]
    assert parts[0] == parts[1]
    assert ("no transforms, rather than Hadamards" if better == "none" else "Hadamards, rather than no transforms") in (
        tmp_path / "out" / "report.html"
    ).read_text()


def test_few_large_weights_want_to_be_spread(text_file: Path, tmp_path: Path) -> None:
    options = SMALL.without_learning(data=text_file, init=None, block_steps=None, tune_steps=None, batch=4, top_k=256)
    found = {
        loud: quantize(untied(tmp_path / f"{loud}", loud), tmp_path / "out", options, allow_damage=True)["starts"]
        for loud in (1.0, 10.0)
    }
    assert found[1.0]["none"] < found[1.0]["hadamard"] and found[10.0]["hadamard"] < found[10.0]["none"]


def test_a_trial_is_not_made_again_when_the_job_is_resumed(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = untied(tmp_path / "model", 1.0), replace(SMALL, data=text_file)
    quantize(folder, tmp_path / "whole", options, allow_damage=True)
    module, seen = sys.modules["compressor.quantization.quantize"], list[str]()
    run = module.run_stages

    def counted(job: Any, *args: Any, **more: Any) -> Any:
        seen.append(job.options.init)
        if len(seen) in (2, 4):  # in the trial of the second start, and in the job itself
            raise KeyboardInterrupt
        return run(job, *args, **more)

    monkeypatch.setattr(module, "run_stages", counted)
    for resume in (None, True):
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, tmp_path / "out", options, resume=resume, allow_damage=True)
    quantize(folder, tmp_path / "out", options, resume=True, allow_damage=True)
    assert seen[:3] == ["none", "hadamard", "hadamard"] and seen[3] == seen[4] and len(seen) == 5
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["starts"]


def test_a_job_that_is_killed_as_a_trial_is_cleared_away_goes_on(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options, left = untied(tmp_path / "model", 1.0), replace(SMALL, data=text_file), 3
    quantize(folder, tmp_path / "whole", options, allow_damage=True)
    unlink = Path.unlink

    def killed(self: Path, *args: Any) -> None:
        nonlocal left
        left -= self.name.startswith("start-none-")
        if left < 0:
            raise KeyboardInterrupt
        unlink(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        quantize(folder, tmp_path / "out", options, allow_damage=True)
    quantize(folder, tmp_path / "out", options, resume=True, allow_damage=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_a_trial_does_not_need_as_many_tokens_as_the_job_has(tmp_path: Path) -> None:
    """Eight rows of four tokens span no linear's inputs; forty do."""
    ids = torch.randint(3, tiny.VOCAB, (60, 4), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    options = Quantize(
        scheme="w3a16-channel", data=tmp_path / "ids.safetensors", samples=50, held_out=5, length=4, damping=0.0,
        block_steps=0, tune_steps=0,
    )  # fmt: skip
    report = quantize(untied(tmp_path / "model", 1.0), tmp_path / "out", options, allow_damage=True)
    assert set(report["starts"]) == set(STARTS)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (False, {"init": "hadamard"}),
        (False, {"scheme": "w4a8-g8"}),
        (False, {"learn": True}),
        (False, {"rounding": "rtn"}),
        (False, {"samples": 3}),
    ],
)
def test_where_there_is_nothing_to_choose_nothing_is_tried(
    tied: bool, options: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    model = tiny.model_of(tiny.config_of("llama", tie_word_embeddings=tied), dtype=torch.float32)
    folder, plain = tiny.save(model, tmp_path / "model"), replace(SMALL, data=text_file)
    assert not validate_quantization(folder, tmp_path / "out", replace(plain, **options)).tries_starts
    assert validate_quantization(folder, tmp_path / "out", plain).tries_starts == (not tied)


def test_without_a_kl_or_rows_for_every_process_nothing_is_tried(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = validate_quantization(untied(tmp_path / "model", 1.0), tmp_path / "out", replace(SMALL, data=text_file))
    back = kept_back(len(job.rows.calibration.ids))
    for processes in (back, back + 1):
        monkeypatch.setattr("compressor.quantization.job.world_size", lambda processes=processes: processes)
        assert job.tries_starts == (processes == back)
    monkeypatch.undo()
    monkeypatch.setattr(job.stream, "task", Task.EMBEDDING)
    assert not job.tries_starts


def test_a_dry_run_counts_the_trial(text_file: Path, tmp_path: Path) -> None:
    folder, options = untied(tmp_path / "model", 1.0), replace(SMALL, data=text_file)
    costs = [estimate_quantization(folder, tmp_path / "out", one) for one in (options, replace(options, init="none"))]
    names = [[stage.name for stage in cost.stages] for cost in costs]
    assert "compare starts" in names[0] and "compare starts" not in names[1]
