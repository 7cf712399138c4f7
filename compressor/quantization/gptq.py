"""Error-feedback rounding (GPTQ, arXiv:2210.17323): later columns make up for the rounding errors of earlier ones.

With H = X^T X + damping and H^-1 = U^T U, U upper triangular, the error of column i, divided by U_ii, is spread along
row i of U. The grid is fixed before the first column is rounded, so columns
may be visited in any order and the file on disk needs no permutation.

Rows of a weight do not know of each other: linears that share inputs are rounded together, with one factor. Within a
block of columns the walk is one operation, `parewell::gptq_columns`: a loop on the CPU, one kernel launch on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from calib.quant.grid import fit_clipped, within_cell
from calib.quant.grid_types import Grid
from calib.stats.moments import Moments
from compressor.storage.quantized_linear import Rounded

GPTQ_BLOCK = 128  # columns handled together; larger ones are corrected once per block, by one matrix product


class NotPositive(ValueError):
    """The damped Gram matrix has no Cholesky factor."""


def ridge(diagonal: Tensor, damp: float) -> Tensor:
    """Return what GPTQ adds to a Gram matrix's diagonal (n,): damp times its mean, and 1 for inputs that never fire."""
    return damp * diagonal.mean() + (diagonal == 0).to(diagonal.dtype)


def columns_of(importance: Mapping[str, Tensor], name: str, damp: float = 0.01) -> Tensor | None:
    """How much the columns of a weight count (in,), with a ridge, as an input that never fired may do so yet; None
    where `importance`, by name, does not have it."""
    if name not in importance:
        return None
    return importance[name] + ridge(importance[name], damp)


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """U (n, n), upper triangular, U^T U = (gram + ridge)^-1.  Overwrites `gram`."""
    diagonal = gram.diagonal()
    diagonal += ridge(diagonal, damp)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise NotPositive(f"the Gram matrix is not positive definite with damping {damp}")
    # Transposed, a row-major matrix is what LAPACK works on in place; a symmetric one is its own transpose.
    torch.cholesky_inverse(factor, out=gram.mT)
    _, failed = torch.linalg.cholesky_ex(gram.mT, out=(factor, failed))
    if failed:
        raise NotPositive(f"the inverse of the Gram matrix is not positive definite with damping {damp}")
    return factor.mT


@torch.library.custom_op("parewell::gptq_columns", mutates_args=("columns", "errors", "codes"), device_types="cpu")
def gptq_columns(
    columns: Tensor, errors: Tensor, codes: Tensor, within: Tensor, scale: Tensor, zero: Tensor, bits: int,
    symmetric: bool, table: list[float],
) -> None:  # fmt: skip
    """Round columns one after the other, each with the errors of those before it worked in.

    columns (b, out): the weight's columns, as rows; changed as they are corrected. within (b, b) is their part of U;
    scale, zero (b, out) are those of each value. `table` has the grid's levels, or nothing. Written are codes (b, out)
    int8 and errors (b, out), each divided by its U_ii.
    """
    _one_after_the_other(columns, errors, codes, within, scale, zero, Grid(bits, symmetric, table=tuple(table) or None))


@gptq_columns.register_kernel("cuda")
def _on_cuda(
    columns: Tensor, errors: Tensor, codes: Tensor, within: Tensor, scale: Tensor, zero: Tensor, bits: int,
    symmetric: bool, table: list[float],
) -> None:  # fmt: skip
    grid = Grid(bits, symmetric, table=tuple(table) or None)
    if columns.dtype != torch.float32 or grid.is_float or find_spec("triton") is None:
        _one_after_the_other(columns, errors, codes, within, scale, zero, grid)
        return
    from compressor.quantization.gptq_triton import columns_in_one

    columns_in_one(columns, errors, codes, within, scale, zero, grid)


def _one_after_the_other(
    columns: Tensor, errors: Tensor, codes: Tensor, within: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> None:
    for i in range(len(columns)):
        code = grid.nearest_(columns[i] / scale[i], zero[i])
        codes[i] = code
        torch.sub(columns[i], grid.levels(code).sub_(zero[i]).mul_(scale[i]), out=errors[i]).div_(within[i, i])
        columns[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)


@dataclass(frozen=True)
class Factor:
    """order (n,): the columns as they are visited; upper (n, n): U of the Gram matrix in that order."""

    order: Tensor
    upper: Tensor


@torch.no_grad()
def factor_of(gram: Tensor, damp: float = 0.01, ordered: bool = True, dtype: torch.dtype = torch.float32) -> Factor:
    """Factorize the Gram matrix (n, n), the sum of x x^T over calibration tokens, that weights are rounded against.

    The factor is found in the precision of `gram` and returned as `dtype`. `ordered` visits the columns with the
    largest diagonal first. Raises NotPositive.
    """
    width = len(gram)
    order = torch.arange(width, device=gram.device)
    if ordered:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    permuted = torch.empty_like(gram)
    for some in torch.arange(width, device=order.device).split(GPTQ_BLOCK):
        permuted[some] = gram[order[some]][:, order]  # a few rows at a time: two such matrices are enough
    return Factor(order, inverse_factor(permuted, damp).to(dtype))


@torch.no_grad()
def gptq(
    weight: Tensor, factor: Factor, scale: Tensor, zero: Tensor, grid: Grid, *, offsets: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (out, in) int8 for weight (out, in), each row's loss tr(D H D^T) (out,), D = weight - rounded, and, if
    `offsets`, how far the corrected weight lay from each code's level when it was rounded (out, in) float16, in units
    of the scale and inside the code's cell.

    `factor` is of the damped H, in the dtype of the weight; scale, zero (out, in/g).
    """
    (out, width), order, upper = weight.shape, factor.order, factor.upper
    left = weight.mT[order].contiguous()  # columns are worked on as rows, which lie together in memory
    group_of = order // (width // grid.groups(width))
    scale, zero = scale.to(weight.dtype).mT.contiguous(), zero.to(weight.dtype).mT.contiguous()
    codes = torch.empty(width, out, dtype=torch.int8, device=weight.device)
    errors = torch.empty(min(GPTQ_BLOCK, width), out, dtype=weight.dtype, device=weight.device)
    apart = torch.empty(width, out, dtype=torch.float16, device=weight.device) if offsets else None
    loss = torch.zeros(out, dtype=weight.dtype, device=weight.device)
    for start in range(0, width, GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, width)
        groups, made = group_of[start:stop], errors[: stop - start]
        gptq_columns(
            left[start:stop], made, codes[start:stop], upper[start:stop, start:stop].contiguous(), scale[groups],
            zero[groups], grid.bits, grid.symmetric, list(grid.table or ()),
        )  # fmt: skip
        loss += made.square().sum(0)
        left[stop:].addmm_(upper[start:stop, stop:].mT, made, alpha=-1)
        if apart is not None:
            units = made.mul_(upper.diagonal()[start:stop, None]).div_(scale[groups])
            apart[start:stop] = within_cell(units, codes[start:stop], grid)
    back = torch.argsort(order)
    return codes[back].mT.contiguous(), loss, None if apart is None else apart[back].mT.contiguous()


def _round_linears(
    weights: Mapping[str, Tensor],
    inputs: Moments,
    grids: Mapping[str, Grid],
    stored: torch.dtype,
    *,
    outer: Tensor | None,
    offsets: bool,
    importance: Mapping[str, Tensor],
    damping: float,
) -> dict[str, Rounded]:
    """All of one grid together.  Raises NotPositive."""
    made = dict[str, Rounded]()
    factor = factor_of(inputs.gram, damping, dtype=next(iter(weights.values())).dtype)
    diagonals = {**dict.fromkeys(weights, inputs.gram.diagonal()), **importance}
    for grid in dict.fromkeys(grids[name] for name in weights):
        names = [name for name in weights if grids[name] == grid]
        weight = weights[names[0]] if len(names) == 1 else torch.cat([weights[name] for name in names])
        # One after the other, as scales may be of several rows of a linear.
        fits = [fit_clipped(weights[name], grid, stored, outer, columns_of(diagonals, name, damping)) for name in names]
        scale, zero = (torch.cat(parts) for parts in zip(*fits, strict=True))
        codes, _, apart = gptq(weight, factor, scale.to(weight.dtype), zero, grid, offsets=offsets)
        sizes = [len(weights[name]) for name in names]
        parts = zip(names, *(x.split(sizes) for x in (codes, scale, zero)), strict=True)
        made |= {
            name: Rounded(c.contiguous(), s.contiguous(), z.contiguous(), grid, outer=outer) for name, c, s, z in parts
        }
        if apart is not None:
            for name, own in zip(names, apart.split(sizes), strict=True):
                made[name] = replace(made[name], offset=own.contiguous())
        del weight, codes, apart
    return made


ENTRIES = {"gptq": _round_linears}
