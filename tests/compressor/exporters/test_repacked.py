"""GPTQ, AWQ and MLX: each layout, read bit by bit as it is documented, holds the numbers that `quantize` chose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.model.checkpoint import find_model
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor import Evaluate, Export, Quantize, evaluate, export, load, quantize
from compressor.engine.load import open_checkpoint
from compressor.exporters import awq_layout, gptq_layout, mlx
from compressor.exporters.format import ExportJob
from compressor.storage.quantized_linear import Rounded
from tests import any_type, tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PROPERTY = settings(max_examples=20, deadline=None, phases=[Phase.generate])  # nothing is simpler than another seed
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word, from its lowest, in which each of eight outputs lies


# The layouts, read as they are documented: one number after the other.


def stream_of(words: list[int]) -> int:
    """32-bit words as one long integer, the first in its lowest bits."""
    return sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))


def numbers(words: list[int], bits: int) -> list[int]:
    """All unsigned numbers of so many bits in a stream."""
    stream = stream_of(words)
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(32 * len(words) // bits)]


def read_gptq(stored: dict[str, Tensor], name: str, bits: int, stored_less: int) -> Tensor:
    """(out, in): of each output the codes lie below each other, of each group the zero points beside each other."""
    codes = [numbers(column.tolist(), bits) for column in stored[f"{name}.qweight"].mT]
    zeros = [numbers(row.tolist(), bits) for row in stored[f"{name}.qzeros"]]
    scale, group = stored[f"{name}.scales"].float(), stored[f"{name}.g_idx"].tolist()
    return torch.tensor(
        [[(q - zeros[g][o] - stored_less) * float(scale[g, o]) for q, g in zip(row, group, strict=True)]
         for o, row in enumerate(codes)]
    )  # fmt: skip


def awq_row(words: list[int]) -> list[int]:
    return [(word >> (4 * place)) & 15 for word in words for place in AWQ_PLACES]


def read_awq(stored: dict[str, Tensor], name: str) -> Tensor:
    codes = torch.tensor([awq_row(row.tolist()) for row in stored[f"{name}.qweight"]])  # (in, out)
    zeros = torch.tensor([awq_row(row.tolist()) for row in stored[f"{name}.qzeros"]])  # (groups, out)
    repeats = len(codes) // len(zeros)
    return ((codes - zeros.repeat_interleave(repeats, 0)) *
            stored[f"{name}.scales"].float().repeat_interleave(repeats, 0)).mT  # fmt: skip


def read_mlx(stored: dict[str, Tensor], name: str, bits: int) -> Tensor:
    codes = torch.tensor([numbers(row, bits) for row in stored[f"{name}.weight"].view(torch.int32).tolist()])
    scale, bias = stored[f"{name}.scales"].float(), stored[f"{name}.biases"].float()
    group = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(group, 1) + bias.repeat_interleave(group, 1)


@st.composite
def rounded_linears(draw: st.DrawFn, bits: tuple[int, ...], groups: tuple[int | None, ...], dtype: torch.dtype) -> Any:
    """Codes over the whole grid; scales of half precision, over a range that it and its multiples hold."""
    grid = Grid(draw(st.sampled_from(bits)), draw(st.booleans()), draw(st.sampled_from(groups)))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out, width = 32 * draw(st.integers(1, 2)), 256
    codes = torch.randint(grid.low, grid.high + 1, (out, width), generator=seeded).to(torch.int8)
    scale = (torch.rand(out, grid.groups(width), generator=seeded) + 0.01).to(dtype)
    zero = torch.zeros(scale.shape)
    if not grid.symmetric:
        zero = torch.randint(grid.low, grid.high + 1, scale.shape, generator=seeded).float()
        zero[0] = grid.low  # of a group without negative weights
    return Rounded(codes, scale, zero, grid)


def job_of(to: str, dtype: torch.dtype = torch.float16) -> ExportJob:
    return ExportJob(Path(), None, dtype, to)  # type: ignore[arg-type]


@PROPERTY
@given(rounded_linears((2, 3, 4, 8), (None, 32, 128), torch.float16))
def test_gptq_holds_the_weights(rounded: Rounded) -> None:
    stored = gptq_layout._layout(job_of("gptq"), "l", rounded)
    bits, stored_less = rounded.grid.bits, 1 if rounded.grid.symmetric else 0
    assert torch.equal(read_gptq(stored, "l", bits, stored_less), rounded.weight())
    assert [(t.dtype, t.shape[0]) for t in stored.values()] == [
        (torch.int32, 8 * bits), (torch.int32, rounded.scale.shape[1]), (torch.float16, rounded.scale.shape[1]),
        (torch.int32, 256),
    ]  # fmt: skip
    if rounded.grid.symmetric:  # the words that readers of version 1 know
        words = {2: (0x55555555,), 3: (0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D), 4: (0x77777777,), 8: (0x7F7F7F7F,)}
        assert {w & 0xFFFFFFFF for w in stored["l.qzeros"].flatten().tolist()} == set(words[bits])


@PROPERTY
@given(rounded_linears((4,), (32, 128), torch.bfloat16))
def test_awq_holds_the_weights(rounded: Rounded) -> None:
    stored = awq_layout._layout(job_of("awq"), "l", rounded)
    assert torch.equal(read_awq(stored, "l"), rounded.weight())
    if rounded.grid.symmetric:
        assert {word & 0xFFFFFFFF for word in stored["l.qzeros"].flatten().tolist()} == {0x88888888}


@PROPERTY
@given(rounded_linears((2, 3, 4, 5, 6, 8), (None, 32, 64, 256), torch.bfloat16))
def test_mlx_holds_the_weights(rounded: Rounded) -> None:
    dtype = torch.bfloat16 if rounded.grid.symmetric else torch.float32
    stored = mlx._layout(job_of("mlx", dtype), "l", rounded)
    assert torch.equal(read_mlx(stored, "l", rounded.grid.bits), rounded.weight())
    assert {stored["l.scales"].dtype, stored["l.biases"].dtype} == {dtype}
    assert 256 // stored["l.scales"].shape[1] == min(rounded.grid.group or 128, 128)


@PROPERTY
@given(rounded_linears((2, 3, 4, 5, 6, 8), (None, 32, 64, 128), torch.float16))
def test_mlx_itself_reads_the_weights(rounded: Rounded) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    grid = rounded.grid
    stored = mlx._layout(job_of("mlx", torch.float16 if grid.symmetric else torch.float32), "l", rounded)
    given_ = (mx.array(t.float().numpy() if t.is_floating_point() else t.numpy()) for t in stored.values())
    read = mx.dequantize(*given_, group_size=mlx.group_of(grid, 256), bits=grid.bits)
    assert torch.equal(torch.from_numpy(np.array(read)), rounded.weight())


def test_scales_that_half_precision_does_not_hold() -> None:
    job, scale = job_of("gptq"), torch.tensor([[0.1, 1e-9]])
    rounded = Rounded(torch.zeros(1, 64, dtype=torch.int8), scale, torch.zeros(1, 2), Grid(4, True, 32))
    stored = gptq_layout._layout(job, "l", rounded)["l.scales"]
    assert stored.flatten().tolist() == [float(torch.tensor(0.1).half()), 0.0]  # next to the other it is nothing
    gptq_layout._layout(job, "m", rounded)
    (note,) = job.notes
    assert note == "scales are float32 in what was exported and rounded to float16 here; codes are as they were"
    for all_of in (1e6, 1e-7):
        with pytest.raises(BadInput, match=r"scales of 'l' go from .* which float16 cannot hold"):
            gptq_layout._layout(
                job, "l", Rounded(rounded.codes, torch.full((1, 2), all_of), rounded.zero, rounded.grid)
            )
    exact = job_of("gptq")
    gptq_layout._layout(
        exact, "l", Rounded(rounded.codes, torch.tensor([[0.1, 3.0]]).bfloat16(), rounded.zero, rounded.grid)
    )
    assert exact.notes == []


# Whole folders.


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-precision models, and rows for them."""
    root = tmp_path_factory.mktemp("repacked")
    ids = torch.randint(3, 30, (8, 16), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, root / "ids.safetensors")
    for name, more in {"tied": {}, "untied": {"tie_word_embeddings": False}}.items():
        config = tiny.config_of("llama", **WIDE, rope_parameters={"rope_type": "default", "rope_theta": 777.0}, **more)
        tiny.save(tiny.model_of(config, dtype=torch.float16), root / name)
    return root


def quantized(root: Path, model: str | Path, out: Path, scheme: str, **more: Any) -> Path:
    options = {"samples": 2, "held_out": 2, "length": 16, "learn": False, "rounding": "rtn"} | more
    quantize(root / model, out, Quantize(scheme=scheme, data=root / "ids.safetensors", **options), allow_damage=True)
    return out


def stored_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder, torch.device("cpu"))
    return {linear.name: checkpoint.rounded(linear).weight() for linear in checkpoint.linears()}


def bits_of(stored: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """Bits per weight of the linears, counted."""
    held = sum(
        t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in weights and not name.endswith("bias")
    )
    return 8 * held / sum(w.numel() for w in weights.values())


@pytest.mark.parametrize(("model", "scheme"), [("tied", "w3a16-g32"), ("untied", "w4a16-channel-asym")])
def test_gptq_folders(model: str, scheme: str, root: Path, tmp_path: Path) -> None:
    out = quantized(root, model, tmp_path / "out", scheme)
    options, weights, asym = Export(to="gptq"), weights_of(out), scheme.endswith("asym")
    report = export(out, tmp_path / "dst", options)
    config = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    told = {"quant_method": "gptq", "bits": int(scheme[1]), "group_size": -1 if asym else 32, "desc_act": False,
            "sym": not asym, "checkpoint_format": "gptq_v2" if asym else "gptq", "dynamic": {}, "lm_head": False,
            "pack_dtype": "int32"}  # fmt: skip
    assert config.items() >= told.items()
    assert json.loads((tmp_path / "dst/quantize_config.json").read_text()) == config
    stored = stored_in(tmp_path / "dst")
    for name, weight in weights.items():
        assert torch.equal(read_gptq(stored, name, int(scheme[1]), 0 if asym else 1), weight), name
    assert ("lm_head.weight" in stored) is (model == "untied") and "model.embed_tokens.weight" in stored
    floats = {name for name, t in stored.items() if t.is_floating_point() and not name.endswith("scales")}
    assert all(torch.equal(stored[name], stored_in(out)[name]) for name in floats)
    assert bits_of(stored, weights) == pytest.approx(report["bits_per_weight"], rel=1e-12)
    assert report["not_run"] == "nothing here runs this format" and report["loaders"]["notes"] == []
    assert "vLLM" not in report["loaders"]["loaders"]
    export(out, tmp_path / "dst", options)  # all that is there is ours, and may be replaced


def test_awq_folders(root: Path, tmp_path: Path) -> None:
    out = quantized(root, "untied", tmp_path / "out", "w4a16-g32-asym")
    report, weights = export(out, tmp_path / "dst", Export(to="awq", held_out=0)), weights_of(out)
    config = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
                      "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    stored = stored_in(tmp_path / "dst")
    assert all(torch.equal(read_awq(stored, name), weight) for name, weight in weights.items())
    assert bits_of(stored, weights) == pytest.approx(report["bits_per_weight"], rel=1e-12)
    assert "vLLM" in report["loaders"]["loaders"]


@pytest.mark.parametrize(
    ("model", "scheme", "dtype"),
    [("tied", "w4a16-channel", None), ("untied", "w5a16-g64", None), ("tied", "w2a16-g32-asym", "float32")],
)
def test_mlx_folders(model: str, scheme: str, dtype: str | None, root: Path, tmp_path: Path) -> None:
    out = quantized(root, model, tmp_path / "out", scheme)
    rows = {"data": root / "ids.safetensors", "length": 16}
    report, weights = export(out, tmp_path / "dst", Export(to="mlx", dtype=dtype, **rows)), weights_of(out)
    config, bits = json.loads((tmp_path / "dst/config.json").read_text()), int(scheme[1])
    down = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]  # of 128 inputs, the others of 64
    asked = {"group_size": 32 if "g32" in scheme else 64, "bits": bits, "mode": "affine", "model.embed_tokens": False}
    asked |= {"lm_head": False} if model == "untied" else {}
    asked |= {name: {"group_size": 128, "bits": bits} for name in down if scheme == "w4a16-channel"}
    assert config["quantization"] == config["quantization_config"] == asked
    assert config["rope_theta"] == 777.0  # where mlx-lm looks
    stored = stored_in(tmp_path / "dst")
    assert all(torch.equal(read_mlx(stored, name, bits), weight) for name, weight in weights.items())
    assert ("lm_head.weight" in stored) is (model == "untied")
    assert bits_of(stored, weights) == pytest.approx(report["bits_per_weight"], rel=1e-12)
    card = (tmp_path / "dst/README.md").read_text()
    assert "library_name: mlx" in card
    if "not_run" in report:
        assert report["not_run"] == "mlx is not installed"
        pytest.skip("needs mlx and mlx-lm to be run")
    assert report["runtime"].startswith("mlx ") and abs(report["quality"]["kl"]) < 1e-6


def test_bits_that_differ(root: Path, tmp_path: Path) -> None:
    options = {"target_bits": 6.0, "candidate_bits": "4,8", "profile_rows": 1}
    out = quantized(root, "tied", tmp_path / "out", "w4a16-g32", **options)
    bits, weights = Scheme.read(json.loads((out / "parewell.json").read_text())["recipe"][-1]).bits, weights_of(out)
    assert set(bits.values()) == {4, 8}
    report = export(out, tmp_path / "gptq", Export(to="gptq", held_out=0))
    assert report["loaders"]["loaders"] == ["GPTQModel"] and "same bits" in report["loaders"]["notes"][0]
    stored, config = stored_in(tmp_path / "gptq"), json.loads((tmp_path / "gptq/quantize_config.json").read_text())
    for name, weight in weights.items():
        others = [how for rule, how in config["dynamic"].items() if re.match(rule.removeprefix("+:"), name)]
        told = (others or [config])[0]["bits"]
        assert told == bits[name] and len(others) <= 1
        assert torch.equal(read_gptq(stored, name, told, 1), weight)
    assert bits_of(stored, weights) == pytest.approx(report["bits_per_weight"], rel=1e-12)
    report = export(out, tmp_path / "mlx", Export(to="mlx", data=root / "ids.safetensors", length=16))
    stored, config = stored_in(tmp_path / "mlx"), json.loads((tmp_path / "mlx/config.json").read_text())["quantization"]
    for name, weight in weights.items():
        assert config.get(name, config)["bits"] == bits[name]
        assert torch.equal(read_mlx(stored, name, bits[name]), weight)
    assert "not_run" in report or abs(report["quality"]["kl"]) < 1e-6


@pytest.mark.parametrize("to", ["gptq", "awq", "mlx"])
def test_such_folders_are_not_read_here(to: str, root: Path, tmp_path: Path) -> None:
    """With what parewell wrote beside the weights and without: nothing is taken for floats, or for another's codes."""
    out = quantized(root, "tied", tmp_path / "out", "w4a16-g32")
    export(out, tmp_path / "dst", Export(to=to, held_out=0))
    rows = Evaluate(data=root / "ids.safetensors", length=16, rows=2)
    for read in (load, lambda folder: evaluate(folder, rows)):
        with pytest.raises(BadInput, match="was exported to a format that is not read here; load it with the runtime"):
            read(tmp_path / "dst")
    method = "unknown" if to == "mlx" else to
    with pytest.raises(BadInput, match=rf"is quantized already \({method}\)"):
        quantized(root, tmp_path / "dst", tmp_path / "again", "w8a16-g32")
    with pytest.raises(BadInput, match=rf"quantized by ({to}|None), of which the library makes no floats"):
        find_model(tmp_path / "dst", dequantize=True)
    (tmp_path / "dst/parewell.json").unlink()
    with pytest.raises(BadInput, match=rf"is quantized already \({method}\), by another tool"):
        load(tmp_path / "dst")


# What they cannot say.


@pytest.mark.parametrize(
    ("to", "scheme", "options", "what"),
    [
        ("gptq", "w5a16-g32", {}, "holds codes of 2, 3, 4, 8 bits, and here are some of 5"),
        ("gptq", "w4a16-g8", {}, "no reader knows groups of 8; quantize with -g16"),
        ("awq", "w3a16-g32", {}, "holds codes of 4 bits, and here are some of 3; .* such as w4a16-g128"),
        ("awq", "w4a16-channel", {}, "not one scale per output channel"),
        ("awq", "w4a16-g8", {}, "not groups of 8"),
        ("mlx", "w7a16-g32", {}, "holds codes of 2, 3, 4, 5, 6, 8 bits, and here are some of 7"),
        ("mlx", "w4a16-g16", {}, "which groups of 16 .* are not made of; quantize with -g32"),
        ("mlx", "w4a16-g32-asym", {}, "which float16 would round; add --dtype float32"),
    ],
)
def test_schemes(to: str, scheme: str, options: dict[str, Any], what: str, root: Path, tmp_path: Path) -> None:
    out = quantized(root, "tied", tmp_path / "out", scheme)
    with pytest.raises(BadInput, match=f"^to {to}: .*{what}"):
        export(out, tmp_path / "dst", Export(to=to, held_out=0, **options))
    assert not (tmp_path / "dst").exists()


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "more", "to", "what"),
    [
        ("gpt2", {}, "gptq", r"weights that the library keeps as \(in, out\)"),
        ("mixtral", {}, "awq", "readers name and stack the experts of mixtral"),
        ("mixtral", {}, "mlx", "readers name and stack the experts of mixtral"),
        ("opt", {}, "mlx", "opt has not been tried with mlx-lm, only cohere, "),
        ("mistral", {"sliding_window": 8}, "mlx",
         "has a sliding window, which mlx-lm drops or reads otherwise for mistral"),
        ("llama", {"hidden_act": "gelu"}, "mlx", "has another activation than most of its type"),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "mlx",
         "has rope type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "mlx",
         "has rope type 'dynamic'"),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}, "mlx",
         "has windows in blocks at uneven distances"),
        ("llama", {"num_key_value_heads": 1, "head_dim": 4, "num_attention_heads": 16}, "awq",
         "has 4 outputs, and words hold 8"),
        ("llama", {"intermediate_size": 100}, "gptq", "has 100 inputs and 64 outputs, and 8 codes of 4"),
    ],
)  # fmt: skip
def test_models(model_type: str, more: dict[str, Any], to: str, what: str, root: Path, tmp_path: Path) -> None:
    config = any_type.config_of(model_type)
    config = type(config).from_dict(config.to_dict() | more)
    model = any_type.drawn_anew(AutoModelForCausalLM.from_config(config).eval())
    scheme = "w4a16-channel" if to == "gptq" else "w4a16-g32"
    out = quantized(root, saved(model, tmp_path / "model"), tmp_path / "out", scheme)
    with pytest.raises(BadInput, match=f"^to {to}: .*{what}"):
        export(out, tmp_path / "dst", Export(to=to, held_out=0))
    assert not (tmp_path / "dst").exists()


# mlx-lm itself.


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("phi3", {"sliding_window": None}),
        ("olmo2", {}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 777.0, "factor": 8.0, "low_freq_factor": 1,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    ],
)  # fmt: skip
def test_mlx_lm_answers_alike(model_type: str, more: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """Settings that are not mlx-lm's defaults, rows longer than the window."""
    pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")
    config = any_type.config_of(model_type)
    config = type(config).from_dict(config.to_dict() | more)
    ropes = config.rope_parameters.values() if "full_attention" in config.rope_parameters else [config.rope_parameters]
    for number, rope in enumerate(ropes):
        rope["rope_theta"] = 777.0 + number
    config.rms_norm_eps = 3e-3
    model = any_type.drawn_anew(AutoModelForCausalLM.from_config(config).eval())
    out = quantized(root, saved(model, tmp_path / "model"), tmp_path / "out", "w4a16-g32")
    report = export(out, tmp_path / "dst", Export(to="mlx", data=root / "ids.safetensors", length=16))
    assert abs(report["quality"]["kl"]) < 1e-6
