"""Weights rounded to nearest, with their codes: what a model becomes in fewer bits before anything is learned.

Forms are schemes that leave activations alone, such as w4a16-g64 or nf4, whose scale is the largest magnitude of each
64 weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calib import BadInput
from calib.quant.grid import decode, encode, fit_weights
from calib.quant.scheme import Scheme

CODEBOOK_BLOCK = 64  # weights that share a scale where levels are not evenly spaced, over the ends of rows


@dataclass(frozen=True)
class NearestWeight:
    """codes int (out, in) and the values (out, in) that they stand for."""

    codes: Tensor
    values: Tensor


def check_form(form: str, widths: Iterable[tuple[str, int]]) -> None:
    """Raises BadInput for a form that is unknown, that rounds more than weights, or that does not divide `widths`."""
    scheme = Scheme.parse(form)
    if scheme.table_name:
        return
    if scheme.weights.is_block_type:
        raise BadInput(f"form {form}: blocks of llama.cpp's are not known here; write w4a16-g32, or nf4")
    if scheme.activations or scheme.kv:
        raise BadInput(f"form {form}: weights alone are rounded here; write {scheme.weights_only().name}, or nf4")
    scheme.check_widths(widths)


def round_weight(weight: Tensor, form: str, scales_of: Tensor | None = None) -> NearestWeight:
    """Round a weight (out, in) to nearest.  With `scales_of`, another weight of that shape, on that one's scales: codes
    of the two can then be compared one by one."""
    scheme, pair = Scheme.parse(form), (weight, weight if scales_of is None else scales_of)
    grid = scheme.weights
    own, like = (_blocks(z) if scheme.table_name else z.float() for z in pair)
    scale, zero = fit_weights(like, grid)
    codes = encode(own, scale, zero, grid)
    both = (codes, decode(codes, scale, zero, grid))
    return NearestWeight(*(z.flatten()[: weight.numel()].view(weight.shape) for z in both))


def _blocks(weight: Tensor) -> Tensor:
    """(blocks, 64), the last one filled up with zeros."""
    flat = weight.float().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % CODEBOOK_BLOCK)).view(-1, CODEBOOK_BLOCK)
