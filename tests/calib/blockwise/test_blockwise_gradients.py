"""Gradients that come block by block against each row's own, which the library makes of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.gradients import BlockwiseLinears, blockwise_gradients
from calib.blockwise.model import BlockwiseModel
from calib.model.per_example_gradients import LinearModule, linear_layers, projections
from calib.model.weights import Weights
from tests import exact, tiny
from tests.architectures import ARCHITECTURES


@pytest.fixture
def double_kept() -> Iterator[None]:
    with exact.keeping_double():
        yield


ROWS, TOKENS, EACH = 5, 11, 6
EXPERTS = ("mixtral", "qwen3_moe")  # whose experts are stacked outside of linears


def rows_of_tokens() -> tuple[Tensor, Tensor]:
    """Ids, and labels of answers alone: ragged, padded on the right, and one row with a single decision."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(tiny.VOCAB, (ROWS, TOKENS), generator=g)
    labels = ids.roll(-1, 1)
    place = torch.arange(TOKENS)
    first, last = torch.tensor([0, 3, 6, 2, 4]), torch.tensor([9, 8, 7, 3, 10])
    asked = (place >= first[:, None]) & (place < last[:, None])
    return ids.where(place <= last[:, None], 0), labels.where(asked, -100)


def totals_of(labels: Tensor):  # type: ignore[no-untyped-def]
    def totals(rows: slice, logits: Tensor) -> list[Tensor]:
        own = labels[rows]
        return [cross_entropy(logits, own[own != -100], reduction="sum"), logits.square().sum()]

    return totals


def blockwise(stream: BlockwiseModel, slices: list[slice], budget: int, folder: Path) -> list[Tensor]:
    """Of the two totals, (n, D) each, parts in order."""
    ids, labels = rows_of_tokens()
    linears = BlockwiseLinears(stream, EACH, seed=3)

    def store(shape: tuple[int, ...], dtype: torch.dtype) -> ActivationStore:
        return ActivationStore(shape, dtype, budget, folder)

    found = dict(blockwise_gradients(linears, ids, labels != -100, totals_of(labels), slices, store))
    assert list(found) == list(range(len(linears.parts)))[::-1]
    for part, of in found.items():
        assert [z.shape for z in of] == [(ROWS, sum(linears.sizes(part).values()))] * 2
    return [torch.cat([found[part][k] for part in sorted(found)], 1) for k in range(2)]


def whole(model: Any) -> list[Tensor]:
    """Each row alone, every weight's whole gradient by the library, then the projection of that."""
    ids, labels = rows_of_tokens()
    model.config._experts_implementation = "eager"  # the library's fast one knows no double precision
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings().weight
    linears = {n: one for n, one in linear_layers(model).items() if one.module.weight is not head}
    linears["head"] = LinearModule(model.lm_head, head.shape[1], head.shape[0])
    drawn = projections(linears, EACH, 3)
    params = {n: p.detach() for n, p in model.named_parameters() if p is not head}

    def loss(p: dict[str, Tensor], row: int, kind: int) -> Tensor:
        p = dict(p)
        own_head = p.pop("head")
        rest = p | {"model.embed_tokens.weight": head.detach()} if tied else p
        body = {n.removeprefix("model."): t for n, t in rest.items()}
        hidden = functional_call(model.model, body, (ids[row : row + 1],)).last_hidden_state[0]
        logits = hidden @ own_head.mT
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            logits = cap * (logits / cap).tanh()
        at = labels[row] != -100
        if kind == 0:
            return cross_entropy(logits[at], labels[row][at], reduction="sum")
        return logits[at].square().sum()

    results = []
    for kind in range(2):
        rows = []
        for row in range(ROWS):
            gradient = grad(lambda p, row=row, kind=kind: loss(p, row, kind))(params | {"head": head.detach()})
            parts = []
            for name, one in linears.items():
                g = gradient[name]
                if one.bias:
                    g = torch.cat([g, gradient[name.removesuffix("weight") + "bias"][:, None]], 1)
                p = drawn[name]
                parts.append((p.outs.double().mT @ g @ p.ins.double()).flatten())
            rows.append(torch.cat(parts))
        results.append(torch.stack(rows))
    return results


def stream_of(model: Any, folder: Path, dtype: torch.dtype) -> BlockwiseModel:
    return BlockwiseModel(model.config, Weights(tiny.save(model, folder / "model")), torch.device("cpu"), dtype)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.usefixtures("double_kept")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_they_are_projections_of_each_row_s_own_gradients(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of(model_type, tie_word_embeddings=tied))
    right = whole(model)
    stream = stream_of(model, tmp_path, torch.float64)
    for slices, budget in (([slice(0, 5)], 10**9), ([slice(0, 2), slice(2, 4), slice(4, 5)], 0)):
        found = blockwise(stream, slices, budget, tmp_path)
        assert all(apart(a, b) < 1e-10 for a, b in zip(found, right, strict=True))
    named = [name for part in BlockwiseLinears(stream, EACH, 3).parts for name in part]
    per_block = {"phi3": 4, **dict.fromkeys(EXPERTS, 4)}.get(model_type, 7)
    assert len(named) == 2 * per_block + 1


def test_in_single_precision_to_its_rounding(tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of("qwen2"), dtype=torch.float32)
    found = blockwise(stream_of(model, tmp_path, torch.float32), [slice(0, 3), slice(3, 5)], 0, tmp_path)
    assert all(apart(a.double(), b) < 1e-5 for a, b in zip(found, whole(model.double()), strict=True))
