"""Modules of the user's own: drawn by a seed, filled from a file, or refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calib import BadInput
from calib.model.factory import drawn_module, factory_of, fill_module, weights_file

HERE = "tests.calib.model.test_factory"


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def no_module() -> list[int]:
    return [1]


def broken() -> nn.Module:
    raise SystemExit("no such thing")


def test_a_seed_draws_one_module_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, again, other = (drawn_module(f"{HERE}:make", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(one[0].weight, other[0].weight) and not one.training  # type: ignore[index]


def test_a_module_is_filled_with_all_of_a_file_and_with_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(t.shape).half() if t.is_floating_point() else t for name, t in make().state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_file(tmp_path) == weights_file(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    module = drawn_module(f"{HERE}:make", 0)
    stored = fill_module(module, tmp_path / "model.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)) and stored[name] == tensors[name].dtype
    for more, word in [
        ({"x": torch.zeros(1)}, "'x' has no place"),
        ({"2.bias": torch.zeros(3)}, r"has shape \[3\], the factory's \[2\]"),
    ]:
        save_file(tensors | more, tmp_path / "other.safetensors")
        with pytest.raises(BadInput, match=word):
            fill_module(module, tmp_path / "other.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "1.running_var"}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"'1\.running_var' is missing"):
        fill_module(module, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("make", "must be package.module:function"),
        ("no.such.package:make", "cannot be imported"),
        (f"{HERE}:nothing", "cannot be imported"),
        (f"{HERE}:HERE", "is no function"),
    ],
)
def test_names_that_lead_to_no_function(name: str, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        factory_of(name)


@pytest.mark.parametrize(("name", "word"), [("no_module", "gives a list"), ("broken", "fails .no such thing")])
def test_functions_that_give_no_module(name: str, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        drawn_module(f"{HERE}:{name}", 0)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no model\.safetensors"):
        weights_file(tmp_path)
