"""Which folders are said to run in vLLM, against the rules by which it picks a scheme.

It is not run: it installs with CUDA only. The rules are those of its compressed-tensors schemes as of mid-2026, written
out here over config.json alone.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from calib.quant.scheme import PRESETS, Scheme
from compressor.engine.load import plainly_loadable, serving_note
from compressor.storage.codecs import codec_of

QuantizationArgs = pytest.importorskip("compressed_tensors.quantization", reason="needs the extra").QuantizationArgs
MORE = [f"w{w}a{a}{g}{s}" for w, a, g, s in product((2, 4, 8), (4, 6, 8, 16), ("", "-g64"), ("", "-asym"))]
MORE += ["wnvfp4a16kv4", "wfp8afp8kv4", "w4afp8kv8-g128", "wfp8afp8kvfp8", "wfp8afp8kvfp8-tensor", "wnvfp4anvfp4kvfp8"]
MORE += ["w4a16kvfp8-asym", "w8a8kvfp8", "w4a4kvfp8", "w6a6kvfp8", "w4a16kvfp8-head-g64"]
_PICKED = {"nvfp4": "W4A16Fp4", "mxfp4": "W4A4Mxfp4"}  # by their numbers, whatever the format is called


def scheme_of_vllm(config: dict[str, Any]) -> str | None:
    """The name of the scheme that takes every group of `config`, or None where none does."""
    with suppress(ValidationError):
        for group in config["config_groups"].values():
            QuantizationArgs.model_validate(group["weights"])
        return _scheme_of_config(config)
    return None


def _scheme_of_config(config: dict[str, Any]) -> str | None:
    if not _keeps_cache(config["kv_cache_scheme"]):
        return None
    found = {_scheme_of_group(group, config) for group in config["config_groups"].values()}
    return found.pop() if len(found) == 1 else None


def _scheme_of_group(group: dict[str, Any], config: dict[str, Any]) -> str | None:
    weights, inputs = group["weights"], group["input_activations"]
    form = group.get("format") or config["format"]  # keys that it does not know it does not look at
    if weights["type"] == "float":
        return _scheme_of_microscaling(weights, inputs) or (
            _scheme_of_float8(weights, inputs) if form == "float-quantized" else None
        )
    if weights["type"] != "int" or weights["dynamic"] or weights["strategy"] not in ("group", "channel"):
        return None
    if inputs is None:
        bits = range(2, 9) if weights["symmetric"] else (4, 8)
        return "WNA16" if form == "pack-quantized" and weights["num_bits"] in bits else None
    if not inputs["dynamic"] or inputs["strategy"] != "token":
        return None
    if inputs["type"] == "float":
        four = (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)
        return "W4A8Fp8" if four and form == "pack-quantized" else None
    if form == "int-quantized":
        eight = weights["num_bits"] == inputs["num_bits"] == 8 and weights["strategy"] == "channel"
        return "W8A8Int8" if eight and weights["symmetric"] else None
    if form == "pack-quantized" and inputs["symmetric"] and inputs["num_bits"] in (4, 8) and weights["symmetric"]:
        return f"WNA{inputs['num_bits']}Int"
    return None


def _keeps_cache(args: dict[str, Any] | None) -> bool:
    """Whether keys and values can be kept so: in FP8, by scales that do not change."""
    if args is None:
        return True
    eight = (args["type"], args["num_bits"], args["symmetric"]) == ("float", 8, True)
    return eight and args["strategy"] in ("tensor", "attn_head")


def _scheme_of_microscaling(weights: dict[str, Any], inputs: dict[str, Any] | None) -> str | None:
    kind = (weights["num_bits"], weights["strategy"], weights["group_size"])
    if kind == (4, "tensor_group", 16):
        alike = inputs is None or all(inputs[key] == weights[key] for key in ("num_bits", "strategy", "group_size"))
        return ("W4A16Fp4" if inputs is None else "W4A4Fp4") if alike else None
    if kind == (4, "group", 32):
        return "W4A4Mxfp4"
    return "W8A8Mxfp8" if kind == (8, "group", 32) and weights["scale_dtype"] == "torch.uint8" else None


def _scheme_of_float8(weights: dict[str, Any], inputs: dict[str, Any] | None) -> str | None:
    if inputs is None:
        return "W8A16Fp8" if weights["strategy"] == "channel" else None
    pair = (weights["strategy"], inputs["strategy"], inputs["type"], inputs["dynamic"])
    served = (
        ("channel", "token", "float", True),
        ("block", "group", "float", True),
        ("tensor", "tensor", "float", False),
    )
    return "W8A8Fp8" if pair in served else None


@pytest.mark.parametrize("name", sorted({*PRESETS, *MORE}))
@pytest.mark.parametrize("online", [False, True])
def test_vllm_is_named_where_one_of_its_schemes_fits(name: str, online: bool) -> None:
    whole = Scheme.parse(name)
    if whole.table_name or whole.weights.is_block_type:
        pytest.skip("bitsandbytes or llama.cpp, not compressed-tensors")
    for bits in ({}, {"a": 4, "b": 8}, {"a": 3, "b": 4}) if not whole.weights.is_float else ({},):
        scheme = whole.with_bits(bits)
        plain = plainly_loadable(scheme, experts=False, elsewhere=True, hadamard_down=online)
        config = codec_of(scheme).config(scheme, plain=plain, dtype="bfloat16", ignore=["lm_head"])
        loaders = serving_note(scheme, online=online, experts=False)["loaders"]
        assert ("vLLM" in loaders) == (scheme_of_vllm(config) is not None), bits
        assert plain or loaders == ["parewell.load"]


def test_what_others_must_not_run_is_refused_by_the_library_s_own_class() -> None:
    """Which transformers, vLLM and SGLang read the arguments of weights with: vLLM would pick floating point by its
    numbers alone."""
    for name, online in (("wnvfp4a16kv4", False), ("wfp8afp8kv4", False), ("wmxfp4amxfp4kv8", False), ("wfp8a16", True),
                         ("w4afp8kv4-g128", False), ("w4a4kvfp8", True)):  # fmt: skip
        scheme = Scheme.parse(name)
        plain = plainly_loadable(scheme, experts=False, elsewhere=True, hadamard_down=online)
        config = codec_of(scheme).config(scheme, plain=plain, dtype="bfloat16", ignore=["lm_head"])
        for group in config["config_groups"].values():
            with pytest.raises(ValidationError, match="load_with_parewell_compressor_load"):
                QuantizationArgs.model_validate(group["weights"])
        assert serving_note(scheme, online=online, experts=False)["loaders"] == ["parewell.load"]
        assert scheme_of_vllm(config) is None and _scheme_of_group(config["config_groups"]["group_0"], config) == (
            _PICKED.get(scheme.weights.kind)
        )


def test_linears_that_share_bits_are_one_group_of_the_config() -> None:
    scheme = Scheme.parse("w4a16-channel").with_bits({"a": 4, "b": 8, "c": 4})
    config = codec_of(scheme).config(scheme, plain=True, dtype="", ignore=["lm_head"])
    groups = config["config_groups"].values()
    assert {g["weights"]["num_bits"]: g["targets"] for g in groups} == {4: ["a", "c"], 8: ["b"]}


def test_the_presets_and_their_schemes() -> None:
    def found(name: str) -> str | None:
        scheme = Scheme.parse(name)
        return scheme_of_vllm(codec_of(scheme).config(scheme, plain=True, dtype="bfloat16", ignore=["lm_head"]))

    assert {name: found(name) for name in PRESETS if name not in ("nf4", "fp4", "q4_k", "q4_k_m")} == {
        "w4a16": "WNA16",
        "w4a16-g64": "WNA16",
        "w4a16-g64-asym": "WNA16",
        "w4a16-channel": "WNA16",
        "w3a16": "WNA16",
        "wfp8afp8": "W8A8Fp8",
        "wfp8afp8-b128": "W8A8Fp8",
        "wfp8afp8-tensor": "W8A8Fp8",
        "wfp8a16": "W8A16Fp8",
        "w4afp8": "W4A8Fp8",
        "wnvfp4a16": "W4A16Fp4",
        "wnvfp4anvfp4": "W4A4Fp4",
        "wmxfp4a16": "W4A4Mxfp4",
        "wmxfp4amxfp4": "W4A4Mxfp4",
        "wmxfp8amxfp8": "W8A8Mxfp8",
        "w8a8": "W8A8Int8",
        "w4a8": "WNA8Int",
        "w4a16kvfp8": "WNA16",
        "w4a16kvfp8-head": "WNA16",
        "w4a4": "WNA4Int",
        "w4a4kv4": "WNA4Int",
        "w4a4kv4-asym": None,
    }
