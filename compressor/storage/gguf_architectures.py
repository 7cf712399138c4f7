"""What llama.cpp computes for each architecture that is written here: how it names it, what it wants in the header, how
values are stored, and what it takes for granted.

Names of tensors are gguf's own (`gguf.get_tensor_name_map`). The rest is in no library: facts of llama.cpp b11434, held
against the runtime by benchmarks/llama_cpp.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Header = dict[str, int | float | bool | str]  # without the prefix "architecture."

_SCALINGS = ("default", "linear", "yarn")
_YARN_MORE = ("attention_factor", "mscale", "mscale_all_dim")
_QKV = "[qkv]_proj"
_LLAMA_BIASES = "([qkvo]|gate|up|down)_proj"
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": (None, False)}
_GELU_2 = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": (None, False)}
_TIED = {"tie_word_embeddings": True}
_EVERY_BLOCK = {"decoder_sparse_step": 1, "mlp_only_layers": (None, [])}


def _nothing(config: PretrainedConfig) -> Header:
    return {}


@dataclass(frozen=True)
class GgufArchitecture:
    """Facts about one `model_type`.

    Args:
        name: `general.architecture`.
        neighbours: it turns channels 2i and 2i + 1 of a head, where transformers turns i and i + h/2: rows of queries
            and keys change places.
        gain: what norms multiply by beside their weight; the sum is stored.
        scalings: rotary scalings that it knows.
        period: the last of so many blocks attends to everything, the others to a window; 0: it knows no window.
        biases: the linears, as a pattern of the last part of their names, that it reads biases of.
        requires: what the config must say, one value or any of several: it computes nothing else.
        square: its heads together are as wide as the hidden state.
        own_head: it wants a head in the file, also where that is the embedding.
        header: keys beside those that all have.
        read_by: how transformers reads the file: "alone", with the "config" given, or not at all ("").
    """

    name: str
    neighbours: bool = False
    gain: float = 0.0
    scalings: tuple[str, ...] = _SCALINGS
    period: int = 0
    biases: str = ""
    requires: Mapping[str, Any] = field(default_factory=dict)
    square: bool = False
    own_head: bool = False
    header: Callable[[PretrainedConfig], Header] = _nothing
    read_by: str = ""


def _capped(config: PretrainedConfig) -> Header:
    """Gemma's caps and window."""
    header: Header = {"attention.sliding_window": config.sliding_window}
    if config.attn_logit_softcapping is not None:
        header["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        header["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return header


def _gemma3(config: PretrainedConfig) -> Header:
    return _capped(config) | {"rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}


def _scaled(config: PretrainedConfig) -> Header:
    """Granite's multipliers; it divides logits."""
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _experts(config: PretrainedConfig) -> Header:
    return {
        "expert_count": getattr(config, "num_experts", None) or config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def _narrow_experts(config: PretrainedConfig) -> Header:
    return _experts(config) | {"expert_feed_forward_length": config.moe_intermediate_size}


def _shared_experts(config: PretrainedConfig) -> Header:
    return _narrow_experts(config) | {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}


def _window_of_none(config: PretrainedConfig) -> Header:
    """Phi-3's reader takes the key for granted, and turns windows off."""
    return {"attention.sliding_window": 0}


_LLAMA = GgufArchitecture(
    "llama", neighbours=True, scalings=(*_SCALINGS, "llama3"), biases=_LLAMA_BIASES, requires=_SILU, read_by="alone"
)
GGUF_ARCHITECTURES = {
    "gemma": GgufArchitecture("gemma", gain=1, requires=_GELU | _TIED),
    "gemma2": GgufArchitecture(
        "gemma2", gain=1, period=2, requires=_GELU_2 | _TIED, header=_capped, read_by="config"
    ),
    "gemma3_text": GgufArchitecture(
        "gemma3", gain=1, period=6, requires=_GELU_2 | {"attn_logit_softcapping": None}, header=_gemma3,
        read_by="config",
    ),
    "gpt2": GgufArchitecture(
        "gpt2", scalings=(), biases=".*", square=True, read_by="config",
        requires={
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "granite": GgufArchitecture(
        "granite", neighbours=True, biases=_LLAMA_BIASES, requires=_SILU, header=_scaled
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": GgufArchitecture(
        "llama", neighbours=True, scalings=(*_SCALINGS, "llama3"), requires=_SILU, header=_experts
    ),
    "olmo2": GgufArchitecture("olmo2", requires=_SILU, square=True, own_head=True),
    "phi3": GgufArchitecture(
        "phi3", scalings=("default", "longrope"), requires=_SILU, square=True, header=_window_of_none, read_by="config"
    ),
    "qwen2": GgufArchitecture("qwen2", biases=_QKV, requires=_SILU, square=True, read_by="alone"),
    "qwen2_moe": GgufArchitecture(
        "qwen2moe", biases=_QKV, square=True, own_head=True,
        requires=_SILU | _EVERY_BLOCK | {"norm_topk_prob": False}, header=_shared_experts,
        read_by="config",
    ),
    "qwen3": GgufArchitecture("qwen3", requires=_SILU, read_by="config"),
    "qwen3_moe": GgufArchitecture(
        "qwen3moe", requires=_SILU | _EVERY_BLOCK | {"norm_topk_prob": True}, header=_narrow_experts,
        read_by="config",
    ),
    "smollm3": GgufArchitecture("smollm3", neighbours=True, requires=_SILU),
    "stablelm": GgufArchitecture(
        "stablelm", biases=".*", square=True, own_head=True, requires=_SILU | {"qk_layernorm": False},
        header=lambda config: {"use_parallel_residual": config.use_parallel_residual}, read_by="config",
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2", biases=".*", square=True, requires={"hidden_act": "gelu_pytorch_tanh"}, read_by="config"
    ),
}  # fmt: skip


def architecture_of(config: PretrainedConfig) -> GgufArchitecture:
    """The entry of a config.  Raises BadInput where llama.cpp computes something else than the config says."""
    kind = config.model_type
    if kind not in GGUF_ARCHITECTURES:
        raise BadInput(
            f"to gguf: {kind} is not known here, only {', '.join(GGUF_ARCHITECTURES)}; export to safetensors and "
            "use llama.cpp's own converter"
        )
    entry = GGUF_ARCHITECTURES[kind]
    for name, wanted in entry.requires.items():
        found = getattr(config, name, None)
        if found not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise BadInput(f"to gguf: {name} of config.json is {found}, and llama.cpp computes {kind} with {wanted} "
                           "alone; export to safetensors")  # fmt: skip
    for what, other in _peculiar(config, entry).items():
        if other:
            raise BadInput(f"to gguf: has {what}, which llama.cpp computes otherwise for {kind}; export to safetensors")
    return entry


def _peculiar(config: PretrainedConfig, entry: GgufArchitecture) -> dict[str, bool]:
    """What llama.cpp takes for granted beyond single values -> whether the config says otherwise."""
    rope, layers = rope_of(config), config.num_hidden_layers
    kind = rope.get("rope_type", "default")
    head = head_dim(config)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    wide = (config.model_type, layers) in (("gemma2", 46), ("gemma3_text", 62))  # as it knows the 27B models
    return {
        f"rope scaling '{kind}'": bool(entry.scalings) and kind not in entry.scalings,
        "options of YaRN beside its usual ones": kind == "yarn"
        and (rope.get("truncate") is False or any(rope.get(name) for name in _YARN_MORE)),
        "heads that turn in part": entry.neighbours and rotary_dim(config) != head,
        "heads that are wider or narrower together than the hidden state": entry.square
        and head * config.num_attention_heads != config.hidden_size,
        "caps that are none": config.model_type == "gemma2"
        and None in (config.attn_logit_softcapping, config.final_logit_softcapping),
        f"attention scaled by the root of {scalar}": scalar is not None
        and scalar != (config.hidden_size // config.num_attention_heads if wide else head),
        "another order of windows": bool(entry.period) and _windows(config) != [
            (i + 1) % entry.period != 0 for i in range(layers)
        ],
        "another order of blocks without a rotary embedding": config.model_type == "smollm3"
        and [bool(rotary) for rotary in config.no_rope_layers] != [(i + 1) % 4 != 0 for i in range(layers)],
    }  # fmt: skip


def _windows(config: PretrainedConfig) -> list[bool]:
    """Whether each block attends to a window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def unsaid_window(config: PretrainedConfig) -> int | None:
    """Tokens that some block attends to, where llama.cpp attends to all; None where it does as the model does."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if GGUF_ARCHITECTURES[config.model_type].period or not window or (kinds and not any(_windows(config))):
        return None
    return window if window < config.max_position_embeddings else None


def head_dim(config: PretrainedConfig) -> int:
    """Channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Options of the rotary embedding, of the blocks that attend to everything where blocks differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def rotary_dim(config: PretrainedConfig) -> int:
    """Leading channels of a head that the rotary embedding turns."""
    share = rope_of(config).get("partial_rotary_factor", 1.0)
    return int(head_dim(config) * share)


def header_of(config: PretrainedConfig) -> Header:
    """Keys of the header, without the prefix `architecture.`, and their values."""
    entry, rope = GGUF_ARCHITECTURES[config.model_type], rope_of(config)
    heads = config.num_attention_heads
    header: Header = {
        "vocab_size": config.vocab_size,
        "context_length": unsaid_window(config) or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
    }  # fmt: skip
    rms = getattr(config, "rms_norm_eps", None)
    if rms is not None:
        header["attention.layer_norm_rms_epsilon"] = rms
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            header["attention.layer_norm_epsilon"] = getattr(config, name)
    if entry.scalings:
        header |= {"rope.dimension_count": rotary_dim(config), "rope.freq_base": float(rope["rope_theta"])}
        header |= _scaling(config, rope)
    return header | entry.header(config)


def _scaling(config: PretrainedConfig, rope: Mapping[str, Any]) -> Header:
    kind = rope.get("rope_type", "default")
    old = rope.get("original_max_position_embeddings")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(old or config.max_position_embeddings),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
    if kind == "longrope":
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.attn_factor": longrope_attention(config),
        }
    return {}


def longrope_attention(config: PretrainedConfig) -> float:
    """Compute LongRoPE's factor on queries and keys: sqrt(1 + ln s / ln L) where a context L becomes s times as long
    (arXiv:2402.13753), or the one that the config gives."""
    rope = rope_of(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    old = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / old
    return math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0


def rope_factors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensors (r/2,) float32 of what each frequency of the plain embedding, theta^(-2i/r), is divided by, by the names
    that the runtime has for them.

    Llama 3.1: 1 for waves that fit `high_freq_factor` times into the old context, `factor` for those that fit less than
    `low_freq_factor` times, and between them what mixes the frequencies linearly. LongRoPE: as the config lists them,
    for contexts beyond the old one and within.
    """
    rope, width = rope_of(config), rotary_dim(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]).float() for which in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    fits = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((fits - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / (share + (1 - share) / rope["factor"])).float()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its name there, and the checkpoint's tensors that it holds; several of them, experts, lie
    one after another along a first dimension of their own."""

    name: str
    sources: tuple[str, ...]
    stacked: bool = False

    @property
    def in_float32(self) -> bool:
        """Whether the runtime wants it in single precision: vectors, routers, positions."""
        return not self.name.endswith(".weight") or bool(
            re.search(r"norm\.weight$|ffn_gate_inp|^position_embd", self.name)
        )


def tensors_of(
    config: PretrainedConfig, stored: Iterable[str], gguf_name: Callable[[str], str | None]
) -> list[StoredTensor]:
    """List what the file holds of a checkpoint's tensors, in their order.

    Args:
        config: of a type in `GGUF_ARCHITECTURES`.
        stored: names of the checkpoint's tensors.
        gguf_name: gguf's name for one of these, None where it has none.

    Raises:
        BadInput: the runtime has no place for a tensor.
    """
    entry, sources = GGUF_ARCHITECTURES[config.model_type], dict[str, list[str]]()
    for name in stored:
        found = gguf_name(re.sub(r"\.experts\.\d+\.", ".experts.", name))
        if found is None or (name.endswith(".bias") and not re.fullmatch(entry.biases, name.split(".")[-2])):
            raise BadInput(f"to gguf: llama.cpp has no place for '{name}' in {config.model_type}; export to "
                           "safetensors")  # fmt: skip
        sources.setdefault(found, []).append(name)

    def number(name: str) -> int:
        return int(match[1]) if (match := re.search(r"\.experts\.(\d+)\.", name)) else 0

    tensors = [
        StoredTensor(name, tuple(sorted(some, key=number)), stacked="_exps." in name) for name, some in sources.items()
    ]
    if entry.own_head and "output.weight" not in sources:
        tensors.append(StoredTensor("output.weight", tuple(sources["token_embd.weight"])))
    return tensors


def row_order(name: str, config: PretrainedConfig) -> Tensor | None:
    """Find the order of the rows of a query's or key's weight or bias, by its name in the file: pairs (i, i + h/2) of a
    head become neighbours.  -> (out,) where each row comes from; None where rows stay."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    count = heads.get(name.split(".")[-2])
    if not GGUF_ARCHITECTURES[config.model_type].neighbours or count is None:
        return None
    return torch.arange(count * head_dim(config)).view(count, 2, -1).transpose(1, 2).flatten()


def stored_value(name: str, value: Tensor, config: PretrainedConfig) -> Tensor:
    """A tensor's values as the runtime reads them, by its name in the file: gains beside the weight of a norm added,
    rows in its order, the gate of a shared expert a vector."""
    if name.endswith("norm.weight"):
        value = value.float() + GGUF_ARCHITECTURES[config.model_type].gain  # 16 bits would lose digits of the sum
    elif name.endswith("ffn_gate_inp_shexp.weight"):
        value = value.flatten()
    order = row_order(name, config)
    return value if order is None else value[order]
