"""Blocks of GGUF's quantized types: 32 weights, a scale in half precision before their codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calib.quant.grid import as_stored
from calib.quant.scheme import Grid
from compressor.storage.quantized_linear import Rounded

GGUF_GRIDS = {Grid(4, True, 32): ("Q4_0", 4.5), Grid(8, True, 32): ("Q8_0", 8.5)}  # -> type, bits per weight


def packed(rounded: Rounded) -> np.ndarray[Any, Any]:
    """Pack a weight of a grid of `GGUF_GRIDS`.  -> bytes (out, in / 32 * block): Q4_0 keeps code + 8, of the weights i
    and i + 16 of a block in the low and the high half of a byte; Q8_0 the codes as they are."""
    groups, scale = rounded.codes.unflatten(1, (-1, 32)), as_stored(rounded.scale, torch.float16)
    if GGUF_GRIDS[rounded.grid][0] == "Q4_0":
        numbers = (groups + 8).to(torch.uint8)
        groups = numbers[..., :16] | (numbers[..., 16:] << 4)
    scales = scale[..., None].contiguous().view(torch.uint8)
    return torch.cat([scales, groups.contiguous().view(torch.uint8)], 2).flatten(1).numpy()
