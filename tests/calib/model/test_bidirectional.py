"""Attention in both directions against scores taken pair by pair, and the loss of hidden tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from calib import BadInput
from calib.model.bidirectional import bico_loss, bidirectional_logits, bidirectional_scores, hidden_tokens
from tests import tiny


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (first half, second half) turned by an angle each."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@given(st.integers(0, 1000))
def test_scores_are_of_distances(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 7, 6, generator=g, dtype=torch.float64).unbind()
    speeds, place = torch.rand(3, generator=g, dtype=torch.float64), torch.arange(7).double()
    angles = place[:, None] * speeds
    found = bidirectional_scores(turned(q, angles), turned(k, angles), turned(q, -angles), turned(k, -angles))
    usual = turned(q, angles) @ turned(k, angles).mT
    for i in range(7):
        for j in range(7):
            assert found[i, j].item() == pytest.approx(float(turned(q[i], abs(i - j) * speeds) @ k[j]), abs=1e-6)
    assert torch.equal(found.tril(), usual.tril()) and not torch.allclose(found, usual)


def drawn(kind: str, layers: int = 2, **more: Any) -> Any:
    """A model in double precision with large weights, so that attention is sharp."""
    base = {"num_hidden_layers": layers, "pad_token_id": 2}
    return tiny.model_of(tiny.config_of(kind, **(base | more)))


IDS = torch.tensor([[5, 9, 3, 40, 17, 8, 22], [6, 7, 11, 12, 2, 2, 2]])
REAL = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi", "cohere", "gemma2"])
def test_attention_of_a_block_against_pairs(kind: str) -> None:
    """Grouped queries, normed ones, a part that is rotated, pairs that lie side by side, capped scores and windows."""
    model = drawn(kind, **({"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma2" else {}))
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    library, seen = sys.modules[type(attention).__module__], dict[str, Tensor]()
    config, plain = model.config, library.apply_rotary_pos_emb

    def before_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.setdefault("q", q), seen.setdefault("k", k)
        seen.setdefault("cos", cos), seen.setdefault("sin", sin)
        return plain(q, k, cos, sin, **options)  # type: ignore[no-any-return]

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given, made=None: seen.update({name: seen.get(name, given[0] if made is None else made)})

    out = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    parts = {"v": attention.v_proj, "whole q": attention.q_proj, "whole k": attention.k_proj}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    hooks.append(out.register_forward_pre_hook(keep("out")))
    library.apply_rotary_pos_emb = before_rotation
    try:
        bidirectional_logits(model, IDS, REAL)
    finally:
        library.apply_rotary_pos_emb = plain
        for hook in hooks:
            hook.remove()
    h, width, n = attention.head_dim, seen["q"].shape[-1], 7
    heads = config.num_attention_heads

    def split(name: str) -> Tensor:
        return seen[name].view(2, n, -1, h).transpose(1, 2)

    q, k = (torch.cat([seen[name], split(f"whole {name}")[..., width:]], -1) for name in "qk")  # a part is not rotated
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, split("v")))
    scores = torch.zeros(2, heads, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            at, own = slice(abs(i - j), abs(i - j) + 1), q[:, :, i : i + 1]
            turned_part, _ = plain(own[..., :width], own[..., :width], seen["cos"][:, at], seen["sin"][:, at])
            scores[:, :, i, j] = (torch.cat([turned_part, own[..., width:]], -1)[:, :, 0] * k[:, :, j]).sum(-1)
    scores = scores * attention.scaling
    if kind == "gemma2":
        scores = 2.0 * (scores / 2.0).tanh()
        place = torch.arange(n)
        scores = scores.masked_fill((place[:, None] - place).abs() >= 5, -torch.inf)
    weights = scores.masked_fill(~REAL[:, None, None], -torch.inf).softmax(-1)
    expected = (weights @ v).transpose(1, 2).reshape(2, n, -1)
    assert torch.allclose(seen["out"][REAL], expected[REAL], atol=1e-6)


def test_what_a_last_position_sees() -> None:
    """Of one block it is what a causal model sees, as its row of scores is the lower triangle's; of two it is not, as
    the states that it looks at have looked ahead."""
    with torch.no_grad():
        for layers, same in ((1, True), (2, False)):
            model = drawn("llama", layers)
            both, causal = bidirectional_logits(model, IDS[:1], REAL[:1]), model(IDS[:1]).logits
            assert torch.allclose(both[:, -1], causal[:, -1], atol=1e-6) is same
            assert not torch.allclose(both[:, 0], causal[:, 0], atol=1e-3)
            assert torch.allclose(model(IDS[:1]).logits, causal), "the model is as it was"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hidden_tokens_are_seen_by_none(kind: str) -> None:
    """Neither what stands there nor padding changes an answer; what is visible does, from both sides."""
    model, visible = drawn(kind), REAL.clone()
    visible[:, 2] = False
    with torch.no_grad():
        given = bidirectional_logits(model, IDS, visible)
        other = IDS.clone()
        other[0, 2], other[1, 5] = 30, 31
        changed = bidirectional_logits(model, other, visible)
        others = torch.ones(2, 7, dtype=torch.bool)
        others[0, 2] = others[1, 4:] = False
        assert torch.allclose(given[others], changed[others], atol=1e-6)
        other = IDS.clone()
        other[0, 6] = 33
        assert not torch.allclose(bidirectional_logits(model, other, visible)[0, 2], given[0, 2], atol=1e-4)


@given(st.integers(0, 500), st.floats(0.01, 0.99))
def test_which_tokens_are_hidden(seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(40) < torch.randint(0, 41, (6, 1), generator=g)
    hidden = hidden_tokens(mask, share, g)
    assert not (hidden & ~mask).any()
    for row, real in zip(hidden.sum(1).tolist(), mask.sum(1).tolist(), strict=True):
        assert row == (0 if real < 2 else min(real - 1, max(1, round(real * share))))


def test_the_loss_against_the_library_and_its_gradient() -> None:
    model = drawn("llama").requires_grad_()
    hidden = hidden_tokens(REAL, 0.3, torch.Generator().manual_seed(4))
    loss = bico_loss(model, IDS, REAL, hidden).sum()
    assert hidden.sum(1).tolist() == [2, 1]
    logits = bidirectional_logits(model, IDS.masked_fill(hidden, 2), REAL & ~hidden)
    each = [-logits[i, t].log_softmax(-1)[IDS[i, t]].item() for i, t in hidden.nonzero().tolist()]
    assert loss.item() == pytest.approx(sum(each[:2]) / 2 + each[2], rel=1e-6)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (slope,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        direction, ends = torch.randn_like(slope), []
        for sign in (1, -1):
            weight += sign * 3e-4 * direction
            ends.append(bico_loss(model, IDS, REAL, hidden).sum().item())
            weight -= sign * 3e-4 * direction
    assert (ends[0] - ends[1]) / 6e-4 == pytest.approx(float((slope * direction).sum()), rel=5e-3)  # norms are single
    alone = torch.zeros(1, 7, dtype=torch.bool)
    alone[0, 0] = True
    none = hidden_tokens(alone, 0.3, torch.Generator())
    assert not none.any() and bico_loss(model, IDS[:1], alone, none).item() == 0, "a token alone is never hidden"


def test_a_model_learns_to_fill_in() -> None:
    """Trained on one sentence, it tells a hidden token from what comes after alone."""
    torch.manual_seed(0)
    config = tiny.config_of("llama", hidden_size=32, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(config).float()
    rows = torch.stack([torch.tensor([a, 20, 21, 22, a + 10]) for a in range(3, 9)]).repeat(4, 1)
    mask, g = torch.ones_like(rows, dtype=torch.bool), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        bico_loss(model, rows, mask, hidden_tokens(mask, 0.2, g)).mean().backward()
        optimizer.step()
    first = torch.zeros_like(mask)
    first[:, 0] = True
    with torch.no_grad():
        found = bidirectional_logits(model.eval(), rows.masked_fill(first, 2), mask & ~first)[:, 0].argmax(-1)
        assert (found == rows[:, 0]).double().mean() > 0.9
        assert (model(rows.masked_fill(first, 2)).logits[:, 0].argmax(-1) == rows[:, 0]).double().mean() < 0.5


def test_types_that_are_refused() -> None:
    for kind in ("gpt2", "opt"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=61, hidden_size=24))
        with pytest.raises(BadInput, match="is for rotary positions"):
            bidirectional_logits(model.eval(), IDS, REAL)
    model = drawn("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(BadInput, match="leave out gradient checkpointing"):
        bidirectional_logits(model, IDS, REAL)
