"""Relations of attention (MiniLM v2) against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from calib import BadInput
from compressor.distillation.losses.relations import (
    attention_relations,
    projection_widths,
    projections_in,
    relation_divergence,
    watched_projections,
)


def by_loop(teacher: Tensor, student: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Row by row, head by head, query by query, over the real tokens alone."""
    rows = []
    for t, s, real in zip(teacher, student, mask, strict=True):
        t, s, total = t[real], s[real], 0.0
        for head in range(heads):
            parts = [x[:, head * (x.shape[1] // heads) : (head + 1) * (x.shape[1] // heads)] for x in (t, s)]
            for query in range(len(t)):
                p, q = ([math.exp(float(x[query] @ other) / math.sqrt(x.shape[1])) for other in x] for x in parts)
                p, q = ([value / sum(weights) for value in weights] for weights in (p, q))
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        rows.append(total / heads / max(1, len(t)))
    return torch.tensor(rows, dtype=torch.float64)


def drawn(width: int, seed: int) -> Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def test_the_loss_is_that_of_a_plain_loop_for_widths_that_differ() -> None:
    parts = [(drawn(12, i), drawn(8, 10 + i)) for i in range(3)]
    for heads in (1, 2, 4):
        each = [by_loop(t, s, MASK, heads) for t, s in parts]
        for (t, s), expected in zip(parts, each, strict=True):
            torch.testing.assert_close(relation_divergence(t, s, MASK, heads), expected, rtol=1e-9, atol=1e-12)
        teacher, student = zip(*parts, strict=True)
        torch.testing.assert_close(attention_relations(teacher, student, MASK, heads), sum(each, torch.zeros(())))


def test_twins_rotations_and_padding_cost_nothing() -> None:
    """Only products of vectors count, so a rotation within each head changes nothing; neither does what stands in
    padding; a scale does count."""
    t = drawn(8, 0)
    turned = torch.linalg.qr(drawn(4, 1)[0, :4])[0]
    s = (t.unflatten(-1, (2, 4)) @ turned).flatten(-2)
    noise = s.where(MASK[..., None], 100 * drawn(8, 2)).requires_grad_()
    value = relation_divergence(t, noise, MASK, 2)
    assert value.abs().max() < 1e-12
    value.sum().backward()
    assert noise.grad is not None and noise.grad.isfinite().all() and not noise.grad[~MASK].any()
    assert (relation_divergence(t, 2 * t, MASK, 2)[:2] > 0.01).all()


class Layer(nn.Module):
    def __init__(self, *names: str, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({name: nn.Linear(4, width) for name in names})


def test_projections_are_found_by_name_and_heard_in_order() -> None:
    for names in (("value", "key", "query"), ("v_lin", "q_lin", "k_lin"), ("q_proj", "k_proj", "v_proj", "o_proj")):
        layer = Layer(*names)
        found = projections_in(layer, "it")
        order = [next(name for name, one in layer.inner.items() if one is module) for module in found]
        assert [name[0] for name in order] == ["q", "k", "v"] and projection_widths(found) == [6, 6, 6]
        x = torch.randn(2, 3, 4)
        with watched_projections(found) as heard:
            outputs = {name: module(x) for name, module in layer.inner.items()}
        assert all(torch.equal(heard[number], outputs[name]) for number, name in enumerate(order))
    fused = Layer("Wqkv", width=18)
    found = projections_in(fused, "it")
    with watched_projections(found) as heard:
        whole = fused.inner["Wqkv"](x)
    assert torch.equal(torch.cat([heard[n] for n in range(3)], -1), whole) and projection_widths(found) == [6, 6, 6]
    assert not found[0]._forward_hooks
    for layer in (Layer("a", "b"), Layer("query", "key")):
        with pytest.raises(BadInput, match="are not found by name"):
            projections_in(layer, "it")
