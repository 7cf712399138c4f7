from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.engine.rotations import (
    BlockTurn,
    Rotation,
    apply_hadamard,
    cayley,
    hadamard,
    hadamard_factors,
    identity,
    nearest_orthogonal,
    principal_hadamard,
    random_hadamard,
    signs_of,
    skew,
)

widths = st.sampled_from([1, 2, 3, 8, 24, 40, 43, 64, 172, 576])


@given(widths)
def test_hadamard_is_orthogonal_symmetric_and_flat(n: int) -> None:
    h = hadamard(n)
    assert torch.allclose(h @ h.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(h, h.mT) or torch.allclose(h, h.mT, atol=1e-15)
    assert h.abs().max() <= math.sqrt(2 / n) + 1e-12
    if n & (n - 1) == 0:
        assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5))


@given(widths)
def test_two_small_products_are_the_big_one(n: int) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(apply_hadamard(x), x @ hadamard(n), atol=1e-12)
    assert torch.allclose(apply_hadamard(apply_hadamard(x)), x, atol=1e-12)
    least = min(a + n // a for a in (1 << k for k in range(n.bit_length())) if n % a == 0)
    assert sum(map(len, hadamard_factors(n))) <= 1.2 * least, "products that each number of x goes through"


@given(st.integers(0, 1000), widths)
def test_random_hadamards_are_orthogonal_and_follow_their_seed(seed: int, n: int) -> None:
    r, again = (random_hadamard(n, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.allclose(r @ r.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(r, again)


@given(st.integers(0, 1000), st.sampled_from([(8, 2), (24, 8), (40, 5), (64, 64), (172, 43)]), st.booleans())
def test_blocks_behind_a_hadamard_are_the_matrix_that_they_say(seed: int, shape: tuple[int, int], spread: bool) -> None:
    (n, width), generator = shape, torch.Generator().manual_seed(seed)
    start = random_hadamard(n, generator) if spread else identity(n)
    blocks = nearest_orthogonal(torch.randn(n // width, width, width, dtype=torch.float64, generator=generator))
    turn, whole = BlockTurn(blocks, signs_of(start)), start @ torch.block_diag(*blocks)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=generator)
    assert torch.allclose(turn.columns(x), x @ whole, atol=1e-12)
    assert torch.allclose(turn.back(x), x @ whole.mT, atol=1e-12)
    assert torch.allclose(turn.rows(x[0].mT), whole.mT @ x[0].mT, atol=1e-12)


def test_signs_are_of_a_hadamard_alone() -> None:
    assert signs_of(identity(6)) is None
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1], dtype=torch.float64)
    assert torch.equal(signs_of(signs[:, None] * hadamard(6)), signs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither"):
        signs_of(identity(6).flip(0))


def test_womi_gives_every_coordinate_the_same_variance() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 16, dtype=torch.float64, generator=g) * torch.logspace(0, 3, 16, dtype=torch.float64)
    r = principal_hadamard([rows[:100], rows[100:]], 16, g)
    assert torch.allclose(r @ r.mT, torch.eye(16, dtype=torch.float64), atol=1e-10)
    variance = (rows @ r).var(0, correction=0)
    assert torch.allclose(variance, variance.mean().expand(16))


@given(st.integers(0, 1000))
def test_cayley_of_a_skew_matrix_is_orthogonal_and_first_order_right(seed: int) -> None:
    a = skew(torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    eye = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    assert torch.allclose(cayley(a) @ cayley(a).mT, eye, atol=1e-12)
    assert torch.allclose(cayley(1e-5 * a), eye + 1e-5 * a, atol=1e-8)


def test_a_learned_rotation_stays_on_the_manifold_and_finds_a_planted_one() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=g)).Q
    target *= torch.linalg.det(target).sign()  # a rotation: reflections cannot be reached by walking
    target[:, 0] *= torch.linalg.det(target).sign()
    rotation = Rotation(torch.eye(6), torch.float64)
    optimizer = torch.optim.Adam([rotation.tangent], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (rotation.value() - target).square().sum().backward()
        optimizer.step()
        rotation.retract()
    assert torch.allclose(rotation.point @ rotation.point.mT, torch.eye(6, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(rotation.point, target, atol=1e-2)


def test_the_tangent_s_gradient_is_the_riemannian_one() -> None:
    """For f(R) = <C, R> it is skew(R^T C), up to a factor that depends on the width alone."""
    g = torch.Generator().manual_seed(0)
    r = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=g)).Q
    c = torch.randn(4, 4, dtype=torch.float64, generator=g)
    rotation = Rotation(r, torch.float64)
    (rotation.value() * c).sum().backward()
    assert rotation.tangent.grad is not None
    assert torch.allclose(rotation.tangent.grad, (r.mT @ c - c.mT @ r) / math.sqrt(2 * 4))


@pytest.mark.parametrize("n", [16, 64, 256])
def test_one_learning_rate_is_one_angle_at_every_width(n: int) -> None:
    signs = torch.randint(0, 2, (n, n), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    angle = torch.linalg.matrix_norm(skew(0.1 * signs), 2)
    assert 0.13 < angle < 0.27


def test_the_polar_factor_is_the_closest_orthogonal_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    r = torch.linalg.qr(torch.randn(3, 5, 5, dtype=torch.float64, generator=g)).Q
    assert torch.allclose(nearest_orthogonal(r), r)
    drifted = r + 1e-4 * torch.randn(3, 5, 5, dtype=torch.float64, generator=g)
    back = nearest_orthogonal(drifted)
    assert torch.allclose(back @ back.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5), atol=1e-12)
    assert (back - drifted).norm() <= (r - drifted).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_at_a_point_is_the_point(dtype: torch.dtype) -> None:
    start = torch.linalg.qr(torch.randn(2, 4, 4, dtype=dtype)).Q
    assert torch.equal(Rotation(start, dtype).value(), start)
