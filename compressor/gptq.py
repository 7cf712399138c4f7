"""Error-feedback rounding (GPTQ, arXiv:2210.17323): later columns make up for the rounding errors of earlier ones.

With H = X^T X + damping and H^-1 = U^T U, U upper triangular, the error of column i, divided by U_ii, is spread along
row i of U. The grid is fixed before the first column is rounded, so columns
may be visited in any order and the file on disk needs no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.scheme import Grid

BLOCK = 128  # columns handled together; larger ones are corrected once per block, by one matrix product


class NotPositive(ValueError):
    """The damped Gram matrix has no Cholesky factor."""


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """U (n, n), upper triangular, U^T U = (gram + damp * mean(diag) * I)^-1.  Inputs that never fire count as 1.

    Overwrites `gram`.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal += damp * diagonal.mean() + dead.to(gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise NotPositive(f"the Gram matrix is not positive definite with damping {damp}")
    # Transposed, a row-major matrix is what LAPACK works on in place; a symmetric one is its own transpose.
    torch.cholesky_inverse(factor, out=gram.mT)
    _, failed = torch.linalg.cholesky_ex(gram.mT, out=(factor, failed))
    if failed:
        raise NotPositive(f"the inverse of the Gram matrix is not positive definite with damping {damp}")
    return factor.mT


@torch.no_grad()
def gptq(
    weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, grid: Grid, damp: float = 0.01, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) int8 for weight (out, in), and each row's loss tr(D H D^T) (out,), D = weight - rounded.

    gram (in, in) is the sum of x x^T over calibration tokens; scale, zero (out, in/g). `ordered` visits the columns
    with the largest diagonal first. Raises NotPositive.
    """
    out, width = weight.shape
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not ordered:
        order = order.sort().values
    # The factor is found in the precision of `gram`, used in that of the weight; columns are worked on as rows, which
    # lie together in memory.
    permuted = torch.empty_like(gram)
    for some in torch.arange(width, device=order.device).split(BLOCK):
        permuted[some] = gram[order[some]][:, order]  # a few rows at a time: two such matrices are enough
    upper = inverse_factor(permuted, damp).to(weight.dtype)
    del permuted
    left = weight.mT[order].contiguous()
    group_of = order // (width // grid.groups(width))
    scale, zero = scale.to(weight.dtype).mT.contiguous(), zero.to(weight.dtype).mT.contiguous()
    codes = torch.empty(width, out, dtype=torch.int8, device=weight.device)
    loss = torch.zeros(out, dtype=weight.dtype, device=weight.device)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        within = upper[start:stop, start:stop].contiguous()
        columns, errors = left[start:stop], torch.empty_like(left[start:stop])
        for i, group in enumerate(group_of[start:stop].tolist()):
            s, z = scale[group], zero[group]
            code = grid.nearest_(columns[i] / s, z)
            codes[start + i] = code
            torch.sub(columns[i], grid.levels(code).sub_(z).mul_(s), out=errors[i]).div_(within[i, i])
            columns[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
        loss += errors.square().sum(0)
        left[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.mT.contiguous(), loss
