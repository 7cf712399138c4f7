"""Transforms change the weights and not the function; the published mistakes do change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.blockwise.architectures import (
    ARCHITECTURES,
    Architecture,
    Sizes,
    architecture_of,
    assembled,
    downs,
    separated,
    sizes_of,
)
from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from calib.quant.scheme import Grid
from compressor.engine.rotations import hadamard
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms
from compressor.quantization.transforms import (
    BlockTransform,
    absorb_gains,
    fold_block,
    fold_embedding,
    fold_head,
    unsupported_transforms,
)
from tests import tiny

ALONE = (
    "nothing",
    "residual",
    "attention_scale",
    "mlp_scale",
    "value_scale",
    "up_scale",
    "key_scale",
    "key_angle",
    "value_rotation",
    "key_rotation",
    "hadamard_down",
    "all",
)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 2 + 0.3


def random_transform(t: BlockTransform, which: str) -> BlockTransform:
    new = {
        "attention_scale": positive(*t.attention_scale.shape),
        "mlp_scale": positive(*t.mlp_scale.shape),
        "value_scale": positive(*t.value_scale.shape),
        "up_scale": positive(*t.up_scale.shape),
        "key_scale": positive(*t.key_scale.shape),
        "key_angle": torch.randn(t.key_angle.shape, dtype=torch.float64),  # ignored where the anatomy has no room
        "value_rotation": orthogonal(*t.value_rotation.shape),
    }
    return replace(t, **(new if which == "all" else {k: v for k, v in new.items() if k == which}))


class Case:
    """A tiny model in float64 and its blocks, transformed by whatever `fold` makes of them."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model = tiny.model_of(tiny.config_of(model_type))
        tiny.save(self.model, folder)
        self.stream = BlockwiseModel(self.model.config, Weights(folder), torch.device("cpu"), torch.float64)
        self.ids = torch.randint(tiny.VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
        self.expected = self.model(self.ids).logits

    def logits(
        self,
        which: str,
        fold: Callable[[dict[str, Tensor], BlockTransform], dict[str, Tensor]] | None = None,
        head_of: Callable[[Tensor, Tensor, Tensor], Tensor] = fold_head,
        embedding_of: Callable[[Tensor, Tensor], Tensor] = fold_embedding,
    ) -> Tensor:
        s, outer = self.stream, self.stream.read_outer()
        r: Tensor | None = orthogonal(24, 24) if which in ("residual", "all") else torch.eye(24).double()
        if "residual_rotation" in unsupported_transforms(s.config):
            r = None
        if r is not None:
            gain = self.final_gain
            outer["lm_head.weight"] = head_of(outer["lm_head.weight"], gain, r)
            outer["model.embed_tokens.weight"] = embedding_of(outer["model.embed_tokens.weight"], r)
            outer["model.norm.weight"] = torch.ones_like(gain) - self.a.gain_offset
        batch = s.batch(self.ids)
        hidden = s.start(batch, outer)
        for i in range(s.layers):
            down = downs(s.config, s.linears(i)) if which in ("hadamard_down", "all") else frozenset()
            keys = orthogonal(self.sizes.kv_heads, 8, 8) if which in ("key_rotation", "all") else None
            online = RuntimeTransforms(hadamard=down, key_rotation=keys)
            t = random_transform(BlockTransform.identity(self.sizes, self.a), which)
            params = absorb_gains(self.parts(i), self.a)
            if fold is not None:
                params = fold(params, t)
            else:
                params = fold_block(params, t, r, self.a, self.sizes, hadamard_down=bool(down))
            with runtime_transforms(s, i, online):
                hidden = s.run(i, assembled(params, s.config), hidden, batch)
        return torch.stack([s.logits(row, outer) for row in hidden])

    @property
    def a(self) -> Architecture:
        return architecture_of(self.stream.config)

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.stream.config)

    @property
    def final_gain(self) -> Tensor:
        return self.stream.read_end()["model.norm.weight"] + self.a.gain_offset

    def parts(self, index: int) -> dict[str, Tensor]:
        """One tensor for each linear of a block."""
        return separated(self.stream.read_block(index), self.stream.config)


@pytest.fixture(params=sorted(ARCHITECTURES))
def case(request: pytest.FixtureRequest, tmp_path: Path, exact_norms: None) -> Case:
    return Case(request.param, tmp_path)


@pytest.mark.parametrize("which", ALONE)
def test_every_transform_leaves_the_function_alone(case: Case, which: str) -> None:
    assert (case.logits(which) - case.expected).abs().max() < 1e-9


# What published code does instead.  Each of these must change the function, or the test above proves nothing.


@pytest.fixture
def llama(tmp_path: Path, exact_norms: None) -> Case:
    return Case("llama", tmp_path)


def scaled_rows(params: dict[str, Tensor], linear: str, scale: Tensor) -> None:
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in params:
            params[name] = params[name] * scale.reshape(-1, *[1] * (params[name].ndim - 1))


def test_scales_free_over_the_head_dimension_do_not_commute_with_the_rotary_embedding(llama: Case) -> None:
    """OSTQuant issue #21: one free scale for each channel of queries and keys."""

    def fold(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        scale = positive(2, 8)
        scaled_rows(params, "self_attn.k_proj", scale.flatten())
        scaled_rows(params, "self_attn.q_proj", 1 / scale.repeat_interleave(2, 0).flatten())
        return params

    assert (llama.logits("nothing", fold) - llama.expected).abs().max() > 1e-2


def test_the_value_scale_belongs_to_the_columns_of_the_output(llama: Case) -> None:
    """OSTQuant quant_ops.py:199 scales the output's rows while training."""

    def columns(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        scale = positive(16)
        scaled_rows(params, "self_attn.v_proj", 1 / scale)
        by_query_head = scale.view(2, 1, 8).expand(2, 2, 8).flatten()
        params["self_attn.o_proj.weight"] = params["self_attn.o_proj.weight"] * by_query_head
        return params

    def rows(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        scale = positive(16)
        scaled_rows(params, "self_attn.v_proj", 1 / scale)
        full = torch.ones(24, dtype=torch.float64)
        full[:16] = scale
        params["self_attn.o_proj.weight"] = params["self_attn.o_proj.weight"] * full[:, None]
        return params

    assert (llama.logits("nothing", columns) - llama.expected).abs().max() < 1e-9
    assert (llama.logits("nothing", rows) - llama.expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_bias_of_values_turns_with_them(model_type: str, tmp_path: Path, exact_norms: None) -> None:
    case = Case(model_type, tmp_path)

    def fold(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        turned = replace(t, value_rotation=orthogonal(2, 8, 8))
        eye = torch.eye(24, dtype=torch.float64)
        folded = fold_block(params, turned, eye, case.a, case.sizes, hadamard_down=False)
        folded["self_attn.v_proj.bias"] = params["self_attn.v_proj.bias"]
        return folded

    assert (case.logits("nothing", fold) - case.expected).abs().max() > 1e-2


def test_a_tied_embedding_cannot_take_the_final_gain(llama: Case) -> None:
    gain = llama.final_gain
    tied = llama.logits("residual", embedding_of=lambda e, r: fold_embedding(e * gain, r))
    assert (tied - llama.expected).abs().max() > 1e-2


def test_centring_embeddings_changes_a_model_with_rms_norms(llama: Case) -> None:
    """Sound under layer norms; OSTQuant's `sub_mean` and llm-compressor's SpinQuant do it under RMS norms."""
    centred = llama.logits("nothing", embedding_of=lambda e, r: e - e.mean(-1, keepdim=True))
    assert (centred - llama.expected).abs().max() > 1e-2


def test_key_scales_cannot_pass_through_norms_of_queries_and_keys(tmp_path: Path, exact_norms: None) -> None:
    case = Case("qwen3", tmp_path)

    def fold(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        scale = positive(2, 4).repeat(1, 2)  # tied over rotary pairs, yet in the weights before the norm
        scaled_rows(params, "self_attn.k_proj", scale.flatten())
        scaled_rows(params, "self_attn.q_proj", 1 / scale.repeat_interleave(2, 0).flatten())
        return params

    assert (case.logits("nothing", fold) - case.expected).abs().max() > 1e-2


def test_training_and_merging_are_one_code_path(llama: Case) -> None:
    """Folding in float32 with a graph gives what folding in float64 gives, to rounding."""
    a, sizes = llama.a, llama.sizes
    t = random_transform(BlockTransform.identity(sizes, a), "all")
    r = orthogonal(24, 24)
    exact = fold_block(absorb_gains(llama.parts(0), a), t, r, a, sizes, hadamard_down=True)
    single = {name: p.float() for name, p in absorb_gains(llama.parts(0), a).items()}
    learned = fold_block(single, t.to(torch.float32), r.float(), a, sizes, hadamard_down=True)
    for name in exact:
        assert torch.allclose(exact[name].float(), learned[name], atol=1e-4, rtol=1e-4), name


def test_a_hadamard_at_the_down_projection_needs_its_partner(llama: Case) -> None:
    def fold(params: dict[str, Tensor], t: BlockTransform) -> dict[str, Tensor]:
        eye = torch.eye(24, dtype=torch.float64)
        return fold_block(params, t, eye, llama.a, llama.sizes, hadamard_down=True)

    assert (llama.logits("nothing", fold) - llama.expected).abs().max() > 1e-2


def test_quantized_keys_see_the_rotation(llama: Case) -> None:
    """Function-preserving means nothing for a rotation that never reaches the grid: under 3-bit keys it must matter."""
    s, results = llama.stream, []
    for rotation in (None, torch.stack([hadamard(8)] * 2)):
        batch = s.batch(llama.ids)
        hidden = s.start(batch, s.read_start())
        with runtime_transforms(s, 0, RuntimeTransforms(kv=Grid(3, symmetric=False), key_rotation=rotation)):
            results.append(s.run(0, s.read_block(0), hidden, batch))
    assert (results[0] - results[1]).abs().max() > 1e-3
