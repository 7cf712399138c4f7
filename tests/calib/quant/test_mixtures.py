"""llama.cpp's mixtures: which tensor gets which type, against what its files have and a rule written otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.quant.block_types import BLOCK_TYPES
from calib.quant.mixtures import MIXTURES, MixedModel, type_in_mixture
from calib.quant.scheme import Scheme

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def others(mixture: str, model: MixedModel) -> dict[str, str]:
    """Tensors of the blocks that do not have the type of most."""
    names = [f"blk.{i}.{part}" for i in range(model.layers) for part in PARTS]
    found = {name: type_in_mixture(mixture, f"{name}.weight", model) for name in names}
    return {name: kind for name, kind in found.items() if kind != MIXTURES[mixture].base}


def blocks(part: str, kind: str, layers: list[int]) -> dict[str, str]:
    return {f"blk.{i}.{part}": kind for i in layers}


# Of 32 blocks, as published files of Llama 3 8B and Mistral 7B have them.
MORE_32 = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
ALL_32 = list(range(32))
OF_32 = {
    "q3_k_s": {},
    "q3_k_m": blocks("attn_v", "q5_k", [0, 1]) | blocks("attn_v", "q4_k", ALL_32[2:])
    | blocks("ffn_down", "q5_k", [0, 1]) | blocks("ffn_down", "q4_k", ALL_32[2:])
    | blocks("attn_output", "q4_k", ALL_32),
    "q3_k_l": blocks("attn_v", "q5_k", ALL_32) | blocks("ffn_down", "q5_k", ALL_32)
    | blocks("attn_output", "q5_k", ALL_32),
    "q4_k_s": blocks("attn_v", "q5_k", [0, 1, 2, 3]) | blocks("ffn_down", "q5_k", [0, 1, 2, 3]),
    "q4_k_m": blocks("attn_v", "q6_k", MORE_32) | blocks("ffn_down", "q6_k", MORE_32),
    "q5_k_s": {},
    "q5_k_m": blocks("attn_v", "q6_k", MORE_32) | blocks("ffn_down", "q6_k", MORE_32),
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES)
def test_types_of_a_model_of_32_blocks(mixture: str) -> None:
    assert others(mixture, MixedModel(32)) == OF_32[mixture]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_head_has_six_bits_and_so_has_an_embedding_that_is_one(mixture: str) -> None:
    two, one = MixedModel(2), MixedModel(2, own_head=False)
    base = MIXTURES[mixture].base
    assert type_in_mixture(mixture, "output.weight", two) == "q6_k"
    assert type_in_mixture(mixture, "token_embd.weight", two) == base
    assert type_in_mixture(mixture, "token_embd.weight", one) == "q6_k"


@given(st.integers(1, 130), st.sampled_from(["q4_k_m", "q5_k_m"]), st.sampled_from(["attn_v", "attn_qkv", "ffn_down"]))
def test_blocks_that_suffer_most(layers: int, mixture: str, part: str) -> None:
    """The first eighth, the last, and every third from the second after the first eighth."""
    more = {*range(layers // 8), *range(7 * layers // 8, layers), *range(layers // 8 + 2, layers, 3)}
    model = MixedModel(layers)
    found = {i for i in range(layers) if type_in_mixture(mixture, f"blk.{i}.{part}.weight", model) == "q6_k"}
    assert found == more


def test_eight_experts_and_seventy_billion_weights() -> None:
    """Mixtral: values and keys in 8 bits, what attention ends with in 5; experts as one tensor. Llama 70B: values in 5
    bits at least."""
    eight = MixedModel(32, experts=8)
    types = {part: type_in_mixture("q4_k_m", f"blk.4.{part}.weight", eight) for part in PARTS}
    assert types == dict.fromkeys(PARTS, "q4_k") | {"attn_v": "q8_0", "attn_k": "q8_0", "attn_output": "q5_k"}
    assert type_in_mixture("q4_k_m", "blk.3.ffn_down_exps.weight", eight) == "q6_k"
    assert type_in_mixture("q5_k_m", "blk.4.attn_output.weight", eight) == "q5_k", "the mixture's own"
    assert type_in_mixture("q3_k_l", "blk.4.attn_output.weight", eight) == "q3_k"
    large = MixedModel(80, is_70b=True)
    assert {type_in_mixture("q4_k_m", f"blk.{i}.attn_v.weight", large) for i in range(80)} == {"q5_k", "q6_k"}
    assert {type_in_mixture("q3_k_s", f"blk.{i}.attn_v.weight", large) for i in range(80)} == {"q5_k"}
    assert "q5_k" not in {type_in_mixture("q4_k_m", f"blk.{i}.ffn_down.weight", large) for i in range(80)}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_schemes_know_mixtures_by_name(mixture: str) -> None:
    scheme = Scheme.parse(mixture.upper())
    base = MIXTURES[mixture].base
    assert (scheme.name, scheme.weights) == (mixture, BLOCK_TYPES[base].grid)
    assert Scheme.parse(mixture.replace("_", "-")) == scheme
    mixed = scheme.in_blocks({"a": 256, "b": 512, "c": 64}, {"a": "q6_k", "c": "q6_k"})
    assert mixed.bits == {"a": "q6_k", "b": base, "c": "q8_0"} and mixed.name == mixture
    assert Scheme.read(mixed.recorded) == mixed
    assert scheme.in_blocks({"a": 256}, {"a": base}).bits == {}, "all as most"
