"""The blocks of a model that is in memory."""

from __future__ import annotations

from typing import Any

from torch import nn


def block_names(module: nn.Module, config: Any) -> list[str]:
    """Names of a model's blocks, in the order in which it runs them.

    Args:
        module: a model, or a part of it that holds the blocks; its class does not count, which sharding changes.
        config: the model's, whose `num_hidden_layers` says how many blocks there are.

    Returns:
        Names from `module`; none where no list of modules has as many.
    """
    layers = getattr(config, "num_hidden_layers", None)
    for name, found in module.named_modules():
        if isinstance(found, nn.ModuleList) and len(found) == layers:
            return [f"{name}.{i}" for i in range(len(found))]
    return []
