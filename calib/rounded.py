"""Weights rounded to nearest, with their codes: what a model becomes in fewer bits before anything is learned.

Forms are schemes that leave activations alone, such as w4a16-g64, and "nf4": sixteen quantiles of the normal
distribution, times the largest magnitude of each 64 weights (arXiv:2305.14314, appendix E).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calib import BadInput
from calib.grid import decode, encode, fit_weights
from calib.scheme import Scheme
from calib.tables import nf4

NF4, BLOCK = "nf4", 64


@dataclass(frozen=True)
class Rounded:
    """codes int (out, in) and the values (out, in) that they stand for."""

    codes: Tensor
    values: Tensor


def check_form(form: str, widths: Iterable[tuple[str, int]]) -> None:
    """Raises BadInput for a form that is unknown, that rounds more than weights, or that does not divide `widths`."""
    if form == NF4:
        return
    scheme = Scheme.parse(form)
    if scheme.activations or scheme.kv:
        raise BadInput(f"form {form}: weights alone are rounded here; write w{scheme.weights.bits}a16, or nf4")
    scheme.check_widths(widths)


def rounded(weight: Tensor, form: str, scales_of: Tensor | None = None) -> Rounded:
    """Of a weight (out, in).  With `scales_of`, another weight of that shape, on that one's scales: codes of the two
    can then be compared one by one."""
    like = weight if scales_of is None else scales_of
    if form != NF4:
        grid = Scheme.parse(form).weights
        scale, zero = fit_weights(like.float(), grid)
        codes = encode(weight.float(), scale, zero, grid)
        return Rounded(codes, decode(codes, scale, zero, grid))
    table = torch.tensor(nf4(), device=weight.device)
    flat, other = (_blocks(w) for w in (weight, like))
    scale = other.abs().amax(1, keepdim=True).clamp(min=1e-30)
    codes = torch.bucketize(flat / scale, (table[1:] + table[:-1]) / 2)
    codes, values = (z.flatten()[: weight.numel()].view(weight.shape) for z in (codes, table[codes] * scale))
    return Rounded(codes, values)


def _blocks(weight: Tensor) -> Tensor:
    """(blocks, 64), the last one filled up with zeros."""
    flat = weight.float().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
