"""A tied embedding stays one table where a second would cost more than it is worth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calib import BadInput
from compressor import Quantize, quantize
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.job import validate_quantization
from tests import tiny

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
QUICK = Quantize(samples=2, held_out=1, length=16, learn=False, rounding="rtn", scheme="w4a16-g32")
TABLE = 61 * 32 * 4  # bytes of the embedding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.model_of(tiny.config_of("llama", **SIZES), dtype=torch.float32)
    return tiny.save(model, tmp_path_factory.mktemp("tied") / "model")


def stored(out: Path) -> int:
    """Bytes of all tensors, as the library of the format reads them."""
    return sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())


def test_a_table_that_weighs_is_kept_one_unless_asked_for(folder: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, more in {
        "none": {"init": "none"},
        "default": {},
        "rotated": {"init": "hadamard"},
        "untied": {"tied": "untie"},
        "tied": {"tied": "keep"},
        "hadamard": {"tied": "keep", "init": "hadamard"},
    }.items():
        report = quantize(folder, tmp_path / name, replace(QUICK, data=text_file, **more))
        sizes[name] = stored(tmp_path / name)
        assert report["untied"] == (name == "untied")
        assert report["untied_bytes"] == (TABLE if name == "untied" else 0)
        assert ("residual_rotation" in report["left_out"]) == (name in ("rotated", "hadamard"))
        assert report["bytes"]["after"] == sizes[name] == sum(report["parts"].values())
    assert len({sizes[name] for name in sizes if name != "untied"}) == 1
    assert sizes["untied"] - TABLE == sizes["none"]
    rotated = replace(QUICK, data=text_file, init="hadamard")
    said = quantize(folder, tmp_path / "rotated", rotated)["left_out"]["residual_rotation"]
    assert f"7,808 bytes ({TABLE / sizes['none']:.0%} of the output); --tied untie rotates all the same" in said


def test_where_activations_are_quantized_it_is_rotated_and_light_tables_of_weights_alone_only_where_asked_for(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    report = quantize(folder, tmp_path / "out", replace(QUICK, data=text_file, scheme="w4a8-g32", online=False))
    assert report["untied"] and report["left_out"] == {}
    deep = tiny.model_of(tiny.config_of("llama", **{**SIZES, "intermediate_size": 1024}), dtype=torch.float32)
    deep_folder, rotated = tiny.save(deep, tmp_path / "deep"), replace(QUICK, data=text_file, init="hadamard")
    for tied in ("auto", "light"):
        report = quantize(deep_folder, tmp_path / tied, replace(rotated, tied=tied))
        assert report["untied"] == (tied == "light")
    assert TABLE / (stored(tmp_path / "light") - TABLE) < 0.1
    heavy = quantize(folder, tmp_path / "heavy", replace(rotated, tied="light"))
    assert not heavy["untied"]


def test_the_rest_is_transformed_all_the_same(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The function stays, other weights change, and the table is the model's own to the last bit."""
    options = replace(QUICK, data=text_file, rounding="none", tied="keep")
    quantize(folder, tmp_path / "out", options)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (before[name] - after[name]).abs().max() > 0.1
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f)(input_ids=ids).logits for f in (folder, tmp_path / "out"))
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_a_plan_says_it_before(folder: Path, text_file: Path, tmp_path: Path) -> None:
    for tied, left_out in (("auto", True), ("untie", False)):
        options = replace(QUICK, data=text_file, init="hadamard", tied=tied)
        cost = estimate_quantization(folder, tmp_path / "out", options)
        quantize(folder, tmp_path / "out", options)
        assert cost.out_bytes == stored(tmp_path / "out")
        assert cost.untied_bytes == (0 if left_out else TABLE)
        assert (cost.rotation_left_out is not None) == left_out


def test_two_tables_are_as_untied_as_one_could_ask(text_file: Path, tmp_path: Path) -> None:
    config = tiny.config_of("llama", **SIZES, tie_word_embeddings=False)
    two = tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / "two")
    for name, tied in (("asked", "untie"), ("plain", "auto")):
        quantize(two, tmp_path / name, replace(QUICK, data=text_file, init="hadamard", tied=tied))
    asked, plain = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("asked", "plain"))
    assert asked == plain


def test_the_published_recipe_rotates_the_residual_stream_whatever_that_costs(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    small = {"data": text_file, "samples": 4, "held_out": 2, "length": 32}
    for scheme in ("w4a16-channel", "w4a4-channel"):
        job = validate_quantization(folder, tmp_path / "out", Quantize.preset("ostquant", scheme=scheme, **small))
        assert job.rotation_left_out is None
    plain = Quantize.preset("ostquant", scheme="w4a16-channel", tied="keep", **small)
    assert validate_quantization(folder, tmp_path / "out", plain).rotation_left_out is not None


def test_what_decides_nothing_is_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    two = tiny.save(
        tiny.model_of(tiny.config_of("llama", **SIZES, tie_word_embeddings=False), dtype=torch.float32),
        tmp_path / "two",
    )
    gemma = tiny.save(tiny.model_of(tiny.config_of("gemma2", **SIZES), dtype=torch.float32), tmp_path / "gemma")
    for model, tied, why in ((two, "keep", "embedding and head are not one table"),
                             (gemma, "untie", "the residual stream is not rotated, as a norm")):  # fmt: skip
        with pytest.raises(BadInput, match=why):
            quantize(model, tmp_path / "out", replace(QUICK, data=text_file, tied=tied))
    with pytest.raises(BadInput, match="leave out --tied untie"):
        replace(QUICK, init="none", tied="untie")
    assert not (tmp_path / "out").exists()
