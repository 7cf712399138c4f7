"""Error-feedback rounding (GPTQ, arXiv:2210.17323): later columns make up for the rounding errors of earlier ones.

With H = X^T X + damping and H^-1 = U^T U, U upper triangular, the error of column i, divided by U_ii, is spread along
row i of U. The grid is fixed before the first column is rounded, so columns
may be visited in any order and the file on disk needs no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.grid import Grid

BLOCK = 128  # columns handled together; larger ones are corrected once per block, by one matrix product


class NotPositive(ValueError):
    """The damped Gram matrix has no Cholesky factor."""


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """U (n, n), upper triangular, U^T U = (gram + damp * mean(diag) * I)^-1.  Inputs that never fire count as 1."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    damping = damp * diagonal.mean() + dead.to(gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(damping.expand_as(diagonal)))
    if failed:
        raise NotPositive(f"the Gram matrix is not positive definite with damping {damp}")
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise NotPositive(f"the inverse of the Gram matrix is not positive definite with damping {damp}")
    return upper


@torch.no_grad()
def gptq(
    weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, grid: Grid, damp: float = 0.01, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) int8 for weight (out, in), and each row's loss tr(D H D^T) (out,), D = weight - rounded.

    gram (in, in) is the sum of x x^T over calibration tokens; scale, zero (out, in/g). `ordered` visits the columns
    with the largest diagonal first. Works in the dtype of `gram`. Raises NotPositive.
    """
    out, width = weight.shape
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not ordered:
        order = order.sort().values
    upper = inverse_factor(gram[order][:, order], damp)
    left = weight.to(gram.dtype)[:, order].clone()
    group_of = order // (width // grid.groups(width))
    scale, zero = scale.to(gram.dtype)[:, group_of], zero.to(gram.dtype)[:, group_of]
    codes = torch.empty_like(left)
    loss = torch.zeros(out, dtype=gram.dtype, device=gram.device)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            column, s, z = left[:, i], scale[:, i], zero[:, i]
            codes[:, i] = (torch.round(column / s) + z).clamp(grid.low, grid.high)
            error = (column - (codes[:, i] - z) * s) / upper[i, i]
            left[:, i:stop] -= error[:, None] * upper[i, i:stop]
            errors[:, i - start] = error
            loss += error.square()
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.int8), loss
