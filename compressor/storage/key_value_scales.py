"""Scales of keys and values in FP8, as compressed-tensors has them: `k_scale` and `v_scale` beside the weights of an
attention layer, (1,) or, one for each head, (heads, 1, 1)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from calib.blockwise.model import BlockwiseModel
from calib.quant.scheme import Scheme

ENDINGS = (".k_scale", ".v_scale")
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")  # by one of which readers know attention with a cache
_READ_AGAIN = frozenset({"doge"})  # types that compute something of values in the cache: tried, answers differ
_CACHES = ("past_key_values", "past_key_value")


def key_value_names(stream: BlockwiseModel, index: int) -> dict[str, tuple[str, ...]]:
    """Names on disk of the scales of keys and of values, by attention layer of block `index`: beside its weights."""
    block, found = stream.block_name(index), dict[str, tuple[str, ...]]()
    for name in stream.attention(index):
        layer = f"{block}.{name}"
        for full in stream.parameters(index):
            inside, source = full.removeprefix(f"{layer}."), stream.names.sources.get(full)
            if inside != full and source is not None and source.names[0].endswith(f".{inside}"):
                layer = source.names[0].removesuffix(f".{inside}")
                break
        found[name] = tuple(f"{layer}{ending}" for ending in ENDINGS)
    return found


def stored_scales(stream: BlockwiseModel, index: int, keys: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Scales (2, 1 or heads) of keys and of values by attention layer of block `index` -> tensors by their names on
    disk."""
    names = key_value_names(stream, index)
    pairs = (zip(names[layer], scales, strict=True) for layer, scales in keys.items())
    return {name: scale.view(scale_shape(stream, scheme)).clone() for pair in pairs for name, scale in pair}


def scale_shape(stream: BlockwiseModel, scheme: Scheme) -> tuple[int, ...]:
    """The shape of a layer's scale of keys, and of that of values, where a scheme has them."""
    one_for_all = scheme.kv is None or scheme.kv.scales != "head"
    return (1,) if one_for_all else (stream.config.get_text_config().num_key_value_heads, 1, 1)


def scale_names(stream: BlockwiseModel, scheme: Scheme) -> list[str]:
    """Names on disk of all such scales; none where a scheme has none."""
    if not scheme.has_fixed_keys:
        return []
    return [name for i in range(stream.layers) for names in key_value_names(stream, i).values() for name in names]


def scale_dtype(stream: BlockwiseModel) -> torch.dtype:
    """The dtype that such scales are kept in: that of the model's linears, also in blocks whose own are all ignored."""
    return next(stream.entry(f"{stream.block_name(i)}.{one.parameter}").dtype
                for i in range(stream.layers) for one in stream.linears(i))  # fmt: skip


def without_place(stream: BlockwiseModel, scheme: Scheme) -> str | None:
    """Why readers have no place for scales of keys and values of a model; None where they have one.

    transformers, with compressed-tensors, looks for them in attention layers that keep a cache and have projections by
    their usual names, and for the number of heads in the config.
    """
    kind, config = stream.config.model_type, stream.config.get_text_config()
    each = scheme.kv is not None and scheme.kv.scales == "head"
    if stream.encoder_blocks or getattr(config, "num_key_value_heads", None) is None:
        return f"{kind} is none of the types with a cache that they know"
    if getattr(config, "kv_lora_rank", None) is not None:
        return f"{kind} keeps keys and values in its cache as one latent state"
    if config.model_type in _READ_AGAIN:
        return f"{kind} reads values again in its cache, and computes more of them"
    for i in range(stream.layers):
        layers = [stream.blocks[i].get_submodule(name) for name in stream.attention(i)]
        for layer in layers:
            named = any(hasattr(layer, name) for name in _PROJECTIONS) and "attention" in type(layer).__name__.lower()
            if not named or not any(name in inspect.signature(layer.forward).parameters for name in _CACHES):
                return f"they do not know {type(layer).__name__} of {kind} as attention with a cache"
            if each and _kv_heads(layer) not in (None, config.num_key_value_heads):
                return f"{kind} has layers of other numbers of heads than num_key_value_heads of its config"
    return None


def _kv_heads(attention: nn.Module) -> int | None:
    """How many heads keys have, where a layer's own projection says so."""
    features = getattr(getattr(attention, "k_proj", None), "out_features", None)
    width = getattr(attention, "head_dim", None)
    return features // width if features and width else None
