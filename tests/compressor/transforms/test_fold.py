"""Transforms change the weights and not the function; the published mistakes do change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.probe.find import found_parts
from calib.probe.parts import ModelParts
from calib.quant.grid_types import Grid
from compressor.engine.rotations import Reflections, hadamard, nearest_orthogonal, to_ones, with_ones_fixed
from compressor.engine.runtime_transforms import RuntimeTransforms, downs, runtime_transforms
from compressor.transforms.fold import BlockFold, BlockTransform, DenseTurn, fold_block, folded_block, folded_outer
from compressor.transforms.proof import parts_of, random_transform
from tests import any_type, tiny

CPU = torch.device("cpu")
TEN = ["gemma2", "gemma3_text", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"]
FAMILIES = [
    "cohere2", "deepseek_v3", "falcon", "glm", "gpt2", "gpt_neox", "gpt_oss", "granitemoe", "lfm2", "llama4_text",
    "opt", "phi", "qwen3_next", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
KINDS = ("norm_scales", "pair_scales", "pair_rotations", "plane_scales", "plane_angles")
Fold = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def orthogonal(*shape: int) -> Tensor:
    return nearest_orthogonal(torch.randn(*shape, dtype=torch.float64))


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 2 + 0.3


class Case:
    """A small model in double precision, and its blocks transformed by whatever `fold` makes of them."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        tiny.save(model, folder)
        self.stream = BlockwiseModel(read_config(folder), Weights(folder), CPU, torch.float64)
        self.ids = torch.randint(3, self.stream.vocab, (2, 17), generator=torch.Generator().manual_seed(1))
        self.parts: ModelParts = parts_of(self.stream)
        assert self.parts == found_parts(self.stream), "what the proof leaves out would not be tested here"
        with torch.no_grad():
            self.expected = model(input_ids=self.ids, use_cache=False).logits

    def turn(self) -> DenseTurn | None:
        if self.parts.obstacle:
            return None
        d = self.stream.hidden
        return DenseTurn(with_ones_fixed(orthogonal(d - 1, d - 1)) if self.parts.centred else orthogonal(d, d))

    @torch.no_grad()
    def logits(
        self, *kinds: str, turn: DenseTurn | None = None, fold: Fold | None = None, online: bool = False
    ) -> Tensor:
        """Of the transformed model; `online`: with a Hadamard before down projections and rotated keys."""
        s, outer = self.stream, self.stream.read_outer()
        if turn is not None:
            outer = folded_outer(outer, self.parts, turn, dict.fromkeys(outer, torch.float64))
        batch = s.batch(self.ids, outer)
        hidden = s.start(batch, outer)
        for i, found in enumerate(self.parts.blocks):
            keys = [orthogonal(layer.kv_heads, layer.width, layer.width) for layer in found.attention]
            down = downs(found, s.linears(i)) if online else frozenset()
            beside = RuntimeTransforms(hadamard=down, key_rotation=keys[0] if online and len(keys) == 1 else None)
            every = random_transform(found, seed=i)
            t = BlockTransform(**{kind: of for kind, of in every.kinds.items() if kind in kinds})
            if "pair_rotations" in kinds and "pair_scales" not in kinds:
                t = replace(t, pair_scales={name: torch.ones_like(x) for name, x in every.pair_scales.items()})
            if "plane_angles" in kinds and "plane_scales" not in kinds:
                t = replace(t, plane_scales={name: torch.ones_like(x) for name, x in every.plane_scales.items()})
            params = s.read_block(i)
            params = fold_block(params, BlockFold(found), t, turn, s.linears(i), hadamard=down)
            params = params if fold is None else fold(params)
            with runtime_transforms(s, i, beside):
                hidden = s.run(i, params, hidden, batch)
        return torch.stack([s.logits(row, outer) for row in hidden])

    def apart(self, *kinds: str, **how: Any) -> float:
        """By how much logits differ, of the largest."""
        return float((self.logits(*kinds, **how) - self.expected).abs().max() / self.expected.abs().max())


def of_the_ten(model_type: str, folder: Path) -> Case:
    return Case(tiny.model_of(tiny.config_of(model_type)), folder)


@pytest.fixture(params=[*TEN, *FAMILIES])
def case(request: pytest.FixtureRequest, tmp_path: Path, double_kept: None) -> Case:
    if request.param in TEN:
        return of_the_ten(request.param, tmp_path)
    return Case(any_type.model_of(request.param), tmp_path)


def test_every_transform_leaves_the_function_alone(case: Case) -> None:
    """Each kind alone, all together, and all with what runs beside them."""
    for kind in KINDS:
        assert case.apart(kind) < 1e-9, kind
    assert case.apart(turn=case.turn()) < 1e-9
    assert case.apart(*KINDS, turn=case.turn()) < 1e-9
    assert case.apart(*KINDS, turn=case.turn(), online=True) < 1e-9


def test_every_kind_changes_the_weights(case: Case) -> None:
    """Where something of it was found; or the test above would prove nothing."""
    for i, found in enumerate(case.parts.blocks):
        every, before = random_transform(found), case.stream.read_block(i)
        for kind, of in every.kinds.items():
            if of:
                scales = {"pair_rotations": "pair_scales", "plane_angles": "plane_scales"}.get(kind, kind)
                t = BlockTransform(**{scales: every.kinds[scales], kind: of})
                after = fold_block(before, BlockFold(found), t, None, case.stream.linears(i))
                assert any(not torch.equal(after[name], before[name]) for name in before), kind


def test_training_and_merging_are_one_code_path(case: Case) -> None:
    """Folding in single precision with a graph gives what folding in double precision gives, to rounding."""
    found, linears, turn = case.parts.blocks[0], case.stream.linears(0), case.turn()
    t, params = random_transform(found), case.stream.read_block(0)
    exact = folded_block(params, BlockFold(found), t, turn, linears)
    single = {name: p.float() if p.is_floating_point() else p for name, p in params.items()}
    short = None if turn is None else DenseTurn(turn.r.float())
    learned = fold_block(single, BlockFold(found), t.to(torch.float32), short, linears)
    for name, p in exact.items():
        assert torch.allclose(p.float(), learned[name].float(), atol=1e-4, rtol=1e-3), name


# What published code does instead.  Each of these must change the function, or the tests above prove nothing.


@pytest.fixture
def llama(tmp_path: Path, double_kept: None) -> Case:
    return of_the_ten("llama", tmp_path)


def scaled_rows(params: dict[str, Tensor], linear: str, scale: Tensor) -> None:
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in params:
            params[name] = params[name] * scale.reshape(-1, *[1] * (params[name].ndim - 1))


def test_scales_free_over_the_head_dimension_do_not_commute_with_the_rotary_embedding(llama: Case) -> None:
    """OSTQuant issue #21: one free scale for each channel of queries and keys."""

    def fold(params: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = positive(2, 8)
        scaled_rows(params, "self_attn.k_proj", scale.flatten())
        scaled_rows(params, "self_attn.q_proj", 1 / scale.repeat_interleave(2, 0).flatten())
        return params

    assert llama.apart(fold=fold) > 1e-3


def test_the_value_scale_belongs_to_the_columns_of_the_output(llama: Case) -> None:
    """OSTQuant quant_ops.py:199 scales the output's rows while training."""

    def columns(params: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = positive(16)
        scaled_rows(params, "self_attn.v_proj", 1 / scale)
        by_query_head = scale.view(2, 1, 8).expand(2, 2, 8).flatten()
        params["self_attn.o_proj.weight"] = params["self_attn.o_proj.weight"] * by_query_head
        return params

    def rows(params: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = positive(16)
        scaled_rows(params, "self_attn.v_proj", 1 / scale)
        full = torch.ones(24, dtype=torch.float64)
        full[:16] = scale
        params["self_attn.o_proj.weight"] = params["self_attn.o_proj.weight"] * full[:, None]
        return params

    assert llama.apart(fold=columns) < 1e-9
    assert llama.apart(fold=rows) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_bias_of_values_turns_with_them(model_type: str, tmp_path: Path, double_kept: None) -> None:
    case = of_the_ten(model_type, tmp_path)
    biases = [case.stream.read_block(i)["self_attn.v_proj.bias"] for i in range(2)]

    def fold(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return params | {"self_attn.v_proj.bias": biases[0]}

    assert case.apart("pair_rotations", fold=fold) > 1e-3


def test_a_tied_embedding_cannot_take_the_final_gain(llama: Case) -> None:
    turn, outer = llama.turn(), llama.stream.read_outer()
    assert turn is not None
    once = folded_outer(outer, llama.parts, turn, dict.fromkeys(outer, torch.float64))
    assert not torch.equal(once["lm_head.weight"], once["model.embed_tokens.weight"])
    gain = outer["model.norm.weight"]
    assert torch.allclose(once["lm_head.weight"], (outer["lm_head.weight"] * gain) @ turn.r)


def test_key_scales_cannot_pass_through_norms_of_queries_and_keys(tmp_path: Path, double_kept: None) -> None:
    case = of_the_ten("qwen3", tmp_path)

    def fold(params: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = positive(2, 4).repeat(1, 2)  # tied over rotary pairs, yet in the weights before the norm
        scaled_rows(params, "self_attn.k_proj", scale.flatten())
        scaled_rows(params, "self_attn.q_proj", 1 / scale.repeat_interleave(2, 0).flatten())
        return params

    assert case.apart(fold=fold) > 1e-3


def test_a_rotation_that_moves_the_ones_changes_a_model_with_layer_norms(tmp_path: Path, double_kept: None) -> None:
    """What SliceGPT (arXiv:2401.15024) converts LayerNorm to RMSNorm for is not needed with R 1 = 1."""
    case = Case(any_type.model_of("gpt2"), tmp_path)
    d = case.stream.hidden
    assert case.parts.centred and case.apart(turn=DenseTurn(with_ones_fixed(orthogonal(d - 1, d - 1)))) < 1e-9
    assert case.apart(turn=DenseTurn(orthogonal(d, d))) > 1e-3


def test_a_hadamard_at_the_down_projection_needs_its_partner(llama: Case) -> None:
    found, s = llama.parts.blocks[0], llama.stream
    down = downs(found, s.linears(0))
    assert down == {"model.layers.0.mlp.down_proj"}
    params = fold_block(
        s.read_block(0), BlockFold(found), BlockTransform(), None, s.linears(0), hadamard=down
    )  # fmt: skip
    hidden = s.start(s.batch(llama.ids), s.read_start())
    one, other = (s.run(0, p, hidden, s.batch(llama.ids)) for p in (params, s.read_block(0)))
    assert (one - other).abs().max() > 1e-2


def test_quantized_keys_see_the_rotation(llama: Case) -> None:
    """Function-preserving means nothing for a rotation that never reaches the grid: under 3-bit keys it must matter."""
    s, results = llama.stream, []
    for rotation in (None, torch.stack([hadamard(8)] * 2)):
        batch = s.batch(llama.ids)
        hidden = s.start(batch, s.read_start())
        with runtime_transforms(s, 0, RuntimeTransforms(kv=Grid(3, symmetric=False), key_rotation=rotation)):
            results.append(s.run(0, s.read_block(0), hidden, batch))
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_rotations_beside_the_ones() -> None:
    r = with_ones_fixed(orthogonal(11, 11))
    ones = torch.ones(12, dtype=torch.float64)
    assert torch.allclose(r @ ones, ones) and torch.allclose(r @ r.mT, torch.eye(12, dtype=torch.float64))
    back = to_ones(to_ones(r).mT).mT
    assert torch.allclose(with_ones_fixed(back[1:, 1:]), r)


def test_reflections_are_the_matrix_that_they_multiply_to() -> None:
    axes = torch.nn.functional.normalize(torch.randn(2, 7, dtype=torch.float64), dim=-1)
    some = Reflections(axes)
    r = some.columns(torch.eye(7, dtype=torch.float64))
    w = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(r @ r.mT, torch.eye(7, dtype=torch.float64)) and not torch.allclose(r, r.mT)
    assert torch.allclose(some.columns(w), w @ r) and torch.allclose(some.rows(w.mT), r.mT @ w.mT)
