from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from tests import tiny
from tests.architectures import (
    ARCHITECTURES,
    architecture_of,
    assembled,
    separated,
    sizes_of,
)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_saved_checkpoint_holds_what_is_expected_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    """Names and shapes of every tensor, against what the library writes."""
    model = tiny.model_of(tiny.config_of(model_type), dtype=torch.float32)
    stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"))
    stream.verify()
    assert stream.weights.entries.keys() == stream.expected.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_parameter_of_a_block_belongs_to_a_part_that_is_named(model_type: str, tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of(model_type), dtype=torch.float32)
    stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"))
    a, sizes = architecture_of(stream.config), sizes_of(stream.config)
    outputs = sizes.outputs(a)
    router = {a.router[0].removesuffix(".weight")} if a.router else set()
    params = separated(stream.read_block(0), stream.config)
    assert {name.rpartition(".")[0] for name in params} == {*a.linears, *a.norms, *router}
    for name, width in sizes.inputs(a):
        assert params[f"{name}.weight"].shape == (outputs[name], width)
    again = assembled(params, stream.config)
    assert again.keys() == stream.read_block(0).keys()
    assert all(torch.allclose(again[name], p, atol=1e-6) for name, p in stream.read_block(0).items())


def test_sizes_of_a_partial_rotary_embedding() -> None:
    config = AutoConfig.for_model("phi3", hidden_size=64, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    assert sizes_of(config).rotary_dim == 32
    config.rope_parameters["partial_rotary_factor"] = 0.75
    assert sizes_of(config).rotary_dim == 24
