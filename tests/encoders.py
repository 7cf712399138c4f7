"""Sequence classifiers of many architectures with tiny random weights, of three layers, and a tokenizer for all."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.bert import WORDS

NAMES = ["no", "yes", "maybe"]
_USUAL = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
_DECODER = _USUAL | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": None, "eos_token_id": 2}
_TYPES = ["full_attention", "sliding_attention", "full_attention"]
SIZES: dict[str, dict[str, object]] = {
    "bert": _USUAL,
    "roberta": _USUAL,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    "modernbert": _USUAL | {"local_attention": 4, "layer_types": _TYPES},
    "electra": _USUAL | {"embedding_size": 12},
    "deberta-v2": _USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    "llama": _DECODER,
    "qwen3": _DECODER | {"layer_types": _TYPES, "sliding_window": 3, "use_sliding_window": True},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40, "scale_attn_by_inverse_layer_idx": True},
    "mpnet": _USUAL,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 2,
           "relative_attention_num_buckets": 4, "decoder_start_token_id": 0, "eos_token_id": 2},
    "albert": _USUAL | {"embedding_size": 12},
}  # fmt: skip


def save(folder: Path, model_type: str, names: list[str] = NAMES, seed: int = 0, **more: object) -> Path:
    """A folder with a model whose parameters are all drawn, large enough that each layer matters, and its tokenizer."""
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = AutoConfig.for_model(
        model_type, **({"vocab_size": len(WORDS), "pad_token_id": 0} | SIZES[model_type] | labels | more)
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + (1.0 if "norm" in name.lower() else 0.0))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder
