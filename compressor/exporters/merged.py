"""A plain checkpoint: transforms are in the weights already, and codes become the values that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from calib import Failed


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`.  Raises Failed where that cannot hold it."""
    short = value.to(dtype)
    if not short.isfinite().all():
        raise Failed(f"tensor '{name}': has values up to {float(value.abs().max()):.3g}, which "
                     f"{str(dtype).removeprefix('torch.')} cannot hold; take --dtype bfloat16")  # fmt: skip
    return short
