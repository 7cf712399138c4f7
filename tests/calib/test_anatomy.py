from __future__ import annotations

import pytest

from calib.anatomy import ANATOMIES, sizes_of
from calib.stream import skeleton
from tests import tiny


@pytest.mark.parametrize("model_type", sorted(ANATOMIES))
def test_every_name_is_a_module_of_the_library_s_class(model_type: str) -> None:
    anatomy, config = ANATOMIES[model_type], tiny.config_of(model_type)
    model = skeleton(config)
    for name in (anatomy.embed, anatomy.blocks, anatomy.rotary, anatomy.final_norm, anatomy.head):
        model.get_submodule(name)
    block = model.get_submodule(anatomy.blocks)[0]  # type: ignore[index]
    for name in (anatomy.attention, anatomy.attention_norm, anatomy.mlp_norm, anatomy.q_norm, anatomy.k_norm):
        if name:
            block.get_submodule(name)
    for name, width in sizes_of(config).inputs(anatomy):
        assert block.get_submodule(name).in_features == width


@pytest.mark.parametrize("model_type", sorted(ANATOMIES))
def test_every_parameter_of_a_block_belongs_to_a_part_that_is_named(model_type: str) -> None:
    anatomy = ANATOMIES[model_type]
    block = skeleton(tiny.config_of(model_type)).get_submodule(anatomy.blocks)[0]  # type: ignore[index]
    known = {*anatomy.linears, anatomy.attention_norm, anatomy.mlp_norm, anatomy.q_norm, anatomy.k_norm}
    assert {name.rpartition(".")[0] for name, _ in block.named_parameters()} <= known
