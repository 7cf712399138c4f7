"""Small models of every causal type that the installed library knows, made from its own config classes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, LAYERS = 160, 4

MLA: dict[str, Any] = {
    "head_dim": 16, "qk_head_dim": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
MORE: dict[str, dict[str, Any]] = {  # what makes up for ratios of sizes that a config has to keep
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), MLA
    ),
    "deepseek_v2": MLA | {"num_experts_per_tok": 2},
    "longcat_flash": MLA
    | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 96, "n_routed_experts": 4, "zero_expert_num": 1},
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), MAMBA),
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "rwkv": {"attention_hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "xlstm": {"num_heads": 4, "embedding_dim": 64},
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16},
}  # fmt: skip

# The first pattern that an integer's name fits says what it becomes; widths are multiples of 16, so that groups fit.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(vocab_size|vocab_size_per_layer_input|n_vocab|num_embeddings)$", VOCAB),
    (r"(num_hidden_layers|n_layers?|num_layers|num_blocks|decoder_layers|encoder_layers|depth)$", LAYERS),
    (r"(.*num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads)$", 2),
    (r"(.*(attention_heads|num_heads)|n_heads?|.*_num_value_heads|.*_num_key_heads|mamba_n_heads)$", 4),
    (r"(head_dim|.*_head_dim|d_kv|kv_channels|attention_head_size|d_head|global_head_dim)$", 16),
    (r"(moe_|expert_|shared_expert_|.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|inner_dim)(_mlp)?$", 96),
    (r"dff|ffn_hidden_size", 96),
    (r"((out_)?hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|model_dim|width|d_embed)$", 64),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k)$", 2),
    (r"(num_(local_)?experts|n_routed_experts|moe_num_experts|num_moe_experts|routed_experts)$", 4),
    (r"(n_shared_experts|num_shared_experts|first_k_dense_replace|n_group|topk_group|num_expert_groups?)$", 1),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length)$", 128),
    (r"(sliding_window|attention_window_size|local_window)$", 8),
    (r"(q_lora_rank|kv_lora_rank|.*_rank|lora_rank)$", 32),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim)$", 16),
)


NOT_OF_BLOCKS = ("architectures", "ssm_multipliers")  # lists that may be as long as there are blocks


def small(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same type with few blocks and narrow ones."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            small(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        else:
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    setattr(config, name, min(size, value) if value > 0 else value)
                    break
    return config


def config_of(model_type: str) -> PretrainedConfig:
    """The library's default config of a type, made small, with what it lists for each block shortened to fit."""
    source: Any = CONFIG_MAPPING[model_type]()
    raw = _shortened(small(source).to_dict())
    return CONFIG_MAPPING[model_type].from_dict(raw | MORE.get(model_type, {}))


def _shortened(raw: dict[str, Any]) -> dict[str, Any]:
    layers = next((raw[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in raw), 0)
    result = dict[str, Any]()
    for name, value in raw.items():
        if isinstance(value, dict) and "model_type" in value:
            result[name] = _shortened(value)
        elif isinstance(value, list) and len(value) > layers and layers and name not in NOT_OF_BLOCKS:
            result[name] = value[:layers]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by numbers of blocks
            result[name] = {key: one for key, one in value.items() if int(key) < layers}
        else:
            result[name] = (
                VOCAB - 3 if name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB else value
            )
    return result


def model_of(model_type: str, seed: int = 0) -> nn.Module:
    """A model with weights drawn anew, gains and biases too, in double precision."""
    torch.manual_seed(seed)
    return drawn_anew(AutoModelForCausalLM.from_config(config_of(model_type)).double().eval())


def drawn_anew(model: Any) -> Any:
    """Draw every weight, gain and bias of a model."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the library's default for experts knows no double precision
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() > 1 else 0.1
        p.data = torch.randn_like(p) * scale / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1) * 2
        if p.dim() == 1 and ("norm" in name or "ln" in name) and name.endswith("weight"):
            p.data += 1
    return model.requires_grad_(False)
