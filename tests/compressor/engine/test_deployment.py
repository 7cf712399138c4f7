"""Text like deployment beside calibration rows: states are the library's, whole jobs and what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from calib.data.corpus import Corpus, sample_rows
from calib.data.load import Sample, load_corpus
from calib.model.checkpoint import read_tokenizer
from calib.stats.state_shift import gaussian_kl, principal_components
from cli.console import print_quantization
from compressor import quantize
from compressor.quantization.cost import estimate_quantization
from tests import tiny
from tests.compressor.quantization.test_quantize import SMALL

PLAIN = SMALL.without_learning()


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("like") / "deployment.jsonl"
    rows = (json.dumps({"text": f"{i} {i * i} = {i**3}: jjj kkk; zq{i} " * (1 + i % 3)}) + "\n" for i in range(40))
    file.write_text("".join(rows))
    return file


@torch.no_grad()
def states(folder: Path, rows: Corpus) -> list[torch.Tensor]:
    """What each block puts out, on real tokens, by the library: the last block's before the norm is not among them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model(rows.ids, output_hidden_states=True).hidden_states
    return [each[rows.mask].double() for each in found[1:-1]]


def test_states_are_the_library_s_and_the_text_that_differs_is_told(
    tiny_folder: Path, other_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of unequal length, padded; in little memory the same; the weights are those of the job without."""
    rows = [json.dumps({"text": "the quick brown fox jumps over the lazy dog"[: 20 + i % 20]}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = replace(PLAIN, data=tmp_path / "rows.jsonl", like=other_text, by_document=True, samples=8)
    report = quantize(tiny_folder, tmp_path / "out", options)
    like, names = report["like"], [one["block"] for one in report["like"]["blocks"]]
    assert names == ["model.layers.0", "model.layers.1"] and like["chance"] == 1 / 200
    read = partial(load_corpus, tokenizer=read_tokenizer(tiny_folder), vocab=tiny.VOCAB, length=32, by_document=True)
    calibration = sample_rows(read(tmp_path / "rows.jsonl", rows=Sample(11, 0)), 11, seed=0)[:8]
    deployed = sample_rows(read(other_text, rows=Sample(11, 0)), 8, seed=0)
    assert not calibration.mask.all() and not deployed.mask.all()
    assert like["rows"] == [8, 8] and like["tokens"] == [calibration.tokens, deployed.tokens]
    for one, a, b in zip(like["blocks"], states(tiny_folder, calibration), states(tiny_folder, deployed), strict=False):
        basis = principal_components(torch.cat([a, b]).T.cov(correction=0))
        assert basis.shape[1] == one["components"]
        (p, p_cov), (q, q_cov) = ((x.mean(0), x.T.cov(correction=0)) for x in (b @ basis, a @ basis))
        assert float(gaussian_kl(p, p_cov, q, q_cov)) == pytest.approx(one["kl"], rel=1e-3)
        out = (b.amax(0) > a.amax(0)) | (b.amin(0) < a.amin(0))
        assert one["beyond_range"] == pytest.approx(float(out.double().mean()))
        assert one["kl"] > one["kl_dealt_95"] >= one["kl_dealt"] > one["kl_independent"] / 2
        assert one["wasserstein"] > one["wasserstein_dealt"]
    print_quantization(report)
    told = " ".join(capsys.readouterr().out.split())
    assert "differs most from the calibration rows at model.layers." in told and "beyond chance (p = 0.005)" in told
    assert "not beyond" not in told and "take calibration rows like these (--data deployment.jsonl)" in told
    assert "Calibration rows and text like deployment" in (tmp_path / "out/report.html").read_text()

    quantize(tiny_folder, tmp_path / "small", replace(options, memory_budget=3e-6))
    plain = quantize(tiny_folder, tmp_path / "plain", replace(options, like=None))
    assert "like" not in plain
    same, small, weights = (tmp_path / name / "model.safetensors" for name in ("out", "small", "plain"))
    assert same.read_bytes() == small.read_bytes() == weights.read_bytes()
    assert json.loads((tmp_path / "small/report.json").read_text())["like"] == json.loads(json.dumps(like))


def test_the_calibration_s_own_file_differs_by_no_more_than_chance(tiny_folder: Path, tmp_path: Path) -> None:
    """The very same rows, and others of one text; and a dry run has the stage."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "nobody", "looks"]
    draws = torch.randint(len(words), (2, 600), generator=torch.Generator().manual_seed(0))
    files = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for file, draw in zip(files, draws, strict=True):
        file.write_text(" ".join(words[i] for i in draw))
    options = replace(PLAIN, rounding="rtn", target_bits=4.0, profile_rows=1, candidate_bits="3,4", data=files[0])
    options = replace(options, held_out=2, samples=24, held_out_data=files[1], like=files[0])
    like = quantize(tiny_folder, tmp_path / "out", options)["like"]
    assert like["chance"] == 1 and all(one["kl"] < 1e-6 for one in like["blocks"])
    apart = replace(options, samples=14, held_out_data=None)  # rows that are held out of the same draw
    assert quantize(tiny_folder, tmp_path / "out", apart)["like"]["chance"] == 1
    like = quantize(tiny_folder, tmp_path / "halves", replace(options, like=files[1]))["like"]
    assert like["chance"] > 0.01 and "not beyond chance" in (tmp_path / "halves/report.html").read_text()
    cost = estimate_quantization(tiny_folder, tmp_path / "third", options)
    assert [stage.tokens for stage in cost.stages if stage.name == "like"] == [2 * 24 * 32]
