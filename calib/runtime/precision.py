"""Short products, long everything else: matrix products of a block may run in 16 bits, what is done to them may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.runtime.choices import PRECISIONS
from calib.runtime.device import has_bfloat16


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products for one of PRECISIONS; None: like everything else.  Raises BadInput."""
    if precision not in PRECISIONS:
        raise BadInput(f"precision '{precision}' is unknown; choose from {', '.join(PRECISIONS)}")
    able = has_bfloat16(device)
    if precision == "bfloat16" and not able:
        raise BadInput(f"precision bfloat16: the {device.type} here is not made for it; use --precision float32")
    return torch.bfloat16 if able and precision != "float32" else None


def upcast(x: Tensor) -> Tensor:
    """Convert 16-bit floats to float32; wider tensors stay as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def in_float32(f: Callable[..., Any]) -> Callable[..., Any]:
    """f in single precision at least, whatever it is called with and however products are shortened around it.

    What it returns (a tensor, several, or None) has the dtypes of the tensors it was called with, in their order.
    """

    def wide(*tensors: Tensor) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            result = f(*map(upcast, tensors))
        if isinstance(result, Tensor):
            return result.to(tensors[0].dtype)
        return result and tuple(y.to(x.dtype) for y, x in zip(result, tensors, strict=True))

    return wide
