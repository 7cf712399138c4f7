"""llama.cpp's mixtures of block types, such as Q4_K_M: more bits for tensors that suffer most, by names in GGUF.

The rule is that of llama.cpp b11434 (`llama_tensor_get_type`), for the architectures that are written here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockMixture:
    """A mixture: the block type of most of its tensors, and its number in a file's header (`general.file_type`)."""

    base: str
    file_type: int


MIXTURES = {
    "q3_k_s": BlockMixture("q3_k", 11),
    "q3_k_m": BlockMixture("q3_k", 12),
    "q3_k_l": BlockMixture("q3_k", 13),
    "q4_k_s": BlockMixture("q4_k", 14),
    "q4_k_m": BlockMixture("q4_k", 15),
    "q5_k_s": BlockMixture("q5_k", 16),
    "q5_k_m": BlockMixture("q5_k", 17),
}


@dataclass(frozen=True)
class MixedModel:
    """A model as the rule sees it: its number of blocks, and of experts in each (0: none); whether its head is a tensor
    of its own; and whether llama.cpp takes it for one of 70 billion weights."""

    layers: int
    experts: int = 0
    own_head: bool = True
    is_70b: bool = False


def type_in_mixture(mixture: str, tensor: str, model: MixedModel) -> str:
    """The block type of a weight in one of MIXTURES, by its name in GGUF, whatever rows it has (`fitting` says what
    becomes of those that 256 does not divide)."""
    *block, part, _ = tensor.split(".")
    if part == "output" or (part == "token_embd" and not model.own_head):
        return "q6_k"
    layer = int(block[-1]) if block else 0
    found = None
    if part in ("attn_v", "attn_qkv"):
        found = _of_values(mixture, layer, model)
    elif part == "attn_k" and model.experts == 8:
        found = "q8_0"
    elif part == "attn_output":
        found = _of_outputs(mixture, model)
    elif part.startswith("ffn_down"):
        found = _of_down(mixture, layer, model)
    return found or MIXTURES[mixture].base


def _suffers_most(layer: int, layers: int) -> bool:
    """Whether a block is one of the first or the last eighth, or every third of those between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _of_values(mixture: str, layer: int, model: MixedModel) -> str | None:
    """Values, which are small where several heads share them; None: as most tensors."""
    if model.experts == 8:
        return "q8_0"
    found = None
    if mixture == "q3_k_m":
        found = "q5_k" if layer < 2 else "q4_k"
    elif mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < 4):
        found = "q5_k"
    elif mixture in ("q4_k_m", "q5_k_m") and _suffers_most(layer, model.layers):
        found = "q6_k"
    few = (found or MIXTURES[mixture].base) in ("q3_k", "q4_k")
    return "q5_k" if model.is_70b and few else found


def _of_outputs(mixture: str, model: MixedModel) -> str | None:
    """What attention ends with."""
    if model.experts == 8:
        return "q5_k" if mixture in ("q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else None
    return {"q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mixture)


def _of_down(mixture: str, layer: int, model: MixedModel) -> str | None:
    """The last linear of a feed-forward block, or of each of its experts."""
    if mixture == "q3_k_m":
        return "q5_k" if layer < model.layers // 16 else "q4_k"
    if mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < model.layers // 8):
        return "q5_k"
    more = mixture in ("q4_k_m", "q5_k_m") and _suffers_most(layer, model.layers)
    return "q6_k" if more else None
