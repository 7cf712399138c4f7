"""Whether more calibration rows would help: arithmetic in closed form, a job's halves against jobs of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib import BadInput, embedded
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.jobs.journal import Journal
from calib.model.weights import Weights
from calib.quant.scheme import Scheme
from compressor import Quantize, quantize
from compressor.quantization.job import validate_quantization
from compressor.quantization.learn_transforms import LearnedModel, free_parameters, initial_transforms
from compressor.quantization.quantized_model import Splits
from compressor.quantization.repeated.sample_size import estimate_sample_size
from compressor.quantization.stages import run_stages
from tests import tiny
from tests.compressor.quantization.test_quantize import SMALL
from tests.kills import kill_and_resume


@given(st.floats(0, 10), st.floats(0, 100), st.integers(1, 50))
def test_what_twice_as_many_rows_win_where_the_loss_falls_as_theory_has_it(least: float, c: float, rows: int) -> None:
    def loss(n: float) -> float:
        return least + c / n

    text = Corpus(torch.zeros(2 * rows, 3, dtype=torch.long), torch.ones(2 * rows, 3, dtype=torch.bool), "", None)
    found = estimate_sample_size(text, (loss(2 * rows), None), 7, lambda half, _: (loss(len(half.ids)), None)).asdict()
    assert found["change"] == pytest.approx(c / (2 * rows), abs=1e-9) and found["change_error"] == 0
    assert found["win"] == pytest.approx(loss(2 * rows) - loss(4 * rows), abs=1e-9)
    assert found["tokens"] == 6 * rows and found["risk"] == 7 / (12 * rows) and found["tell_apart_twice"] is None


@given(st.floats(0, 0.1), st.floats(0, 0.2), st.integers(1, 50))
def test_the_tell_apart_rate_falls_as_the_root_of_the_loss(least: float, c: float, rows: int) -> None:
    def loss(n: float) -> tuple[float, float]:
        return least + c / n, 0.5 + (least + c / n) ** 0.5 / 2

    text = Corpus(torch.zeros(2 * rows, 3, dtype=torch.long), torch.ones(2 * rows, 3, dtype=torch.bool), "", None)
    found = estimate_sample_size(text, loss(2 * rows), 0, lambda half, _: loss(len(half.ids))).asdict()
    assert found["tell_apart"] == loss(2 * rows)[1]
    assert found["tell_apart_twice"] == pytest.approx(loss(4 * rows)[1], abs=1e-7)


def test_halves_share_no_row_and_their_difference_is_the_error() -> None:
    ids = torch.arange(7)[:, None].expand(7, 2)
    seen = {}

    def loss(half: Corpus, name: str) -> tuple[float, None]:
        seen[name] = half.ids[:, 0].tolist()
        return {"first": 1.0, "second": 1.5}[name], None

    text = Corpus(ids, torch.ones(7, 2, dtype=torch.bool), "", None)
    found = estimate_sample_size(text, (0.25, None), 0, loss).asdict()
    assert seen == {"first": [0, 1, 2], "second": [3, 4, 5]}
    assert found["change"] == 1.0 and found["change_error"] == 0.25 and found["win_error"] == 0.125


@pytest.mark.parametrize(
    ("model_type", "block"), [("llama", None), ("llama", 8), ("qwen3", None), ("gemma2", None), ("mixtral", None)]
)
def test_free_parameters_are_those_that_are_learned(model_type: str, block: int | None, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    config = tiny.config_of(model_type)
    stream = BlockwiseModel(config, Weights(folder), torch.device("cpu"))
    scheme = Scheme.parse("w4a4kv4-asym")
    start = initial_transforms(stream, "hadamard", scheme, online=True, seed=0, rotation_block=block)
    model = LearnedModel(stream, start, scheme, 10**9)
    directions = sum(
        r.tangent[..., 0, 0].numel() * int(torch.triu(torch.ones(r.tangent.shape[-2:]), 1).sum())
        for r in model.rotations
    )
    scales = sum(s.numel() for block in model.blocks for s in block.scales)
    assert free_parameters(start) == directions + scales


def test_halves_are_jobs_of_their_own(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = replace(SMALL, data=text_file, halves=True, block_steps=0, tune_steps=8)
    samples = quantize(tiny_folder, tmp_path / "out", options)["samples"]
    job = validate_quantization(tiny_folder, tmp_path / "other", options)
    for rows, loss in zip((slice(0, 3), slice(3, 6)), samples["halves"], strict=True):
        (tmp_path / "pages").mkdir(exist_ok=True)
        half = replace(job, rows=Splits(job.rows.calibration[rows], job.rows.held_out))
        done = run_stages(half, Journal(tmp_path / "pages", f"{rows.start}-"))
        assert done.figures["tuned"]["kl"] == pytest.approx(loss, rel=1e-12)
    plain = quantize(tiny_folder, tmp_path / "plain", replace(options, halves=False))
    assert plain["quality"]["kl"] == samples["whole"] and "samples" not in plain
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert samples["tokens"] == 6 * 32 and samples["parameters"] > 0
    assert "Half of the calibration rows cost" in (tmp_path / "out/report.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "plain", "pages"}
    assert json.loads((tmp_path / "out/report.json").read_text())["samples"] == samples


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_among_halves_and_shared_out_bits_a_job_resumes_to_the_same_bytes(
    text_file: Path, tmp_path: Path
) -> None:
    options = Quantize(
        scheme="w4a16-channel",
        target_bits=3.5,
        candidate_bits="3,4",
        profile_rows=1,
        halves=True,
        like=text_file,
        samples=8,
        held_out=2,
        length=16,
        learn=False,
        init="none",
        rounding="rtn",
    )
    job = partial(quantize, embedded.MODEL, options=options)
    kill_and_resume(
        job, tmp_path, ("like", "sensitivity", "anchor", "first-block-2-0", "half-first", "second-sensitivity")
    )


def test_one_row_has_no_halves() -> None:
    with pytest.raises(BadInput, match="no halves"):
        Quantize(samples=1, halves=True)
