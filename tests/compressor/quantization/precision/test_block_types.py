"""Block types by tensor: llama.cpp's mixtures, mean bits that are allocated, and importance of columns from a file."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.jobs.recipe import read_recipe
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.quant.block_types import BLOCK_TYPES, fitting
from calib.quant.kquants import fit_blocks
from compressor import Quantize, load, quantize
from compressor.quantization.job import validate_quantization
from compressor.quantization.precision.importance import read_importance
from compressor.quantization.precision.mixed_precision import LayerGroup, allocate_bits, least_and_most, mean_bits
from compressor.quantization.precision.mixtures import mixed_model, types_in_mixture
from compressor.storage.gguf_architectures import GGUF_ARCHITECTURES
from compressor.storage.gguf_blocks import unpack_blocks
from tests import any_type
from tests.compressor.exporters.test_gguf import exported, far, folder_of, logits, quantized

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def stream_of(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))


def quick(model: Path, **more: Any) -> Quantize:
    """Options of a job that learns nothing, on rows of its own beside the model."""
    rows = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": rows}, model.parent / "ids.safetensors")
    fixed = {"data": model.parent / "ids.safetensors", "samples": 4, "held_out": 2, "length": 16, "learn": False}
    return Quantize(**fixed | more)  # type: ignore[arg-type]


def types_of(folder: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}


# Mixtures.


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixture_is_stored_as_llama_cpp_stores_it(tied: bool, tmp_path: Path) -> None:
    """Of 8 blocks numbers 0, 3, 6 and 7 have more bits; 256 divides rows of ffn_down alone."""
    model = folder_of(
        tmp_path / "model", "llama", torch.float16, **SMALL, num_hidden_layers=8, tie_word_embeddings=tied
    )
    out = quantized(model, tmp_path / "out", "Q4_K_M", rounding="rtn")
    exported(out, tmp_path / "dst", dtype="float32")
    found = types_of(tmp_path / "dst")
    more = (0, 3, 6, 7)
    for i in range(8):
        own = {part: found[f"blk.{i}.{part}.weight"] for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
        assert own == dict.fromkeys(own, "Q5_0") | ({"attn_v": "Q8_0"} if i in more else {})
        assert found[f"blk.{i}.ffn_down.weight"] == ("Q6_K" if i in more else "Q4_K")
        assert {found[f"blk.{i}.ffn_{part}.weight"] for part in ("gate", "up")} == {"Q5_0"}
    assert found["token_embd.weight"] == ("Q8_0" if tied else "Q5_0")
    assert found.get("output.weight") == (None if tied else "Q8_0")
    header = gguf.GGUFReader(tmp_path / "dst" / "model.gguf").fields
    assert header["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert read_recipe(out)[-1]["scheme"] == "q4_k_m"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", gguf_file="model.gguf", dtype=torch.float32).eval()
    assert far(logits(dense), logits(load(out))) < 1e-4


def test_embedding_and_head_may_be_chosen_in_a_mixture(tmp_path: Path) -> None:
    model = folder_of(
        tmp_path / "model", "llama", torch.float16, **SMALL, num_hidden_layers=1, tie_word_embeddings=True
    )

    def tables(**more: Any) -> tuple[str | None, str | None]:
        options = quick(model, **{"scheme": "q5_k_s", "rounding": "rtn"} | more)
        scheme = validate_quantization(model, tmp_path / "out", options).scheme
        return tuple(None if one is None else one[1].kind for one in (scheme.embedding, scheme.head))  # type: ignore

    assert tables() == ("q8_0", None)
    assert tables(embedding="q4_0") == ("q4_0", None)
    assert tables(embedding="none") == (None, None)
    assert tables(lm_head="q5_1") == ("q5_1", "q5_1"), "two tables, of which the embedding has the type of most"
    assert tables(scheme="q5_k") == (None, None)


@pytest.mark.parametrize("model_type", sorted(GGUF_ARCHITECTURES))
def test_every_architecture_of_gguf_has_mixtures(model_type: str, tmp_path: Path) -> None:
    """Whatever its linears are called: those that give values, and the last of feed-forward blocks, get more bits."""
    stream = stream_of(folder_of(tmp_path / "model", model_type))
    kinds, embedding, head = types_in_mixture("q4_k_m", stream, "auto", "auto", untied=False)
    assert kinds.keys() == {one.name for i in range(stream.layers) for one in stream.linears(i)}
    more = [name for name, kind in kinds.items() if kind != "q4_k"]
    assert any("mlp" in name or "w2" in name or "down" in name for name in more)
    assert any("v_proj" in name or "qkv" in name or "c_attn" in name for name in more)
    assert (embedding, head) == (("q6_k", "none") if stream.tied else ("q4_k", "q6_k"))


def test_what_llama_cpp_takes_for_a_70b() -> None:
    for kind, layers, kv, wanted in (
        ("llama", 80, 8, True), ("llama", 80, 64, False), ("llama", 79, 8, False), ("qwen2", 80, 64, True),
        ("qwen3", 80, 8, False),
    ):  # fmt: skip
        heads = {"num_attention_heads": 64, "num_key_value_heads": kv, "hidden_size": 8192}
        config = AutoConfig.for_model(kind, num_hidden_layers=layers, **heads)
        stream: Any = type("Stream", (), {"config": config, "layers": layers})()
        assert mixed_model(stream, own_head=True).is_70b == wanted, (kind, layers, kv)


# Mean bits.


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([256, 64])), min_size=1, max_size=4), st.data())
def test_no_other_types_within_the_budget_lose_less(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    kinds = ("q3_k", "q4_k", "q6_k")
    groups = list[LayerGroup]()
    for n, (rows, width) in enumerate(parts):
        kl = dict(zip(kinds, data.draw(st.lists(st.floats(0, 10), min_size=3, max_size=3)), strict=True))
        types = {kind: fitting(kind, width) or "" for kind in kinds}
        groups.append(LayerGroup((str(n),), rows * width, kl, {}, types))  # type: ignore[arg-type]
    least, most = least_and_most(groups)
    target = data.draw(st.floats(least, most))

    def bits(choice: Any) -> float:
        real = [BLOCK_TYPES[fitting(kind, width) or ""] for kind, (_, width) in zip(choice, parts, strict=True)]
        spent = sum(8 * kind.bytes / kind.weights * g.weights for kind, g in zip(real, groups, strict=True))
        return spent / sum(group.weights for group in groups)

    def loss(choice: Any) -> float:
        return sum(group.kl[kind] for group, kind in zip(groups, choice, strict=True))

    found = allocate_bits(groups, target)
    assert mean_bits(groups, found) == pytest.approx(bits(found))
    assert bits(found) <= target + 1e-6
    allowed = [choice for choice in product(kinds, repeat=len(parts)) if bits(choice) <= target]
    assert loss(found) <= min(map(loss, allowed)) + 1e-5 * max(max(group.kl.values()) for group in groups)


def test_mean_bits_of_block_types(tmp_path: Path) -> None:
    """A type for every linear, of which recipe, report and GGUF file say the same; twice the same bytes."""
    model = folder_of(tmp_path / "model", "llama", torch.float16, **SMALL, num_hidden_layers=2)
    how = {"target_bits": 5.2, "profile_rows": 1, "rounding": "rtn"}
    out, again = (quantized(model, tmp_path / name, "q4_k", **how) for name in ("out", "again"))
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    report, kinds = json.loads((out / "report.json").read_text()), read_recipe(out)[-1]["bits"]
    shapes = {name.removesuffix(".weight"): t.shape for name, t in load_file(model / "model.safetensors").items()}
    spent = sum(shapes[name].numel() * BLOCK_TYPES[kind].bits_per_weight for name, kind in kinds.items())
    mean = spent / sum(shapes[name].numel() for name in kinds)
    assert report["precision"]["mean_bits"] == pytest.approx(mean) and 4.9 < mean <= 5.2
    groups = report["precision"]["parts"]
    assert {group["linears"][0]: group["type"] for group in groups} == kinds
    assert all(group["type"] == fitting(group["bits"], shapes[group["linears"][0]][1]) for group in groups)
    assert len({*kinds.values()}) > 2
    exported(out, tmp_path / "dst", dtype="float32")
    found = types_of(tmp_path / "dst")
    for i in range(2):
        for ours, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
            assert found[f"blk.{i}.{theirs}.weight"] == kinds[f"model.layers.{i}.{ours}"].upper()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", gguf_file="model.gguf", dtype=torch.float32).eval()
    assert far(logits(dense), logits(load(out))) < 1e-4
    page = (out / "report.html").read_text()
    assert "Each linear has a block type of its" in page and "scales included" in page


# Importance.


def test_an_imatrix_has_the_squared_inputs_of_the_float_model(tmp_path: Path) -> None:
    """By hooks in the library's own model; and of linears that are ignored as well."""
    model = folder_of(tmp_path / "model", "llama", torch.float32, **SMALL, num_hidden_layers=2)
    file = tmp_path / "imatrix.gguf"
    quantized(model, tmp_path / "out", "w4a16-g16", imatrix_out=file, rounding="rtn", ignore=("re:.*k_proj$",))
    found = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(file).tensors}
    dense, sums = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), dict[str, torch.Tensor]()
    names = {"self_attn.k_proj": "attn_k", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    for i in range(2):
        for ours, theirs in names.items():

            def see(_: Any, args: Any, name: str = f"blk.{i}.{theirs}.weight") -> None:
                sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

            dense.get_submodule(f"model.layers.{i}.{ours}").register_forward_pre_hook(see)
    rows = validate_quantization(model, tmp_path / "other", quick(model, scheme="w4a16-g16")).rows.calibration.ids
    with torch.no_grad():
        dense(input_ids=rows)
    for name, wanted in sums.items():
        assert torch.allclose(found[f"{name}.in_sum2"][0], wanted, rtol=1e-4), name
        assert float(found[f"{name}.counts"]) == rows.numel() == 64


def test_scales_go_by_an_imatrix(tmp_path: Path) -> None:
    """Rounded to nearest they are those that the search finds with its importance, and not those without."""
    model = folder_of(tmp_path / "model", "llama", torch.float32, **SMALL, num_hidden_layers=1)
    file = tmp_path / "imatrix.gguf"
    quantized(model, tmp_path / "first", "q4_k_m", rounding="rtn", imatrix_out=file)
    out = quantized(model, tmp_path / "out", "q3_k", rounding="rtn", imatrix=file)
    name = "model.layers.0.mlp.down_proj"
    mean = read_importance(file, stream_of(model))[name]
    weight = load_file(model / "model.safetensors")[f"{name}.weight"]
    made = unpack_blocks(load_file(out / "model.safetensors")[f"{name}.weight_blocks"], "q3_k")
    grid = BLOCK_TYPES["q3_k"].grid
    wanted, plain = (fit_blocks(weight, grid, one)[0] for one in (mean + 0.01 * mean.mean(), None))
    assert torch.equal(made.scale, wanted) and not torch.equal(made.scale, plain)
    report = json.loads((out / "report.json").read_text())
    assert report["quality_by_stage"]["nearest"]["kl"] != report["quality"]["kl"], "without importance"
    assert len(read_recipe(out)[-1]["imatrix"]) == 64


def refused(model: Path, out: Path, **options: Any) -> str:
    with pytest.raises(BadInput) as error:
        quantize(model, out, quick(model, **options))
    assert not out.exists() and "\n" not in str(error.value)
    return str(error.value)


def test_refusals(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "imatrix.gguf"
    model = folder_of(tmp_path / "model", "llama", torch.float32, **SMALL, num_hidden_layers=1)
    wider = folder_of(tmp_path / "wider", "llama", torch.float32, **SMALL | {"hidden_size": 64, "num_hidden_layers": 1})
    deeper = folder_of(tmp_path / "deeper", "llama", torch.float32, **SMALL, num_hidden_layers=2)
    foreign = any_type.drawn_anew(AutoModelForCausalLM.from_config(any_type.config_of("gpt_neox")))
    foreign.save_pretrained(tmp_path / "foreign")
    quantized(model, tmp_path / "first", "q4_k_m", rounding="rtn", imatrix_out=file)

    def said(model: Path = model, scheme: str = "q4_k", **options: Any) -> str:
        return refused(model, out, scheme=scheme, **options)

    assert "goes by names in GGUF, and gpt_neox is not known here" in said(tmp_path / "foreign", "q4_k_m")
    assert "goes by names in GGUF" in said(tmp_path / "foreign", imatrix=file)
    assert "goes by names in GGUF" in said(tmp_path / "foreign", imatrix_out=tmp_path / "new.gguf")
    assert "take q4_k" in said(scheme="q4_k_m", target_bits=4.6)
    assert "must lie between 3.95 and 5.2" in said(target_bits=3.0, profile_rows=1)
    assert "write two or more block types" in said(target_bits=4.6, candidate_bits="3,4")
    assert "has its own" in said(target_bits=4.6, group_size="64")
    assert "take --target-bits" in said(tell_apart="52%")
    assert "take --tied keep or untie" in said(scheme="q4_k_m", tied="light")
    assert "1 x 32 inputs, the model 1 x 64; it is of another model" in said(wider, imatrix=file)
    assert "lacks 'blk.1." in said(deeper, imatrix=file)
    assert "blocks of llama.cpp's alone" in said(scheme="w4a16-g16", imatrix=file)
    assert "rotations change them" in said(imatrix=file, init="hadamard")
    assert "is no file" in said(imatrix=tmp_path / "none.gguf")
    assert "exists; remove it" in said(imatrix_out=file)
    assert "lies in a model's folder" in said(imatrix_out=model / "new.gguf")
    assert "is no folder" in said(imatrix_out=tmp_path / "none" / "new.gguf")
