"""Configs of the field's key models as they were published, with sizes divided: every kind of block that the model has
twice, its ratios of heads, partial rotary embeddings, windows, experts, shared experts, ranks, caps and multipliers.

What is not named is the default of the library's config class. Widths are multiples of 64, as bitsandbytes wants
them, inputs and outputs of linears of 32.
"""

from __future__ import annotations

from typing import Any

Raw = dict[str, Any]

VOCAB = 160
IDS: Raw = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON: Raw = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256, **IDS}
SEEN: Raw = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}


def heads(queries: int, keys: int, width: int) -> Raw:
    """Query heads, key heads and their width."""
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": width}


def default_rope(theta: float, **more: Any) -> Raw:
    """A rotary embedding; `more` are its other parameters."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def yarn(theta: float, factor: float, **more: Any) -> Raw:
    """YaRN, from 64 positions."""
    return default_rope(theta, rope_type="yarn", factor=factor, original_max_position_embeddings=64, beta_fast=32.0,
                        beta_slow=1.0, **more)  # fmt: skip


# Qwen

_DELTA: Raw = {
    **COMMON, **heads(4, 1, 32), "num_hidden_layers": 8, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}  # fmt: skip
_MULTIMODAL_ROPE = default_rope(1e7, partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)
_QWEN_EXPERTS: Raw = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_QWEN3_VISION: Raw = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 64,
}  # fmt: skip
_QWEN3_VL_ROPE = default_rope(5e6, mrope_section=[4, 2, 2], mrope_interleaved=True)
QWEN: dict[str, Raw] = {
    "Qwen2.5-Coder-0.5B": {
        "model_type": "qwen2", **COMMON, **default_rope(1e6), "num_attention_heads": 7, "num_key_value_heads": 1,
        "hidden_size": 448, "num_hidden_layers": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", **COMMON, **heads(2, 1, 128), **default_rope(1e6), "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    },
    "Qwen3.5-9B": {
        "model_type": "qwen3_5", **SEEN, "vision_config": _QWEN3_VISION,
        "text_config": {**_DELTA, **_MULTIMODAL_ROPE, "model_type": "qwen3_5_text"},
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe", **SEEN, "vision_config": _QWEN3_VISION,
        "text_config": {**_DELTA, **_MULTIMODAL_ROPE, **_QWEN_EXPERTS, "model_type": "qwen3_5_moe_text"},
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next", **_DELTA, **_QWEN_EXPERTS, **default_rope(1e7, partial_rotary_factor=0.25),
    },
    "Qwen2.5-VL-7B": {
        "model_type": "qwen2_5_vl", **SEEN,
        "text_config": {
            "model_type": "qwen2_5_vl_text", **COMMON, **default_rope(1e6, mrope_section=[8, 12, 12]),
            "hidden_size": 448,
            "num_attention_heads": 7, "num_key_value_heads": 1, "num_hidden_layers": 4, "rms_norm_eps": 1e-6,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 448,
            "fullatt_block_indexes": [1, 3], "window_size": 56,
        },
    },
    "Qwen3-VL-4B": {
        "model_type": "qwen3_vl", **SEEN, "tie_word_embeddings": True,
        "vision_config": _QWEN3_VISION | {"deepstack_visual_indexes": [0, 2]},
        "text_config": {
            "model_type": "qwen3_vl_text", **COMMON, **heads(8, 2, 16), **_QWEN3_VL_ROPE, "num_hidden_layers": 4,
        },
    },
    "Qwen3-VL-30B-A3B": {
        "model_type": "qwen3_vl_moe", **SEEN, "vision_config": _QWEN3_VISION | {"deepstack_visual_indexes": [0, 2]},
        "text_config": {
            "model_type": "qwen3_vl_moe_text", **COMMON, **heads(8, 1, 32), "num_hidden_layers": 4,
            **default_rope(5e6, mrope_section=[8, 4, 4], mrope_interleaved=True),
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        },
    },
}  # fmt: skip

# Gemma

_FIVE_TO_ONE = (["sliding_attention"] * 5 + ["full_attention"]) * 2
_FOUR_TO_ONE = (["sliding_attention"] * 4 + ["full_attention"]) * 2
_SLIDING_ROPE: Raw = {"rope_type": "default", "rope_theta": 1e4}
_GEMMA3: Raw = {
    **COMMON, **heads(4, 2, 32), "num_hidden_layers": 12, "sliding_window": 8, "query_pre_attn_scalar": 32,
    "layer_types": _FIVE_TO_ONE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_LINEAR_ROPE: Raw = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
_GEMMA4: Raw = _GEMMA3 | {
    "vocab_size_per_layer_input": VOCAB, "global_head_dim": 64, "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
    "rope_parameters": {
        "sliding_attention": _SLIDING_ROPE,
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}  # fmt: skip
_GEMMA4_VISION: Raw = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64,
}  # fmt: skip
_GEMMA4_WRAPPER: Raw = {
    "image_token_id": 150, "video_token_id": 151, "audio_token_id": 152, "boi_token_id": 153, "eoi_token_id": 154,
    "boa_token_id": 155, "eoa_token_index": 156,
}  # fmt: skip
GEMMA: dict[str, Raw] = {
    "Gemma-3-270M": {
        "model_type": "gemma3_text", **_GEMMA3, **heads(4, 1, 32),
        "rope_parameters": {
            "sliding_attention": _SLIDING_ROPE, "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "Gemma-3-4B": {
        "model_type": "gemma3", "mm_tokens_per_image": 4, "boi_token_index": 153, "eoi_token_index": 154,
        "image_token_index": 150,
        "text_config": {
            "model_type": "gemma3_text", **_GEMMA3,
            "rope_parameters": {"sliding_attention": _SLIDING_ROPE, "full_attention": _LINEAR_ROPE},
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
    },
    "Gemma-4-E2B": {
        "model_type": "gemma4_text", **_GEMMA4, **heads(8, 1, 32), "global_head_dim": 64, "num_hidden_layers": 20,
        "layer_types": _FOUR_TO_ONE * 2, "num_kv_shared_layers": 10, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64, "use_bidirectional_attention": None,
    },
    "Gemma-4-31B": {
        "model_type": "gemma4", **_GEMMA4_WRAPPER, "vision_config": _GEMMA4_VISION | {"standardize": True},
        "text_config": {
            "model_type": "gemma4_text", **_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        },
    },
    "Gemma-4-26B-A4B": {
        "model_type": "gemma4", **_GEMMA4_WRAPPER, "vision_config": _GEMMA4_VISION | {"standardize": True},
        "text_config": {
            "model_type": "gemma4_text", **_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
            "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
        },
    },
}  # fmt: skip

# Mixtures: gpt-oss, Llama 4, MiniMax

_LLAMA4: Raw = {
    **COMMON, **heads(5, 1, 64), **default_rope(5e5), "num_hidden_layers": 8, "attention_chunk_size": 8,
    "floor_scale": 8, "attn_temperature_tuning": True, "intermediate_size": 64, "intermediate_size_mlp": 128,
    "num_experts_per_tok": 1, "no_rope_layers": [1, 1, 1, 0] * 2,
}  # fmt: skip
MIXTURES: dict[str, Raw] = {
    "gpt-oss-20b": {
        "model_type": "gpt_oss", **COMMON, **heads(8, 1, 32), **yarn(150000.0, 4.0, truncate=False),
        "num_hidden_layers": 4, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 4,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Llama-4-Scout": {
        "model_type": "llama4", "image_token_index": 150, "boi_token_index": 151, "eoi_token_index": 152,
        "text_config": {
            "model_type": "llama4_text", **_LLAMA4, "num_local_experts": 4, "use_qk_norm": True,
            "interleave_moe_layer_step": 1,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14, "projector_input_dim": 64, "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    },
    "Llama-4-Maverick": {
        "model_type": "llama4_text", **_LLAMA4, "num_local_experts": 8, "use_qk_norm": False,
        "interleave_moe_layer_step": 2,
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2", **COMMON, **heads(6, 1, 32), **default_rope(5e6, partial_rotary_factor=0.5),
        "num_hidden_layers": 4, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip

# Compressed keys and values: DeepSeek, Kimi, GLM

_RANKS: Raw = {
    **COMMON, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "num_hidden_layers": 4,
}  # fmt: skip
_KIMI: Raw = {
    "model_type": "deepseek_v3", **_RANKS, **yarn(50000.0, 4.0, mscale=1.0, mscale_all_dim=1.0),
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5,
}  # fmt: skip
_GLM: Raw = {
    **COMMON, **heads(12, 1, 32), **default_rope(1e6, partial_rotary_factor=0.5), "attention_bias": True,
    "num_hidden_layers": 4, "first_k_dense_replace": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_GLM_LATENT: Raw = _RANKS | {
    **default_rope(1e6), "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
}  # fmt: skip
RANKED: dict[str, Raw] = {
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", **_RANKS, **yarn(10000.0, 4.0, mscale=1.0, mscale_all_dim=1.0),
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2,
    },
    "Kimi-K2": _KIMI,
    "Kimi-K2.6": {
        "model_type": "kimi_k25", **SEEN, "text_config": _KIMI, "projection_hidden_size": 32,
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "pos_emb_height": 8, "pos_emb_width": 8,
        },
    },
    "Kimi-Linear-48B-A3B": {
        "model_type": "kimi_linear", **_RANKS, "q_lora_rank": None, "num_hidden_layers": 8, "linear_num_heads": 4,
        "linear_head_dim": 32, "num_experts": 8, "num_experts_per_token": 2,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    },
    "GLM-4-32B-0414": {
        "model_type": "glm4", **COMMON, **heads(6, 2, 32), **default_rope(1e4, partial_rotary_factor=0.5),
        "num_hidden_layers": 4, "attention_bias": False,
    },
    "GLM-4.5": {"model_type": "glm4_moe", **_GLM, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "GLM-4.5-Air": {"model_type": "glm4_moe", **_GLM, "use_qk_norm": False},
    "GLM-4.5V": {
        "model_type": "glm4v_moe", "image_token_id": 150, "video_token_id": 151, "image_start_token_id": 152,
        "image_end_token_id": 153, "video_start_token_id": 154, "video_end_token_id": 155,
        "text_config": {
            "model_type": "glm4v_moe_text", **_GLM,
            **default_rope(1e4, partial_rotary_factor=0.5, mrope_section=[4, 2, 2]),
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "image_size": 56,
        },
    },
    "GLM-4.7-Flash": {"model_type": "glm4_moe_lite", **_GLM_LATENT, "routed_scaling_factor": 1.8},
    "GLM-5": {
        "model_type": "glm_moe_dsa", **_GLM_LATENT, "routed_scaling_factor": 2.5, "index_topk": 8,
        "index_head_dim": 32, "index_n_heads": 4, "layer_types": ["indexed_attention"] * 4,
        "indexer_types": ["full"] * 4,
    },
}  # fmt: skip

# Dense: Mistral, SmolLM, OLMo, Phi, Cohere

_MISTRAL: Raw = {**COMMON, **heads(8, 2, 16), "num_hidden_layers": 4, "rms_norm_eps": 1e-5}
_PIXTRAL: Raw = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 56,
}  # fmt: skip
DENSE: dict[str, Raw] = {
    "Mistral-Small-3.1-24B": {
        "model_type": "mistral3", "image_token_index": 10, "vision_config": _PIXTRAL, "tie_word_embeddings": False,
        "text_config": {"model_type": "mistral", **_MISTRAL, **default_rope(1e9), "sliding_window": None},
    },
    "Ministral-3-8B": {
        "model_type": "mistral3", "image_token_index": 10, "vision_config": _PIXTRAL, "tie_word_embeddings": False,
        "text_config": {
            "model_type": "ministral3", **_MISTRAL,
            **yarn(1e6, 4.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
        },
    },
    "Ministral-8B-2410": {
        "model_type": "ministral", **_MISTRAL, **default_rope(1e8), "sliding_window": 8,
        "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2, "num_hidden_layers": 8,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3", **COMMON, **default_rope(5e6), "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 1,
        "num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2, "tie_word_embeddings": True,
    },
    "OLMo-3-7B": {
        "model_type": "olmo3", **COMMON, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 8,
        "sliding_window": 8, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32,
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            },
        },
    },
    "Phi-4": {
        "model_type": "phi3", **COMMON, **default_rope(250000.0), "num_attention_heads": 4, "num_key_value_heads": 1,
        "num_hidden_layers": 4,
    },
    "Phi-4-mini": {
        "model_type": "phi3", **COMMON, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1,
        "num_hidden_layers": 4, "tie_word_embeddings": True, "original_max_position_embeddings": 64,
        **default_rope(
            1e4, rope_type="longrope", partial_rotary_factor=0.75, original_max_position_embeddings=64,
            short_factor=[1.0] * 24, long_factor=[1.0 + i / 4 for i in range(24)],
        ),
    },
    "Command-R7B": {
        "model_type": "cohere2", **COMMON, **heads(4, 1, 32), **default_rope(50000.0), "num_hidden_layers": 8,
        "sliding_window": 8, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2, "logit_scale": 0.25,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

# Hybrids: Granite, LFM, Nemotron, Falcon

_STATES: Raw = {
    "mamba_n_heads": 32, "mamba_d_head": 4, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_GRANITE: Raw = {
    **COMMON, **_STATES, "mamba_d_head": 8, "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "position_embedding_type": "nope",
    "embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
    "shared_intermediate_size": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
_CONVOLVED: Raw = {
    **COMMON, **default_rope(1e6), "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 1,
    "layer_types": ["conv", "conv", "full_attention"] * 2, "num_hidden_layers": 6, "tie_word_embeddings": True,
}  # fmt: skip
_LFM2: Raw = {"model_type": "lfm2", **_CONVOLVED, "block_auto_adjust_ff_dim": True, "block_multiple_of": 64}
_NEMOTRON: Raw = {
    **COMMON, **heads(4, 1, 32), "ssm_state_size": 32, "mamba_num_heads": 32, "mamba_head_dim": 4, "n_groups": 2,
    "chunk_size": 16,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
HYBRIDS: dict[str, Raw] = {
    "Granite-4.0-H-Micro": {"model_type": "granitemoehybrid", **_GRANITE, "num_local_experts": 0},
    "Granite-4.0-H-Tiny": {
        "model_type": "granitemoehybrid", **_GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 64,
    },
    "LFM2-1.2B": _LFM2,
    "LFM2-8B-A1B": {
        "model_type": "lfm2_moe", **_CONVOLVED, "num_dense_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "LFM2-VL-1.6B": {
        "model_type": "lfm2_vl", "text_config": _LFM2, "image_token_id": 150, "projector_hidden_size": 128,
        "vision_config": {
            "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_patches": 16, "vision_use_head": False,
        },
    },
    "Nemotron-Nano-9B-v2": {
        "model_type": "nemotron_h", **_NEMOTRON,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 2,
    },
    "Nemotron-3-Nano-30B-A3B": {
        "model_type": "nemotron_h", **_NEMOTRON, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"] * 2, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 2.5,
    },
    "Falcon-H1-1.5B-Deep": {
        "model_type": "falcon_h1", **COMMON, **_STATES, **heads(4, 2, 32), **default_rope(1e11), "num_hidden_layers": 4,
        "mamba_d_ssm": 128, "mamba_norm_before_gate": False, "embedding_multiplier": 5.66, "key_multiplier": 0.39,
        "lm_head_multiplier": 0.039, "attention_out_multiplier": 0.94, "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.236, "mlp_multipliers": [0.88, 0.44],
        "ssm_multipliers": [0.354, 0.25, 0.177, 0.5, 0.354],
    },
}  # fmt: skip

CONFIGS = {**QWEN, **GEMMA, **MIXTURES, **RANKED, **DENSE, **HYBRIDS}
