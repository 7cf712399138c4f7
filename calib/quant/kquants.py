"""Grids of llama.cpp's block types: scales, and least values, that share a half-precision number in each 256 weights.

A weight is d * c * q - e * m, or d * c * q without a least value: q its code, c and m whole numbers of few bits for
each 16 or 32 weights, d and e in half precision for each 256. Here a group's scale is s = d * c and its zero point,
which is no whole number, e * m / s. The group with the largest scale has the largest c there is, and that with the
largest least value the largest m; so d and e follow from what the groups have.

Blocks of 32 (Q4_0, Q5_0, Q8_0, Q4_1, Q5_1, IQ4_NL) have one number, or two, in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calib.quant.block_types import BLOCK_TYPES, SUPER_BLOCK, BlockType
from calib.quant.grid_types import Grid
from calib.runtime.device import elements_at_once

_TRIED = 12  # scales that are tried for a group, from .9 levels fewer to .9 more than its range asks for
_STARTS = (1.0, 0.85, 0.7)  # shares of its lowest value that each of them starts from
_REFINED = 3  # times that the best of them is rounded and solved for again
_RATIOS = tuple(1.1 - 0.02 * i for i in range(20))  # of its range, where there is no least value
_LEAST, _MOST = 2.0**-24, 65504.0  # the smallest and the largest number in half precision


@torch.no_grad()
def fit_blocks(x: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, zero), each (out, n/g) float32, of weights x (out, n) on a block type's grid, for least squares in which
    columns count by their `importance` (n,).

    The search is llama.cpp's: trial scales, each with the codes that it gives and then solved for anew.
    """
    kind = BLOCK_TYPES[grid.scales]
    weights = torch.ones_like(x[0]) if importance is None else importance.to(x.dtype)
    parts = x.split(max(1, elements_at_once(x.device) // x.shape[1]))
    made = [_fit(grid.split(part), grid.split(weights), kind) for part in parts]
    scale, zero = (torch.cat(found) for found in zip(*made, strict=True))
    return scale.float(), zero.float()


def _fit(groups: Tensor, weights: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Of groups (rows, n/g, g)."""
    if not kind.least:
        scale = _shared(_best_scale(groups, weights, kind), kind)
        return scale, torch.zeros_like(scale)
    scale, least = _best_with_least(groups, weights, 2**kind.grid.bits - 1)
    scale, least = _shared(scale, kind), _shared(least, kind, most=True)
    return scale, kind.grid.low + least / scale


def _shared(found: Tensor, kind: BlockType, *, most: bool = False) -> Tensor:
    """Numbers (rows, n/g) as they are kept: whole multiples of one in half precision for each 256 weights, or in half
    precision themselves.  Of scales none is zero; of least values, `most`, any may be."""
    if not kind.top:
        half = found.clamp(-_MOST, _MOST).half().to(found.dtype)
        return half if most else torch.where(half.abs() < _LEAST, _LEAST, half)
    together = found.unflatten(1, (-1, SUPER_BLOCK // (kind.grid.group or 1)))
    largest = together.abs().amax(-1, keepdim=True)
    unit = (largest / kind.top).clamp(max=_MOST).half().to(found.dtype).clamp(min=_LEAST)
    whole = (together / unit).round().clamp(-kind.top if kind.signed else 0, kind.top)
    if not most:
        whole = torch.where(whole == 0, torch.where(together < 0, -1.0, 1.0), whole)
    # However coarse half precision is down there, the largest has the largest number.
    whole = torch.where(together.abs() == largest, kind.top * torch.where(together < 0, -1.0, 1.0), whole)
    return (whole * unit).flatten(1)


def _sums(weights: Tensor, *of: Tensor) -> Iterator[Tensor]:
    for each in of:
        yield (weights * each).sum(-1)


def _best_with_least(groups: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(s, m) with m >= 0 of the least sum of w (s q - m - x)^2, q from 0 to `top`."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1)
    of_x, of_xx = _sums(weights, groups, groups.square())
    total, best = weights.sum(-1), torch.full_like(low, torch.inf)
    scale, least = (high - low).clamp(min=_LEAST) / top, -low

    def solve(s: Tensor, m: Tensor) -> None:
        """Take the best scale and least value for the codes that these give."""
        nonlocal best, scale, least
        q = (groups + m[..., None]).div_(s[..., None]).round_().clamp_(0, top)
        of_q, of_qq, of_qx = _sums(weights, q, q * q, q * groups)
        det = total * of_qq - of_q.square()
        s, m = (total * of_qx - of_x * of_q) / det, (of_q * of_qx - of_qq * of_x) / det
        below = m < 0  # which cannot be said
        s, m = torch.where(below, of_qx / of_qq, s), torch.where(below, 0.0, m)
        error = of_xx - 2 * s * of_qx + 2 * m * of_x + s.square() * of_qq - 2 * s * m * of_q + m.square() * total
        better = (error < best) & (s > 0) & s.isfinite() & m.isfinite()
        best, scale, least = (torch.where(better, *pair) for pair in ((error, best), (s, scale), (m, least)))

    for share in _STARTS:
        span = (high - low * share).clamp(min=_LEAST)
        for i in range(_TRIED):
            solve(span / (top + 0.9 * (2 * i / (_TRIED - 1) - 1)), -low * share)
    for _ in range(_REFINED):
        solve(scale, least)
    return scale, least


def _best_scale(groups: Tensor, weights: Tensor, kind: BlockType) -> Tensor:
    """s, of either sign where that can be said, of the least sum of w (s q - x)^2, q on the grid's levels."""
    grid = kind.grid
    place = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, place)[..., 0]
    extreme = torch.where(extreme == 0, _LEAST, extreme)
    ends = grid.ends if kind.signed else grid.ends[1:]
    best, scale = torch.full_like(extreme, torch.inf), torch.full_like(extreme, _LEAST)
    for end in ends:
        for ratio in _RATIOS:
            tried = extreme / end * ratio
            tried = tried if kind.signed else tried.abs()
            q = grid.levels(grid.nearest_(groups / tried[..., None]))
            of_qq, of_qx = _sums(weights, q * q, q * groups)
            s = of_qx / of_qq
            error = -s * of_qx  # and what the group is, which stays
            better = (error < best) & s.isfinite() & (s != 0)
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    return scale
