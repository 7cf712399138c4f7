from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.quant.codebooks import nf4
from calib.quant.grid import RATIOS, decode, encode, fit_activations, fit_clipped, fit_weights, on_grid, search_clip
from calib.quant.grid_types import Grid

seeds = st.integers(0, 10_000)
grids = st.builds(Grid, st.integers(2, 8), st.booleans(), st.sampled_from([None, 4, 12]))


def values(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 24, generator=g, dtype=torch.float64) + torch.randn(5, 1, generator=g, dtype=torch.float64)


@given(seeds, grids)
def test_no_value_is_further_than_half_a_step_from_its_code(seed: int, grid: Grid) -> None:
    x = values(seed)
    scale, zero = fit_weights(x, grid)
    error = (x - decode(encode(x, scale, zero, grid), scale, zero, grid)).abs()
    # Where a zero point must be rounded too, the ends of the range may be clipped by another half step.
    assert (grid.split(error) <= (0.5 if grid.symmetric else 1.0) * scale[..., None] * (1 + 1e-12)).all()


@given(seeds, grids)
def test_a_fitted_grid_is_no_worse_than_one_that_holds_the_whole_range(seed: int, grid: Grid) -> None:
    x = values(seed)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return grid.split(x - decode(encode(x, scale, zero, grid), scale, zero, grid)).square().sum(-1)

    scale, zero = fit_clipped(x, grid, torch.float64)
    assert (error(scale, zero) <= error(*fit_weights(x, grid)) * (1 + 1e-9)).all()
    short, _ = fit_clipped(x, grid, torch.bfloat16)
    assert short.dtype == torch.bfloat16 and torch.equal(short, scale.bfloat16())


@given(seeds, grids)
def test_rounding_twice_is_rounding_once(seed: int, grid: Grid) -> None:
    x = values(seed)
    scale, zero = fit_weights(x, grid)
    once = on_grid(x, scale, zero, grid)
    assert torch.equal(on_grid(once, scale, zero, grid), once)


@given(seeds, grids)
def test_zero_is_on_every_grid(seed: int, grid: Grid) -> None:
    x = values(seed).abs() + 1  # a range that does not contain zero
    scale, zero = fit_weights(x, grid)
    assert torch.equal(on_grid(torch.zeros_like(x), scale, zero, grid), torch.zeros_like(x))


@given(seeds, grids)
def test_codes_fit_their_bits(seed: int, grid: Grid) -> None:
    x = values(seed)
    codes = encode(x, *fit_weights(x, grid, 0.3), grid)  # most values lie beyond the clipped range
    assert codes.min() >= -(2 ** (grid.bits - 1)) and codes.max() <= 2 ** (grid.bits - 1) - 1


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_rows_are_finite(value: float, symmetric: bool) -> None:
    grid = Grid(4, symmetric)
    x = torch.full((1, 8), value)
    scale, zero = fit_weights(x, grid)
    assert on_grid(x, scale, zero, grid).isfinite().all()
    assert torch.allclose(on_grid(x, scale, zero, grid), x, rtol=0.08, atol=1e-6)


def test_scales_are_kept_per_group_and_never_expanded() -> None:
    """Published code keeps them at the size of the weight: 18 GB for a large model."""
    scale, zero = fit_weights(torch.randn(6, 24), Grid(4, group=8))
    assert scale.shape == zero.shape == (6, 3)


def test_symmetric_weight_scale_holds_both_ends() -> None:
    scale, _ = fit_weights(torch.tensor([[-8.0, 3.0], [-2.0, 7.0]], dtype=torch.float64), Grid(4))
    assert scale.flatten().tolist() == [1.0, 1.0]


def test_activation_scale_is_the_serving_runtime_s() -> None:
    """compressed-tensors computes max|x| / ((2^b - 1) / 2) for dynamic symmetric inputs."""
    scale, _ = fit_activations(torch.tensor([[-3.0, 1.0]]), Grid(8))
    assert scale.item() == pytest.approx(3.0 / 127.5)


@given(seeds, grids)
def test_the_clip_search_is_never_worse_than_no_clip(seed: int, grid: Grid) -> None:
    x = values(seed) ** 3  # heavy tails, where clipping pays
    ratio = search_clip(x, grid)

    def cost(ratio: Tensor | float) -> Tensor:
        scale, zero = fit_weights(x, grid, ratio)
        return grid.split((on_grid(x, scale, zero, grid) - x).square()).sum(-1)

    assert (cost(ratio) <= cost(1.0)).all()


def test_gradients_pass_straight_through_inside_the_range_and_stop_at_its_ends() -> None:
    x = torch.tensor([[0.2, -0.7, 5.0, -9.0]], requires_grad=True)
    scale, zero = torch.full((1, 1), 0.5), torch.zeros(1, 1)
    on_grid(x, scale, zero, Grid(4)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_the_scale_of_a_grid_is_learned_through_rounding() -> None:
    """d x^ / d scale = code - x / scale inside the range, and the code itself beyond it (as in arXiv:1902.08153)."""
    x, scale = torch.tensor([[0.6, 9.0]]), torch.full((1, 1), 0.5, requires_grad=True)
    on_grid(x, scale, torch.zeros(1, 1), Grid(4)).sum().backward()
    assert scale.grad is not None and scale.grad.item() == pytest.approx((1 - 0.6 / 0.5) + 7)


@given(seeds, grids)
def test_gradients_are_those_of_the_steps_one_by_one(seed: int, grid: Grid) -> None:
    """Of the input, the scale and the zero point; a clip of 0.6 puts some values outside."""
    results = []
    for whole in (True, False):
        x = values(seed).requires_grad_()
        scale, zero = (t.detach().requires_grad_() for t in fit_weights(x, grid, 0.6))
        if whole:
            y = on_grid(x, scale, zero, grid)
        else:
            u = grid.split(x) / scale[..., None]
            codes = (u + (u.round() - u).detach() + zero[..., None]).clamp(grid.low, grid.high)
            y = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, scale, zero), allow_unused=True)))
    for name, one, other in zip(("y", "x", "scale", "zero"), *results, strict=True):
        assert (grid.symmetric and name == "zero") or torch.allclose(one, other, rtol=1e-12, atol=1e-12), name


@given(seeds, st.sampled_from([Grid(3), Grid(4, group=8), Grid(3, symmetric=False, group=8), Grid(4, table=nf4())]))
@pytest.mark.parametrize("room", [1, 200, 2**26])
def test_the_clip_search_finds_the_least_error(room: int, seed: int, grid: Grid) -> None:
    """However many values and ratios are tried together: by trying one after the other, with an outlier."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    x[seed % 6, seed % 16] *= 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.quant.grid.elements_at_once", lambda device: room)
        found = search_clip(x, grid, RATIOS)
    errors = []
    for ratio in RATIOS:
        scale, zero = fit_weights(x, grid, ratio)
        errors.append(grid.split(decode(encode(x, scale, zero, grid), scale, zero, grid) - x).square().sum(-1))
    assert torch.equal(found, torch.tensor(RATIOS)[torch.stack(errors).argmin(0)])


def test_the_clip_search_clips_where_that_is_better() -> None:
    """With three levels up to 1, a weight of 0.1 becomes 0; clipping the large one keeps the 63 small ones."""
    x = torch.tensor([[0.1] * 63 + [1.0], [1.0] * 64])
    found = search_clip(x, Grid(3), [0.3, 1.0])
    assert found.flatten().tolist() == pytest.approx([0.3, 1.0])
