"""What is said of experts that few calibration tokens reach, or none."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from calib.data.corpus import sample_rows
from calib.data.load import load_corpus
from calib.model.checkpoint import read_tokenizer
from cli.console import print_quantization
from compressor import Quantize, quantize
from tests import tiny


def test_tokens_of_each_expert_are_counted_and_none_is_no_error_of_zero(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts of the first block by the library's own router; in every block they add up to two of each token."""
    built = tiny.model_of(tiny.config_of("mixtral", num_local_experts=5), dtype=torch.float32)
    for name, p in built.named_parameters():
        if name.endswith("gate.weight"):
            p.data[:4] = p.data[:1] * torch.tensor([1.0, 0.9, 0.8, -0.9])[:, None]
            p.data[4] = 0
    model = tiny.save(built, tmp_path / "model")
    options = Quantize(
        scheme="w4a16-channel",
        data=text_file,
        samples=4,
        held_out=2,
        length=16,
        init="none",
        learn=False,
        rounding="gptq",
    )
    report = quantize(model, tmp_path / "out", options)
    rows = sample_rows(load_corpus(text_file, read_tokenizer(model), vocab=tiny.VOCAB, length=16), 6, seed=0)[:4]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(input_ids=rows.ids, output_router_logits=True).router_logits[0]
    chosen = torch.bincount(logits.topk(2).indices.flatten(), minlength=5).tolist()
    assert 0 in chosen, "an expert must be out of reach here"
    up = {layer["name"]: layer for layer in report["layers"] if layer["name"].endswith("w1")}
    found = [up[f"model.layers.0.block_sparse_moe.experts.{e}.w1"]["tokens"] for e in range(5)]
    assert found == chosen
    for block in range(2):
        assert sum(of["tokens"] for name, of in up.items() if f"layers.{block}." in name) == 2 * rows.ids.numel()
    for layer in report["layers"]:
        assert (layer["output_error"] is None) == (layer["tokens"] == 0)
        assert layer["output_error"] is None or layer["output_error"] > 0
        if "self_attn" in layer["name"]:
            assert layer["tokens"] == rows.ids.numel()
    none = sum(of["tokens"] == 0 for of in up.values())
    assert report["experts"] == {"all": 10, "unreached": none, "fewest_tokens": 0}
    capsys.readouterr()
    print_quantization(report)
    told = " ".join(capsys.readouterr().out.split())
    assert f"No calibration token reached {none} of 10 experts" in told and "--samples" in told
    assert f"No calibration token reached {none} of 10 experts" in (tmp_path / "out/report.html").read_text()
    json.loads((tmp_path / "out/report.json").read_text())
