"""One file per format on disk.  What `quantize` writes is compressed-tensors, or bitsandbytes where a grid's levels are
not evenly spaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calib.quant.scheme import Scheme
from compressor.storage import bitsandbytes, compressed_tensors
from compressor.storage.quantized_linear import Rounded


def tensors(name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
    """What is stored of the linear `name`."""
    return (bitsandbytes if scheme.table_name else compressed_tensors).tensors(name, rounded, scheme)


def names_of(name: str, scheme: Scheme) -> list[str]:
    """The names under which `tensors` stores the linear `name`."""
    return (bitsandbytes if scheme.table_name else compressed_tensors).names_of(name, scheme)


def shapes_of(name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], bool]]:
    """(shape, whether whole numbers) of each tensor in which `tensors` stores a linear of `shape`."""
    return (bitsandbytes if scheme.table_name else compressed_tensors).shapes_of(name, shape, scheme)


def restore(name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
    """The inverse of `tensors`."""
    return (bitsandbytes if scheme.table_name else compressed_tensors).restore(name, stored, scheme)


def quantization_config(scheme: Scheme, *, plain: bool, dtype: str) -> dict[str, Any]:
    """Of config.json; `plain` is false where no other loader can run the model, `dtype` is what it computes in."""
    if scheme.table_name:
        return bitsandbytes.config(scheme.table_name, dtype)
    return compressed_tensors.config(scheme, plain=plain)
