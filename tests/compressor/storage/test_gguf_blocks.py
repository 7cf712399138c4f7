"""Folders in llama.cpp's block types: rows that blocks do not divide, sizes, what opens them, and what GPTQ gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.jobs.recipe import read_recipe
from calib.quant.scheme import Scheme
from compressor import Quantize, load, quantize
from compressor.engine.load import codes_in
from compressor.quantization.cost import estimate_quantization
from tests import tiny

QUICK = {"samples": 8, "held_out": 2, "length": 32, "block_steps": 0, "tune_steps": 0}


@pytest.mark.parametrize("name", ["q4_k", "Q3_K", "iq4_xs", "q8_0"])
def test_a_folder_says_what_was_chosen_and_parewell_alone_opens_it(
    name: str, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    job = Quantize(scheme=name, data=text_file, **QUICK)  # type: ignore[arg-type]
    cost = estimate_quantization(folder, tmp_path / "out", job)
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report["bytes"]["after"] == sum(x.nbytes for x in stored.values()) == cost.out_bytes
    step = read_recipe(tmp_path / "out")[-1]
    assert step["scheme"] == name.lower() and Scheme.read(step).name == name.lower()
    wide, narrow = (Scheme.read(step).grid(f"model.layers.0.mlp.{one}_proj").kind for one in ("down", "up"))
    assert (wide, narrow) == {"q4_k": ("q4_k", "q5_0"), "q3_k": ("q3_k", "q4_0"), "iq4_xs": ("iq4_xs", "iq4_nl"),
                              "q8_0": ("q8_0", "q8_0")}[name.lower()]  # fmt: skip
    assert report["loaders"]["loaders"] == ["parewell.load"]
    with pytest.raises(ValueError, match="format"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, plain = load(tmp_path / "out").state_dict(), load(folder).state_dict()
    for one in ("mlp.down_proj", "self_attn.q_proj"):
        weight = f"model.layers.1.{one}.weight"
        assert 0 < (ours[weight] - plain[weight]).norm() < 0.35 * plain[weight].norm()
    assert codes_in(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].shape == (128, 256)


def test_gptq_and_tuning_go_on_where_rounding_to_nearest_stops(folder: Path, text_file: Path, tmp_path: Path) -> None:
    errors = dict[str, float]()
    for method in ("rtn", "gptq"):
        job = Quantize(scheme="q2_k", rounding=method, data=text_file, init="none", **QUICK)  # type: ignore[arg-type]
        report = quantize(folder, tmp_path / method, job, allow_damage=True)
        errors[method] = sum(layer["output_error"] for layer in report["layers"])
    assert errors["gptq"] < 0.7 * errors["rtn"]
    job = Quantize(scheme="q2_k", data=text_file, init="none", **QUICK | {"block_steps": 20, "tune_steps": 2})  # type: ignore[arg-type]
    report = quantize(folder, tmp_path / "tuned", job, allow_damage=True)
    assert any(block["kept"] and block["codes_changed"] > 0 for block in report["blocks"])
    first, last = (load_file(tmp_path / one / "model.safetensors") for one in ("gptq", "tuned"))
    name = "model.layers.0.mlp.down_proj.weight_blocks"
    assert first[name].shape == last[name].shape == (128, 84)


def test_what_has_no_blocks_is_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    odd = tiny.model_of(tiny.config_of("llama", **tiny.BY_128 | {"intermediate_size": 250}), dtype=torch.float32)
    wide = tiny.save(odd, tmp_path / "odd")
    with pytest.raises(BadInput, match=r"no block of llama.cpp's divides the input width 250 of 'model.layers.0.mlp.d"):
        quantize(wide, tmp_path / "out", Quantize(scheme="q4_k", data=text_file, length=32))
    with pytest.raises(BadInput, match="has its own"):
        Quantize(scheme="q4_k", group_size="64")
    quantize(folder, tmp_path / "out", Quantize(scheme="q6_k", rounding="rtn", data=text_file, **QUICK),  # type: ignore[arg-type]
             allow_damage=True)  # fmt: skip
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.mlp.down_proj.weight_blocks"][0, -2:] = 255
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"down_proj' does not fit together \(NaN\)"):
        load(tmp_path / "out")
