from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.grid import decode, encode, fit_weights
from calib.scheme import Grid
from calib.stats import Moments
from compressor.gptq import NotPositive, gptq
from compressor.rounding import round_linear
from tests import oracles

seeds = st.integers(0, 10_000)


def problem(seed: int, out: int = 3, width: int = 12, rows: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64) @ torch.randn(
        width, width, generator=g, dtype=torch.float64
    )
    return torch.randn(out, width, generator=g, dtype=torch.float64), x.mT @ x


@given(seeds)
def test_equals_solving_every_column_anew(seed: int) -> None:
    weight, gram = problem(seed)
    grid = Grid(3)
    scale, zero = fit_weights(weight, grid)
    codes, _ = gptq(weight, gram, scale, zero, grid, 0.01, ordered=False)
    for row in range(len(weight)):
        expected = oracles.gptq(weight[row], gram, scale[row], grid.low, grid.high, 0.01)
        assert torch.allclose(decode(codes, scale, zero, grid)[row], expected)


@given(seeds, st.booleans(), st.sampled_from([None, 4]), st.booleans())
def test_reported_loss_is_the_quadratic_form(seed: int, ordered: bool, group: int | None, symmetric: bool) -> None:
    weight, gram = problem(seed)
    grid = Grid(4, symmetric, group)
    scale, zero = fit_weights(weight, grid)
    codes, loss = gptq(weight, gram, scale, zero, grid, 0.05, ordered)
    d = weight - decode(codes, scale, zero, grid)
    h = gram + 0.05 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    assert torch.allclose(loss, ((d @ h) * d).sum(1), rtol=1e-9)


@given(seeds, st.booleans())
def test_independent_inputs_give_plain_rounding(seed: int, ordered: bool) -> None:
    weight, gram = problem(seed, width=200)  # wider than one block of columns
    grid = Grid(4, group=8)
    scale, zero = fit_weights(weight, grid)
    codes, _ = gptq(weight, gram.diagonal().diag(), scale, zero, grid, 0.01, ordered)
    assert torch.equal(codes, encode(weight, scale, zero, grid))


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(0, width=200, rows=400)
    grid = Grid(3, group=50)
    scale, zero = fit_weights(weight, grid)
    codes, loss = gptq(weight, gram, scale, zero, grid)
    monkeypatch.setattr("compressor.gptq.BLOCK", 200)
    whole, whole_loss = gptq(weight, gram, scale, zero, grid)
    assert torch.equal(codes, whole)
    assert torch.allclose(loss, whole_loss)


def test_inputs_that_never_fire_are_rounded_plainly() -> None:
    weight, gram = problem(0)
    gram[3], gram[:, 3] = 0, 0
    grid = Grid(4)
    scale, zero = fit_weights(weight, grid)
    codes, _ = gptq(weight, gram, scale, zero, grid)
    assert torch.equal(codes[:, 3], encode(weight, scale, zero, grid)[:, 3])


def test_a_gram_matrix_without_cholesky_factor_is_an_error() -> None:
    weight, gram = problem(0)
    grid = Grid(4)
    with pytest.raises(NotPositive, match="damping"):
        gptq(weight, -gram, *fit_weights(weight, grid), grid)


def test_a_group_whose_scale_underflows_spoils_nothing() -> None:
    """In 16 bits the scale of a dead channel rounds to zero, and 0 / 0 would spread along the row."""
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[:, :8] *= 1e-8
    inputs = Moments.zero(16).add(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)))
    rounded, error = round_linear(weight, inputs, Grid(4, group=8), "gptq", 0.01, torch.float16)
    assert (rounded.scale > 0).all() and rounded.weight().isfinite().all()
    assert torch.allclose(rounded.weight()[:, 8:], weight[:, 8:], atol=0.3)
    assert error < 0.02
