"""Modules of the user's own: made by a function that is named `package.module:function`, with weights from a
safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib import BadInput, first_line
from calib.model.weights import read_file
from calib.runtime.user_code import imported_function

WEIGHTS_FILE = "model.safetensors"


def factory_of(name: str) -> Callable[[], Any]:
    """Import the function called `name`, package.module:function, that makes a module.  Raises BadInput."""
    return imported_function("factory", name, "makes the model")


def drawn_module(factory: str, seed: int) -> nn.Module:
    """Make the module of a factory with weights drawn by `seed`, in single precision and evaluation mode.  Raises
    BadInput where the factory fails or gives no module."""
    make = factory_of(factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = make()
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise BadInput(f"factory {factory}: fails ({first_line(error)}); mend it") from error
    if not isinstance(module, nn.Module):
        raise BadInput(f"factory {factory}: gives a {type(module).__name__}, not a torch module; mend it")
    return module.float().eval()


def weights_file(place: Path) -> Path:
    """Find a factory's weights: the file itself, or model.safetensors in a directory.  Raises BadInput where there are
    none."""
    file = place / WEIGHTS_FILE if place.is_dir() else place
    if not file.is_file():
        raise BadInput(f"{place}: is no safetensors file and holds no {WEIGHTS_FILE}; give the model's weights")
    return file


def fill_module(module: nn.Module, file: Path) -> dict[str, torch.dtype]:
    """Give a module the tensors of a safetensors file.

    Returns:
        The dtype in which each tensor is stored, by name.

    Raises:
        BadInput: a tensor is missing, has another shape, or has no place in the module.
    """
    tensors, own = read_file(file)[0], module.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise BadInput(f"{file}: tensor '{name}' is missing; the weights are not of what the factory makes")
        if tensors[name].shape != tensor.shape:
            raise BadInput(
                f"{file}: tensor '{name}' has shape {list(tensors[name].shape)}, the factory's {list(tensor.shape)}; "
                "the two do not belong together"
            )
    if more := sorted(tensors.keys() - own.keys()):
        raise BadInput(f"{file}: tensor '{more[0]}' has no place in what the factory makes")
    module.load_state_dict(tensors)
    return {name: tensor.dtype for name, tensor in tensors.items()}
