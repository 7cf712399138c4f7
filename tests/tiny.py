"""Two-block models with random weights, one of each architecture, and a folder to keep one in."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCAB = 61
BY_128 = {  # widths that blocks of 128 divide
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def config_of(model_type: str, **more: object) -> PretrainedConfig:
    """Grouped queries, widths that are no powers of two, biases where the architecture knows them."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    if model_type == "qwen3":
        biases = {"attention_bias": True}
    windows: dict[str, object] = {}
    if model_type in ("mistral", "phi3", "mixtral", "gemma2", "gemma3_text"):
        windows = {"sliding_window": 5}
    if model_type == "phi3":
        windows |= {"original_max_position_embeddings": 64}
    if model_type.startswith("gemma"):
        windows |= {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    if model_type == "gemma2":
        windows |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    experts: dict[str, object] = {}
    if model_type == "mixtral":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    if model_type == "qwen3_moe":
        experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    return AutoConfig.for_model(model_type, **(sizes | biases | windows | experts | more))


def model_of(config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter drawn anew: the library starts gains at one and biases at zero, which would hide mistakes."""
    torch.manual_seed(seed)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # which cannot cap its scores
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the library's default knows no double precision
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn(parameter.shape, dtype=dtype) + 0.5  # some gains are negative
        else:
            parameter.data = 0.5 * torch.randn(parameter.shape, dtype=dtype)
    return model.requires_grad_(False)


def answers(model: nn.Module) -> torch.Tensor:
    """Logits (2, 20, VOCAB) on tokens that are always the same."""
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def save(model: nn.Module, folder: Path) -> Path:
    """The model and a tokenizer of one token per character, as a Hugging Face folder."""
    model.save_pretrained(folder)
    alphabet = {"<s>": 0, "</s>": 1, "?": 2} | {chr(97 + i): 3 + i for i in range(26)} | {" ": 29, "\n": 30}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
