"""Orthogonal matrices: fixed, found in the weights, and learned on the manifold.

Row convention throughout: a rotated activation is x R, so a reader's weight (out, in) becomes W R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import scipy.linalg
import torch
from torch import Tensor


@cache
def hadamard_factors(n: int) -> tuple[Tensor, Tensor]:
    """Orthogonal (a, a) and (b, b) in float64 with a b = n, whose Kronecker product is `hadamard(n)`.

    The largest power of two in n has Sylvester's Hadamard matrix; the odd rest r the discrete Hartley transform
    cas(2 pi i j / r) / sqrt(r), which is real, symmetric and nearly as flat: no entry of the product exceeds
    sqrt(2 / n), and for a power of two all are 1 / sqrt(n). So every width mixes fully; no table of matrices is needed.

    Sylvester's matrix is itself a product of any two smaller ones, so a is taken as near to sqrt(n) as it can be below:
    products with both then cost least.
    """
    power = n & -n
    a = min(power, 1 << (math.isqrt(n).bit_length() - 1))
    i = torch.arange(n // power, dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(i, i) / len(i)
    rest = (angle.cos() + angle.sin()) / math.sqrt(len(i))
    return _sylvester(a), torch.kron(_sylvester(power // a), rest)


def _sylvester(n: int) -> Tensor:
    return torch.from_numpy(scipy.linalg.hadamard(n, float)) / math.sqrt(n)


def hadamard(n: int) -> Tensor:
    """(n, n) float64, orthogonal and symmetric."""
    return torch.kron(*hadamard_factors(n))


def apply_hadamard(x: Tensor) -> Tensor:
    """x (..., n) @ hadamard(n), as two small products."""
    a, b = _factors_like(x.shape[-1], x.device, x.dtype)
    return (a @ (x.unflatten(-1, (len(a), len(b))) @ b)).flatten(-2)


@cache
def _factors_like(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = hadamard_factors(n)
    return a.to(device, dtype), b.to(device, dtype)


def identity(n: int) -> Tensor:
    """The identity matrix (n, n) in float64."""
    return torch.eye(n, dtype=torch.float64)


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(random signs) @ hadamard(n)."""
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * hadamard(n)


def principal_hadamard(rows: Iterable[Tensor], n: int, generator: torch.Generator) -> Tensor:
    """WOMI (OSTQuant, section 4): eigenvectors of the covariance of weight rows (each (N, n)), times a random Hadamard.

    The eigenvectors decorrelate the coordinates, the Hadamard then gives each the same variance.
    """
    count, total, gram = 0, torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for some in rows:
        some = some.double().cpu()
        count, total, gram = count + len(some), total + some.sum(0), gram + some.mT @ some
    mean = total / count
    _, vectors = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    # The sign of an eigenvector is arbitrary: fix it, so that the same weights give the same rotation everywhere.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()) @ random_hadamard(n, generator)


def nearest_orthogonal(r: Tensor) -> Tensor:
    """The polar factor of r (..., n, n), in float64: the closest orthogonal matrix in Frobenius norm."""
    u, _, vt = torch.linalg.svd(r.double())
    return u @ vt


def with_ones_fixed(q: Tensor) -> Tensor:
    """The rotation (d, d) that leaves the vector of ones alone and turns what is orthogonal to it by q (d-1, d-1).

    H diag(1, q) H with the reflection H that takes the first axis to the ones: every such rotation is one of these.
    """
    framed = torch.block_diag(torch.ones(1, 1, dtype=q.dtype, device=q.device), q)
    return to_ones(to_ones(framed).mT).mT


def to_ones(x: Tensor) -> Tensor:
    """x H for x (..., d), with the reflection H that swaps the first axis and the vector of ones over sqrt(d)."""
    axis = torch.full(x.shape[-1:], 1 / math.sqrt(x.shape[-1]), dtype=x.dtype, device=x.device)
    axis[0] -= 1
    axis = axis / axis.norm()
    return x - 2 * (x @ axis)[..., None] * axis


@dataclass(frozen=True)
class Reflections:
    """An orthogonal R as a product of reflections along `axes` (k, d) of unit length: no matrix is written out."""

    axes: Tensor

    def columns(self, w: Tensor) -> Tensor:
        """w R, for w (..., d)."""
        for axis in self.axes:
            w = w - 2 * (w @ axis)[..., None] * axis
        return w

    def rows(self, w: Tensor) -> Tensor:
        """R^T w, for w (d, columns)."""
        for axis in self.axes:
            w = w - 2 * axis[:, None] * (axis @ w)
        return w


@dataclass(frozen=True)
class BlockTurn:
    """R = diag(signs) H diag(B_1, ..., B_k): `blocks` (k, b, b) behind a Hadamard; without `signs` (d,) they alone.

    Next to a full matrix (d, d) it costs about b / d: the Hadamard is two small products and spreads every coordinate
    over all blocks.
    """

    blocks: Tensor
    signs: Tensor | None = None

    def columns(self, w: Tensor) -> Tensor:
        """w R, for w (..., d)."""
        return self._blockwise(w if self.signs is None else apply_hadamard(w * self.signs), self.blocks)

    def rows(self, w: Tensor) -> Tensor:
        """R^T w, for w (d, columns)."""
        return self.columns(w.mT).mT

    def back(self, x: Tensor) -> Tensor:
        """x R^T, for x (..., d)."""
        x = self._blockwise(x, self.blocks.mT)
        return x if self.signs is None else apply_hadamard(x) * self.signs

    @staticmethod
    def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
        parts = x.unflatten(-1, (len(blocks), -1)).flatten(0, -3).transpose(0, 1)
        return (parts @ blocks).transpose(0, 1).reshape(x.shape)


def signs_of(r: Tensor) -> Tensor | None:
    """The signs (d,) of r = diag(signs) @ hadamard(d); None where r is the identity. Raises ValueError of any other."""
    if torch.equal(r, identity(len(r)).to(r)):
        return None
    signs = r[:, 0].sign()
    if not torch.allclose(r, signs[:, None] * hadamard(len(r)).to(r), atol=1e-6):
        raise ValueError("neither the identity nor a Hadamard with signs")
    return signs


class Rotation:
    """A learned orthogonal matrix (..., n, n): a point and a tangent.

    `value()` is point @ (I + A), A skew with entries from the free parameter `tangent`. The tangent is zero whenever a
    gradient is taken, so the value is exactly orthogonal there and its gradient is the Riemannian one; after the
    optimizer has moved the tangent, `retract()` walks along it (Cayley transform) and sets it back to zero. Any
    optimizer thus works on the manifold: its moments live in the Lie algebra, where parallel transport is the identity.
    No inverse is differentiated, and nothing but one solve per step is paid for staying orthogonal.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.point = start.to(dtype, copy=True)
        self.tangent = torch.zeros_like(self.point, requires_grad=True)

    def value(self) -> Tensor:
        """The orthogonal matrix (..., n, n), differentiable in the tangent."""
        return self.point + self.point @ skew(self.tangent)

    @torch.no_grad()
    def retract(self) -> None:
        """Move the point along the tangent (Cayley transform), which is zero again then."""
        self.point.copy_(self.point @ cayley(skew(self.tangent)))
        self.tangent.zero_()


def skew(x: Tensor) -> Tensor:
    """(x - x^T) / sqrt(2 n), x (..., n, n).

    Entries of size e give a matrix that turns by about 2 e radians at most, whatever n: so one learning rate, an angle
    per step, serves rotations of every width.
    """
    return (x - x.mT) / math.sqrt(2 * x.shape[-1])


def cayley(a: Tensor) -> Tensor:
    """(I + a/2) (I - a/2)^-1 for skew a (..., n, n): orthogonal, and I + a + O(a^2)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye - a / 2, eye + a / 2, left=False)
