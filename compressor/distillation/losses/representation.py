"""Losses on what models think rather than on what they say: hidden states, attention, Gram matrices.

Where widths differ, a `HiddenProjection` takes the student's states to the teacher's; Gram matrices of the same rows
need none. A mask leaves out rows, whatever they hold; nothing left gives 0, in value and in gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from calib.losses.sinkhorn import half_square
from calib.runtime.precision import upcast

SMALL = 1e-12  # a mean square below it counts as this


class HiddenProjection(nn.Module):
    """A projection from the student's width to the teacher's: the identity where they agree, else a matrix without
    bias.

    The matrix starts as the identity, cut or padded with zeros.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(teacher, student)) if student != teacher else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., student) -> (..., teacher)."""
        return hidden if self.weight is None else hidden @ self.weight.mT.to(hidden.dtype)


def match_hidden(t: Tensor, s: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean (t - s)^2 / mean t^2 of each row, teacher's and student's.  (..., d), (..., d) -> (...).

    The division lets layers of any scale be added up: 0 at equality, 1 for a student of zeros. 0 off the mask (...).
    """
    t, s = (_kept(upcast(h), mask) for h in (t, s))
    return (t - s).square().mean(-1) / t.square().mean(-1).clamp(min=SMALL)


def match_attention(p: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) in nats of attention distributions, for each group of heads and each query.

    Teacher p (..., H, T, K), student q (..., h, T, K), mask (..., T) of queries -> (..., g, T).  Where numbers of heads
    differ, neighbouring heads of each side are averaged into g groups, g their greatest common divisor: h for a
    student with a fraction of the teacher's heads. Keys that both may not see have no mass and add nothing. A student's
    weight that has vanished counts as the smallest number of its kind, and has no gradient.
    """
    groups = math.gcd(p.shape[-3], q.shape[-3])
    mask = mask if mask is None else mask[..., None, :].expand(*p.shape[:-3], groups, p.shape[-2])
    p, q = (_kept(upcast(a).unflatten(-3, (groups, -1)).mean(-3), mask) for a in (p, q))
    least = torch.finfo(q.dtype).tiny
    return (p * (p.clamp(min=least).log() - q.clamp(min=least).log())).sum(-1)


def linear_cka(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - CKA of teacher x (..., n, a) and student y (..., n, b), mask (..., n) -> (...), in [0, 1].

    CKA = <K, L> / (|K| |L|) with K, L the Gram matrices of centred rows (arXiv:1905.00414), without making them: it is
    |X^T Y|^2 / (|X^T X| |Y^T Y|). Blind to rotation, shift and scale of either side. 0 where the teacher's rows are
    all alike, as there is nothing to match; 1 where only the student's are. With fewer rows than widths it is near 0
    for any two sets.
    """
    x, y = _centred(x, mask), _centred(y, mask)
    own = torch.linalg.matrix_norm(x.mT @ x)
    both = own * torch.linalg.matrix_norm(y.mT @ y)
    cka = (x.mT @ y).square().sum((-2, -1)) / both.where(both > 0, 1)
    return (1 - cka).where(own > 0, 0)


def gram_cauchy_schwarz(x: Tensor, y: Tensor, bandwidth: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """-2 log <K, L> + log <K, K> + log <L, L> of Gaussian Gram matrices of the same n rows.

    Teacher x (..., n, a), student y (..., n, b), mask (..., n) -> (...).  K_ij = exp(-|x_i - x_j|^2 / (2 w)), with w
    bandwidth^2 times the mean of |x_i - x_j|^2 over pairs of its own side, so that neither scale nor width counts, nor
    shift nor rotation. Never negative, symmetric, and zero only where K = L, since their diagonals are one.
    """
    pair = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    pair = pair[..., :, None] & pair[..., None, :]
    off = pair & ~torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)

    def gram(rows: Tensor) -> Tensor:
        rows = _centred(rows, mask)
        halves = half_square(rows, rows).where(off, 0)
        mean = 2 * halves.sum((-2, -1), keepdim=True) / off.sum((-2, -1), keepdim=True).clamp(min=1)
        return (-halves / (bandwidth**2 * mean.clamp(min=SMALL))).exp()

    some = pair.any(-1).any(-1)

    def log_inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).where(pair, 0).sum((-2, -1)).where(some, 1).log()

    k, other = gram(x), gram(y)
    return log_inner(k, k) + log_inner(other, other) - 2 * log_inner(k, other)


def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.where(mask[..., None], 0)


def _centred(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows less their mean, over the largest size there, which keeps fourth powers in range.

    All zero where what is left is rounding: rows that are all alike.
    """
    rows = _kept(upcast(rows), mask)
    count = rows.shape[-2] if mask is None else mask.sum(-1)[..., None, None].clamp(min=1)
    centred = _kept(rows - rows.sum(-2, keepdim=True) / count, mask)
    size, whole = (r.detach().abs().amax((-2, -1), keepdim=True) for r in (centred, rows))
    real = size > 16 * torch.finfo(rows.dtype).eps * whole
    return centred.where(real, 0) / size.where(real, 1)
