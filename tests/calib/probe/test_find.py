"""What is found by looking at what a block does is what a table of ten architectures says, and what papers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calib.blockwise.skeleton import skeleton
from calib.blockwise.walk import Walk
from calib.probe.find import block_kind, find_parts
from calib.probe.parts import FoundParts, ModelParts
from tests import any_type, tiny
from tests.architectures import ARCHITECTURES, architecture_of, sizes_of

CPU = torch.device("cpu")


def walk_of(config: Any) -> Walk:
    return Walk(skeleton(config, CPU), {"input_ids": torch.arange(10).view(2, 5), "use_cache": False})


def found(model_type: str) -> ModelParts:
    return find_parts(walk_of(any_type.config_of(model_type)))


def stems(names: tuple[str, ...] | list[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_ten_that_were_written_down(model_type: str) -> None:
    """Names as the library's class has them: a linear that it fuses or stacks is the whole of it."""
    config = tiny.config_of(model_type)
    a, sizes, parts = architecture_of(config), sizes_of(config), find_parts(walk_of(config))
    experts = {*a.gates, *a.ups, *a.downs} if a.experts else set()
    whole = {part: fused for fused, cut in a.fused.items() for part in cut}

    def named(names: tuple[str, ...]) -> set[str]:
        steps = {**dict.fromkeys((*a.gates, *a.ups), "gate_up_proj"), **dict.fromkeys(a.downs, "down_proj")}
        router = {} if a.router is None else {a.router[0].removesuffix(".weight"): a.router[1].removesuffix(".weight")}
        return {f"{a.experts}.{steps[n]}" if n in experts else router.get(n, whole.get(n, n)) for n in names}

    for block in parts.blocks:
        assert (block.obstacle is None) == (not a.writer_norms)
        weights = [name for name in block.writers if not name.endswith("bias")]
        assert stems(weights) == (named(a.writers) if not a.writer_norms else set())
        norms = {n.name: n for n in block.norms}
        assert [*norms] == [n for n in (a.attention_norm, a.mlp_norm) if n]
        for name, norm in norms.items():
            assert stems(norm.readers) == named(a.readers_of(name))
            assert norm.offset == a.gain_offset and norm.gain == f"{name}.weight" and norm.bias is None
        assert stems(block.bare) == (set() if norms else named((a.q, a.k, a.v, *a.gates, *a.ups)))
        assert not block.centred and dict.fromkeys(block.gains, a.gain_offset) == block.gains
        assert stems([*block.gains]) == {*a.norms}
        check_pairs(block, named((a.v,)) | named((a.o,)), named(a.ups[:1]) | named(a.downs[:1]), sizes)
        (planes,) = block.planes
        half = sizes.rotary_dim // 2
        assert planes.channels[:half] == tuple((c, c + half) for c in range(half))
        assert stems([planes.query, planes.key]) == ({a.q_norm, a.k_norm} if a.k_norm else named((a.q, a.k)))
        assert (planes.heads, planes.group, planes.width) == (sizes.kv_heads, sizes.group, sizes.head_dim)
        assert planes.turns == (a.k_norm is None) and len(planes.keys) in (1, sizes.kv_heads)
        (layer,) = block.attention
        assert (layer.name, layer.heads, layer.kv_heads) == (a.attention, sizes.heads, sizes.kv_heads)
    (final,) = parts.end.norms
    assert (final.name, stems(final.readers), final.offset) == (a.final_norm, {a.head}, a.gain_offset)
    assert stems(parts.start.writers) == {a.embed}


def check_pairs(block: FoundParts, values: set[str], feed_forward: set[str], sizes: Any) -> None:
    heads, ups = block.pairs
    assert {*stems([heads.source, heads.target])} == values and heads.rotates
    h, first = sizes.head_dim, heads.rows[0][0]
    assert heads.rows == tuple(tuple(range(first + g * h, first + g * h + h)) for g in range(sizes.kv_heads))
    columns = [c for group in heads.columns for copy in group for c in copy]
    assert columns == list(range(sizes.heads * h)) and len(heads.columns[0]) == sizes.group
    assert {*stems([ups.source, ups.target])} == feed_forward and not ups.rotates
    assert len(ups.rows[0]) == sizes.ffn and ups.columns == ((tuple(range(sizes.ffn)),),)


def test_values_inside_a_fused_projection() -> None:
    """GPT-2 lays queries, keys and values side by side, GPT-NeoX head by head, Falcon has one value head for all."""
    for model_type, first, heads in (("gpt2", 128, 4), ("gpt_neox", 32, 4), ("falcon", 80, 1)):
        pair = next(p for p in found(model_type).blocks[0].pairs if p.rotates)
        assert pair.rows[0] == tuple(range(first, first + 16)) and len(pair.rows) == heads, model_type


def test_rotary_embeddings_of_every_layout() -> None:
    """Halves (Llama), neighbours (Cohere 2, GLM), a leading part (GPT-NeoX), none where position is added (GPT-2)."""
    for model_type, some in (
        ("llama", (0, 8)), ("cohere2", (0, 1)), ("glm", (0, 1)), ("gpt_neox", (0, 2)), ("stablelm", (0, 2)),
    ):  # fmt: skip
        planes = [p for block in found(model_type).blocks for p in block.planes]
        if planes:
            assert planes[0].channels[0] == some, model_type
    alone = found("gpt2").blocks[0].planes[0]
    assert len(alone.channels) == 8 and len({c for pair in alone.channels for c in pair}) == 16


def test_compressed_values() -> None:
    """DeepSeek's second key/value projection makes of the latent, head by head, keys and then values."""
    block = found("deepseek_v3").blocks[-1]
    pair = next(p for p in block.pairs if p.rotates)
    assert pair.source == "self_attn.kv_b_proj.weight" and pair.target == "self_attn.o_proj.weight"
    assert pair.rows[0] == tuple(range(16, 32)) and pair.rows[1] == tuple(range(48, 64))
    assert {m.name for m in block.matrices.values() if m.router} == {"mlp.gate.weight"}


def test_what_gates_change_scales_alone_and_clamps_nothing() -> None:
    """Qwen3-Next gates what attention gives; gpt-oss clamps, and adds one to, what its experts' first step gives."""
    gated = [p for block in found("qwen3_next").blocks for p in block.pairs]
    assert gated and not any(p.rotates for p in gated)
    assert {p.target for block in found("gpt_oss").blocks for p in block.pairs} == {"self_attn.o_proj.weight"}


def test_a_clamp_that_small_values_do_not_reach() -> None:
    config = any_type.config_of("olmo")
    config.clip_qkv = 8.0
    assert [p.target for block in find_parts(walk_of(config)).blocks for p in block.pairs] == [
        "mlp.down_proj.weight"
    ] * 4
    config.clip_qkv = None
    assert any(p.rotates for block in find_parts(walk_of(config)).blocks for p in block.pairs)


def test_post_norms_and_scaled_streams_are_obstacles() -> None:
    for model_type, words in (
        ("bert", "no sum"), ("gemma2", "norm or a gain stands between self_attn.o_proj"), ("olmo2", "norm or a gain"),
        ("gemma4_text", "told of more"), ("hy_v4", "several streams"),
    ):  # fmt: skip
        obstacle = found(model_type).obstacle
        assert obstacle is not None and words in obstacle, model_type


def test_blocks_that_differ_in_a_setting_alone_are_looked_at_apart() -> None:
    """Every fourth block of SmolLM3 has no rotary embedding."""
    walk = walk_of(any_type.config_of("smollm3"))
    assert len({block_kind(module) for module in walk.modules}) == 2
    planes = [block.planes[0].channels for block in find_parts(walk).blocks]
    assert planes[0] == planes[1] == tuple((c, c + 8) for c in range(8)) == planes[3]


def test_nothing_depends_on_names() -> None:
    """The parts of GPT-J by what they do: one norm feeds attention and feed-forward, which both write."""
    block = found("gptj").blocks[0]
    (norm,) = block.norms
    assert norm.bias is not None and block.centred
    assert stems(norm.readers) == {"attn.k_proj", "attn.v_proj", "attn.q_proj", "mlp.fc_in"}
    assert stems([w for w in block.writers if w.endswith("weight")]) == {"attn.out_proj", "mlp.fc_out"}
