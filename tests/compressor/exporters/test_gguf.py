"""GGUF of every architecture in the table: read back by transformers where that can, by hand where it cannot.

benchmarks/llama_cpp.py holds the same files against llama.cpp itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from calib import BadInput
from compressor import Export, Quantize, export, load, quantize
from compressor.storage.gguf_architectures import (
    GGUF_ARCHITECTURES,
    Header,
    architecture_of,
    header_of,
    rope_factors,
    row_order,
    unsaid_window,
)
from tests import any_type

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

IDS = torch.randint(3, 150, (2, 24), generator=torch.Generator().manual_seed(0))  # longer than windows
# What llama.cpp takes for granted of these types, and numbers that are not 1.
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
    "granite": {
        "embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3,
    },
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "stablelm": {"use_qkv_bias": True},
}  # fmt: skip
READ = sorted(kind for kind, entry in GGUF_ARCHITECTURES.items() if entry.read_by)
BY_HAND = sorted(GGUF_ARCHITECTURES.keys() - set(READ))


def config_of(model_type: str, **more: Any) -> Any:
    raw = any_type.config_of(model_type).to_dict() | MORE.get(model_type, {}) | more
    return AutoConfig.for_model(**raw)


def folder_of(where: Path, model_type: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type, **more)).double().eval()
    any_type.drawn_anew(model).to(dtype).save_pretrained(where)
    return where


def quantized(model: Path, out: Path, scheme: str, **more: Any) -> Path:
    rows = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": rows}, model.parent / "ids.safetensors")
    options = Quantize(
        scheme=scheme, data=model.parent / "ids.safetensors", samples=4, held_out=2, length=16, learn=False, **more
    )
    quantize(model, out, options, allow_damage=True)
    return out


def exported(source: Path, dst: Path, **options: Any) -> dict[str, Any]:
    report = export(source, dst, Export(**{"to": "gguf", "held_out": 0} | options))
    return dict(report)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def by_transformers(dst: Path) -> Any:
    config = AutoConfig.from_pretrained(dst)
    given = {} if config.model_type == "mistral" else {"config": config}
    return AutoModelForCausalLM.from_pretrained(dst, gguf_file="model.gguf", dtype=torch.float32, **given).eval()


# Read back.


@pytest.mark.parametrize("model_type", READ)
def test_transformers_reads_the_model_that_was_written(model_type: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", model_type)
    exported(model, tmp_path / "dst", dtype="float32")
    want = logits(load(model))
    assert far(logits(by_transformers(tmp_path / "dst")), want) < 1e-5
    assert want.std() > 0.1


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-g32"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "qwen3_moe", "stablelm"])
def test_transformers_reads_codes(model_type: str, scheme: str, tmp_path: Path) -> None:
    """Among them weights that lie as (in, out), and experts. Scales are in half precision, and so kept."""
    out = quantized(folder_of(tmp_path / "model", model_type, torch.float16), tmp_path / "out", scheme)
    report = exported(out, tmp_path / "dst", dtype="float32")
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(out))) < 1e-5
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
    assert kinds == {"F32", {"w4a16-g32": "Q4_0", "w8a16-g32": "Q8_0"}[scheme]}
    assert report["bits_per_weight"] == {"w4a16-g32": 4.5, "w8a16-g32": 8.5}[scheme]


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "q5_1", "wmxfp4a16"])
def test_transformers_reads_block_types(scheme: str, tmp_path: Path) -> None:
    """Blocks as they were chosen, rows of queries and keys in llama.cpp's order."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model = folder_of(tmp_path / "model", "llama", torch.float16, **wide)
    out = quantized(model, tmp_path / "out", scheme)
    report = exported(out, tmp_path / "dst", dtype="float32")
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(out))) < 1e-4
    reader = gguf.GGUFReader(tmp_path / "dst" / "model.gguf")
    name = scheme.upper().removeprefix("W").removesuffix("A16")
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", name}
    number = int(reader.fields["general.file_type"].parts[-1][0])
    wanted = {"Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S",
              "MXFP4": "MOSTLY_MXFP4_MOE"}.get(name, f"MOSTLY_{name}")  # fmt: skip
    assert gguf.LlamaFileType(number).name == wanted
    assert (
        report["bits_per_weight"]
        == 8
        * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
        / (gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0])
    )


def test_rows_that_blocks_do_not_divide_are_stored_as_llama_cpp_stores_them(tmp_path: Path) -> None:
    out = quantized(
        folder_of(tmp_path / "model", "llama", torch.float16, intermediate_size=256), tmp_path / "out", "q4_k"
    )
    exported(out, tmp_path / "dst", dtype="float32")
    reader = gguf.GGUFReader(tmp_path / "dst" / "model.gguf")
    assert {t.tensor_type.name for t in reader.tensors if "ffn_down" in t.name} == {"Q4_K"}
    assert {t.tensor_type.name for t in reader.tensors if "ffn_up" in t.name or "attn_q" in t.name} == {"Q5_0"}
    assert int(reader.fields["general.file_type"].parts[-1][0]) == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(out))) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_blocks_of_their_own(tied: bool, tmp_path: Path) -> None:
    """A tied table stays one, as llama.cpp wants it; what 256 does not divide falls back there as well."""
    tables = {"embedding": "q6_k"} if tied else {"embedding": "q4_k", "lm_head": "q6_k"}
    model = folder_of(tmp_path / "model", "llama", torch.float16, hidden_size=256 if tied else 64, head_dim=64,
                      num_attention_heads=4, tie_word_embeddings=tied)  # fmt: skip
    out = quantized(model, tmp_path / "out", "q4_k", **tables)
    report = exported(out, tmp_path / "dst", dtype="float32")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
    assert found["token_embd.weight"] == ("Q6_K" if tied else "Q5_0")
    assert found.get("output.weight") == (None if tied else "Q8_0")
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(out))) < 1e-4
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors)
    assert stored < report["bytes"]["after"] < stored + 20_000
    exported(out, tmp_path / "plain", to="safetensors")
    assert far(logits(load(tmp_path / "plain")), logits(load(out))) < 0.02


# The same by hand: names of the file -> names of the checkpoint, values as they were.

LEAVES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of heads whose neighbours turn together, so that row i turns with row i + h/2."""
    width, result = len(rows) // heads, np.empty_like(rows)
    for head in range(heads):
        for i in range(width // 2):
            result[head * width + i] = rows[head * width + 2 * i]
            result[head * width + width // 2 + i] = rows[head * width + 2 * i + 1]
    return result


def read_by_hand(file: Path, model_type: str, config: Any) -> dict[str, Tensor]:
    result = dict[str, Tensor]()
    for tensor in gguf.GGUFReader(file).tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if model_type == "gemma" and "norm" in tensor.name:
            value = value - 1
        if ".attn_q." in tensor.name and model_type in ("granite", "mixtral", "smollm3"):
            value = halves(value, config.num_attention_heads)
        if ".attn_k." in tensor.name and model_type in ("granite", "mixtral", "smollm3"):
            value = halves(value, config.num_key_value_heads)
        name, suffix = tensor.name.rsplit(".", 1)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
        stem = OUTER[name] if match is None else f"model.layers.{match[1]}.{LEAVES[match[2]]}"
        if "{}" in stem:
            result |= {f"{stem.format(i)}.{suffix}": torch.from_numpy(one.copy()) for i, one in enumerate(value)}
        else:
            result[f"{stem}.{suffix}"] = torch.from_numpy(value.copy())
    return result


@pytest.mark.parametrize("model_type", BY_HAND)
def test_what_transformers_cannot_read_is_read_by_hand(model_type: str, tmp_path: Path) -> None:
    assert model_type in ("gemma", "granite", "mixtral", "olmo2", "smollm3")
    model = folder_of(tmp_path / "model", model_type)
    report = exported(model, tmp_path / "dst", dtype="float32", held_out=1)
    assert report["loaders"]["loaders"] == ["llama.cpp"]
    page = (tmp_path / "dst" / "report.html").read_text()
    assert "llama-cli" in page and "gguf_file" not in page
    have = read_by_hand(tmp_path / "dst" / "model.gguf", model_type, config_of(model_type))
    want = load_file(model / "model.safetensors")
    assert have.keys() == want.keys()
    for name, value in want.items():
        within = 1e-6 if model_type == "gemma" and "norm" in name else 0  # 1 was added in single precision
        assert (have[name] - value).abs().max() <= within, name


def test_codes_of_experts_by_hand(tmp_path: Path) -> None:
    """Mixtral, which is a llama to llama.cpp: rows of codes change places, experts lie one after another."""
    out = quantized(folder_of(tmp_path / "model", "mixtral", torch.float16), tmp_path / "out", "w4a16-g32")
    exported(out, tmp_path / "dst", dtype="float32")
    have = read_by_hand(tmp_path / "dst" / "model.gguf", "mixtral", config_of("mixtral"))
    exported(out, tmp_path / "merged", to="safetensors", dtype="float32")
    want = load_file(tmp_path / "merged" / "model.safetensors")
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(have[name], value), name


def test_the_head_is_written_where_the_runtime_wants_one(tmp_path: Path) -> None:
    for kind, there in (("olmo2", True), ("stablelm", True), ("qwen2", False)):
        model = folder_of(tmp_path / kind, kind, tie_word_embeddings=True)
        exported(model, tmp_path / "dst", dtype="float32")
        tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
        assert ("output.weight" in tensors) == there
        if there:
            assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_biases_of_queries_change_places_with_their_rows(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    report = exported(model, tmp_path / "dst", dtype="float32")
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(model))) < 1e-5
    assert any("config=" in loader for loader in report["loaders"]["loaders"])


# The header.


def keys_of(owner: Any) -> set[str]:
    """All keys that gguf has a name for."""
    found = set[str]()
    for value in vars(owner).values():
        found |= {value} if isinstance(value, str) else keys_of(value) if isinstance(value, type) else set()
    return found


@pytest.mark.parametrize("model_type", sorted(GGUF_ARCHITECTURES))
def test_every_key_is_one_that_gguf_knows(model_type: str) -> None:
    header = header_of(config_of(model_type))
    assert {f"{{arch}}.{key}" for key in header} <= keys_of(gguf.Keys)
    assert all(isinstance(value, int | float | str) for value in header.values())
    assert GGUF_ARCHITECTURES[model_type].name in gguf.MODEL_ARCH_NAMES.values()


def part(header: Header, *names: str) -> list[Any]:
    return [header.get(name) for name in names]


def test_keys_that_one_architecture_needs() -> None:
    scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert part(header_of(config_of("granite")), *scales) == [0.3, 1.5, 0.7, 2.0]
    caps = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    assert part(header_of(config_of("gemma2")), *caps) == [50.0, 30.0, 8]
    bases = ("rope.freq_base", "rope.freq_base_swa", "attention.sliding_window", "attention.key_length")
    assert part(header_of(config_of("gemma3_text")), *bases) == [1e6, 1e4, 8, 16]
    experts = (
        "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"
    )  # fmt: skip
    assert part(header_of(config_of("mixtral")), *experts) == [4, 2, None, None]
    assert part(header_of(config_of("qwen3_moe")), *experts) == [4, 2, 96, None]
    assert part(header_of(config_of("qwen2_moe")), *experts) == [4, 2, 96, 96]
    assert part(header_of(config_of("stablelm")), "rope.dimension_count", "use_parallel_residual") == [4, False]
    gpt2 = header_of(config_of("gpt2"))
    assert part(gpt2, "context_length", "feed_forward_length", "attention.layer_norm_epsilon") == [128, 256, 1e-5]
    assert not any(key.startswith("rope") for key in gpt2)


ROPE = {"rope_theta": 1e4}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 64}


def test_rotary_scalings() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    said = header_of(config_of("llama", rope_parameters=ROPE | yarn))
    names = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
    assert part(said, *(f"rope.scaling.{name}" for name in names)) == ["yarn", 4.0, 32, 32.0, 1.0]
    linear = header_of(config_of("qwen3", rope_parameters=ROPE | {"rope_type": "linear", "factor": 8.0}))
    assert part(linear, "rope.scaling.type", "rope.scaling.factor") == ["linear", 8.0]
    phi3 = config_of(
        "phi3", rope_parameters=ROPE | LONG | {"rope_type": "longrope", "partial_rotary_factor": 0.25},
        original_max_position_embeddings=64, max_position_embeddings=512,
    )  # fmt: skip
    said = header_of(phi3)
    # sqrt(1 + ln 8 / ln 64) = sqrt(3/2)
    assert said["rope.scaling.attn_factor"] == pytest.approx(1.5**0.5)
    assert part(said, "rope.scaling.original_context_length", "rope.dimension_count") == [64, 4]
    factors = {name: value.tolist() for name, value in rope_factors(phi3).items()}
    assert factors == {"rope_factors_long.weight": [2.0, 3.0], "rope_factors_short.weight": [1.0, 1.5]}


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scalings_are_read_with_the_config(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "factor": 4.0} | ({"original_max_position_embeddings": 16} if kind == "yarn" else {})
    model = folder_of(tmp_path / "model", "llama", rope_parameters=ROPE | rope)
    report = exported(model, tmp_path / "dst", dtype="float32")
    assert far(logits(by_transformers(tmp_path / "dst")), logits(load(model))) < 1e-5
    assert any("config=" in loader for loader in report["loaders"]["loaders"])


def test_rows_of_heads_are_a_permutation_that_pairs_halves() -> None:
    order = row_order("blk.0.attn_k.bias", config_of("granite"))
    assert order is not None and sorted(order.tolist()) == list(range(32))
    assert order[:4].tolist() == [0, 8, 1, 9] and order[16:18].tolist() == [16, 24]
    assert row_order("blk.0.attn_v.weight", config_of("granite")) is None
    assert row_order("blk.0.attn_q.weight", config_of("qwen3")) is None


# A window that llama.cpp does not know: contexts within it alone.


def test_contexts_end_where_a_window_would_begin(tmp_path: Path) -> None:
    config = config_of("mistral", sliding_window=20)
    assert unsaid_window(config) == 20 and header_of(config)["context_length"] == 20
    assert unsaid_window(config_of("mistral", sliding_window=128)) is None  # as long as the model's positions
    assert unsaid_window(config_of("gemma2")) is None  # whose windows it knows
    assert unsaid_window(config_of("qwen2")) is None
    model = folder_of(tmp_path / "model", "starcoder2", sliding_window=20)
    report = exported(model, tmp_path / "dst")
    assert any("config=" in loader for loader in report["loaders"]["loaders"])
    assert any("20 tokens" in note for note in report["loaders"]["notes"])
    field = gguf.GGUFReader(tmp_path / "dst" / "model.gguf").get_field("starcoder2.context_length")
    assert field.contents() == 20


# Refused, in one line.


@pytest.mark.parametrize(
    ("model_type", "more", "what"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act of config.json is gelu"),
        ("gemma", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "attention scaled by the root of 64"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "another order of windows"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps that are none"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 0]}, "another order of blocks without a rotary embedding"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("qwen2", {"head_dim": 32}, "heads that are wider or narrower together"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ("qwen3", {"rope_parameters": ROPE | {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        (
            "llama",
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "options of YaRN",
        ),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turn in part"),
        ("falcon", {}, "falcon is not known here, only gemma, gemma2"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(model_type: str, more: dict[str, Any], what: str) -> None:
    config = config_of(model_type)
    for name, value in more.items():
        setattr(config, name, value)
    with pytest.raises(BadInput, match=re.escape(what)) as refused:
        architecture_of(config)
    assert "\n" not in str(refused.value) and "export to safetensors" in str(refused.value)


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", "qwen3", attention_bias=True)
    with pytest.raises(BadInput, match=r"no place for 'model.layers.0.self_attn.\w_proj.bias' in qwen3"):
        exported(model, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
