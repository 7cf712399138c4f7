"""DeepSeek's layout of FP8, read back by transformers, which turns it into values on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calib import BadInput
from compressor import Export, Quantize, export, load, quantize
from tests import tiny

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def _quantized(tmp_path: Path, text_file: Path, scheme: str = "FP8_BLOCK", **more: Any) -> Path:
    wide = WIDE | more.pop("sizes", {})
    folder = tiny.save(tiny.model_of(tiny.config_of("llama", **wide), dtype=torch.bfloat16), tmp_path / "model")
    job = Quantize(scheme=scheme, data=text_file, samples=2, held_out=1, length=16, rounding="rtn", **more)
    quantize(folder, tmp_path / "out", job, allow_damage=True)
    return tmp_path / "out"


def test_transformers_reads_the_weights_that_parewell_does(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for FP8")
    out = _quantized(tmp_path, text_file, ignore=("re:.*o_proj",))
    report = export(out, tmp_path / "dst", Export(to="deepseek-fp8", data=text_file, held_out=1, length=16))
    assert report["loaders"]["loaders"] == ["transformers", "vLLM"] and report["runtime"].startswith("transformers")
    ours = dict(load(out).named_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.bfloat16)
    for name, value in theirs.named_parameters():
        assert value.dtype == torch.bfloat16 and torch.equal(value, ours[name].bfloat16()), name
    stored, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dst", out))
    name = "model.layers.0.mlp.gate_proj"
    assert torch.equal(stored[f"{name}.weight"].view(torch.uint8), before[f"{name}.weight"].view(torch.uint8))
    scale = stored[f"{name}.weight_scale_inv"]
    assert scale.shape == (2, 1) and torch.equal(scale, before[f"{name}.weight_scale"].float())
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert "lm_head" in config["modules_to_not_convert"]
    assert "model.layers.1.self_attn.o_proj" in config["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("scheme", "more", "why"),
    [
        ("FP8_BLOCK", {"sizes": {"num_key_value_heads": 2}}, "'model.layers.0.self_attn.k_proj' is 64 x 128"),
        ("fp8_dynamic", {}, "holds wfp8afp8-b128 alone, not wfp8afp8"),
        ("fp8_block-kvfp8", {}, "holds wfp8afp8-b128 alone, not wfp8afp8kvfp8-b128"),
        ("FP8_BLOCK", {"lm_head": "w8"}, "with an embedding or a head in codes"),
        ("FP8_BLOCK", {"online": True}, "rotates as it runs"),
    ],
)
def test_what_it_cannot_say_is_refused(
    scheme: str, more: dict[str, Any], why: str, text_file: Path, tmp_path: Path
) -> None:
    out = _quantized(tmp_path, text_file, scheme, **more)
    with pytest.raises(BadInput, match=why):
        export(out, tmp_path / "dst", Export(to="deepseek-fp8"))
    assert not (tmp_path / "dst").exists()


def test_floats_have_no_codes(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not quantized.*--scheme wfp8afp8-b128"):
        export(tiny_folder, tmp_path / "dst", Export(to="deepseek-fp8"))
