from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.quant.grid import decode, encode, fit_weights
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.stats.moments import Moments
from compressor.quantization.gptq import NotPositive, factor_of, gptq
from compressor.quantization.rounding import Rounder, round_linears
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
    codes, _, _ = gptq(weight, factor_of(gram, 0.01, ordered=False, dtype=weight.dtype), scale, zero, grid)
    for row in range(len(weight)):
        expected = oracles.gptq(weight[row], gram, scale[row], grid.low, grid.high, 0.01)
        assert torch.allclose(decode(codes, scale, zero, grid)[row], expected)


@given(seeds, st.booleans(), st.sampled_from([None, 4]), st.booleans())
def test_reported_loss_is_the_quadratic_form(seed: int, ordered: bool, group: int | None, symmetric: bool) -> None:
    weight, gram = problem(seed)
    grid = Grid(4, symmetric, group)
    scale, zero = fit_weights(weight, grid)
    codes, loss, _ = gptq(weight, factor_of(gram, 0.05, ordered, dtype=weight.dtype), scale, zero, grid)
    d = weight - decode(codes, scale, zero, grid)
    h = gram + 0.05 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    assert torch.allclose(loss, ((d @ h) * d).sum(1), rtol=1e-9)


@given(seeds, st.booleans(), st.sampled_from([None, 50]))
def test_offsets_are_the_errors_that_the_loss_is_made_of(seed: int, ordered: bool, group: int | None) -> None:
    """With room at the ends of the grid, e_i = offset * scale / U_ii, and the loss is the sum of their squares."""
    weight, gram = problem(seed, width=200, rows=400)
    grid = Grid(4, group=group)
    scale, zero = fit_weights(3 * weight, grid)
    factor = factor_of(gram, ordered=ordered, dtype=weight.dtype)
    codes, loss, offsets = gptq(weight, factor, scale, zero, grid, offsets=True)
    assert offsets is not None and offsets.dtype == torch.float16 and 0.4 < offsets.abs().max() < 0.5
    errors = decode(torch.ones_like(codes), scale, zero, grid) * offsets.double()
    again = (errors[:, factor.order] / factor.upper.diagonal()).square().sum(1)
    assert torch.allclose(again, loss, rtol=2e-3)


@given(seeds, st.booleans())
def test_independent_inputs_give_plain_rounding(seed: int, ordered: bool) -> None:
    weight, gram = problem(seed, width=200)  # wider than one block of columns
    grid = Grid(4, group=8)
    scale, zero = fit_weights(weight, grid)
    codes, _, _ = gptq(weight, factor_of(gram.diagonal().diag(), 0.01, ordered, dtype=weight.dtype), scale, zero, grid)
    assert torch.equal(codes, encode(weight, scale, zero, grid))


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(0, width=200, rows=400)
    grid = Grid(3, group=50)
    scale, zero = fit_weights(weight, grid)
    codes, loss, _ = gptq(weight, factor_of(gram, dtype=weight.dtype), scale, zero, grid)
    monkeypatch.setattr("compressor.quantization.gptq.GPTQ_BLOCK", 200)
    whole, whole_loss, _ = gptq(weight, factor_of(gram, dtype=weight.dtype), scale, zero, grid)
    assert torch.equal(codes, whole)
    assert torch.allclose(loss, whole_loss)


def test_inputs_that_never_fire_are_rounded_plainly() -> None:
    weight, gram = problem(0)
    gram[3], gram[:, 3] = 0, 0
    grid = Grid(4)
    scale, zero = fit_weights(weight, grid)
    codes, _, _ = gptq(weight, factor_of(gram, dtype=weight.dtype), scale, zero, grid)
    assert torch.equal(codes[:, 3], encode(weight, scale, zero, grid)[:, 3])


def test_a_gram_matrix_without_cholesky_factor_is_an_error() -> None:
    with pytest.raises(NotPositive, match="damping"):
        factor_of(-problem(0)[1])


@given(seeds, st.sampled_from([None, 4]))
def test_linears_that_share_inputs_are_rounded_as_if_alone(seed: int, group: int | None) -> None:
    """Together where their grids are the same, by one factor in any case."""
    weight, _ = problem(seed, out=9)
    inputs = Moments.zero(12).add(torch.randn(60, 12, generator=torch.Generator().manual_seed(seed)).double())
    weights = dict(zip("qkv", weight.split([4, 2, 3]), strict=True))
    grids = {"q": Grid(4, group=group), "k": Grid(3, group=group), "v": Grid(4, group=group)}
    together = round_linears(weights, inputs, grids, Rounder("gptq", 0.01), torch.float32)
    for name in weights:
        one = {name: weights[name]}
        ((alone, error),) = round_linears(one, inputs, grids, Rounder("gptq", 0.01), torch.float32).values()
        rounded, same = together[name]
        assert torch.equal(rounded.codes, alone.codes) and torch.equal(rounded.scale, alone.scale)
        assert same == pytest.approx(error) and rounded.grid == grids[name]


def test_a_group_whose_scale_underflows_spoils_nothing() -> None:
    """In 16 bits the scale of a dead channel rounds to zero, and 0 / 0 would spread along the row."""
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[:, :8] *= 1e-8
    inputs = Moments.zero(16).add(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)))
    ((rounded, error),) = round_linears(
        {"w": weight}, inputs, {"w": Grid(4, group=8)}, Rounder("gptq", 0.01), torch.float16
    ).values()
    assert (rounded.scale > 0).all() and rounded.weight().isfinite().all()
    assert torch.allclose(rounded.weight()[:, 8:], weight[:, 8:], atol=0.3)
    assert error < 0.02


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it comes with torch for CUDA")
def test_the_kernel_for_cuda_is_the_loop(tmp_path: Path) -> None:
    """By triton's own interpreter, so that no CUDA device is needed."""
    script = tmp_path / "kernel.py"
    script.write_text(
        "import torch\n"
        "from calib.quant.grid import Grid\n"
        "from calib.quant.codebooks import nf4\n"
        "from compressor.quantization.gptq import gptq_columns\n"
        "from compressor.quantization.gptq_triton import columns_in_one\n"
        "for out, count, grid in ((70, 128, Grid(4)), (33, 50, Grid(3, False)), (40, 16, Grid(4, table=nf4()))):\n"
        "    table = list(grid.table or ())\n"
        "    within = torch.randn(count, count).triu() * 0.1\n"
        "    within.diagonal().add_(1)\n"
        "    scale = torch.rand(count, out) * 0.3 + 0.1\n"
        "    zero = torch.zeros(count, out) if grid.symmetric else torch.randint(-2, 2, (count, out)).float()\n"
        "    columns = torch.randn(count, out)\n"
        "    results = []\n"
        "    for kernel in (False, True):\n"
        "        c, e, k = columns.clone(), torch.empty_like(columns), torch.empty(count, out, dtype=torch.int8)\n"
        "        if kernel:\n"
        "            columns_in_one(c, e, k, within, scale, zero, grid.low, grid.high, table)\n"
        "        else:\n"
        "            gptq_columns(c, e, k, within, scale, zero, grid.bits, grid.symmetric, table)\n"
        "        results.append((k, e))\n"
        "    (codes, errors), (same, close) = results\n"
        "    assert torch.equal(codes, same) and torch.allclose(errors, close, atol=1e-4)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, str(script)], check=True, env=environment)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "q4_0", "wnvfp4a16", "wmxfp4a16"])
def test_what_reads_inputs_that_never_fired_is_rounded_like_all_else(name: str) -> None:
    """Where scales are searched for, columns count by the energy of their inputs; texts to come may have some there."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 512, generator=generator), torch.randn(600, 512, generator=generator)
    x[:, 256:] = 0
    grid = Scheme.parse(name).weights
    rounder = Rounder("gptq", 0.01)
    made, _ = round_linears({"w": weight}, Moments.zero(512).add(x), {"w": grid}, rounder, torch.bfloat16)["w"]
    nearest, _ = round_linears(
        {"w": weight}, Moments.zero(512).add(x), {"w": grid}, Rounder("rtn", 0.01), torch.bfloat16
    )["w"]
    dead, as_nearest = ((one.weight() - weight)[:, 256:].norm() for one in (made, nearest))
    assert dead <= 1.01 * as_nearest < 0.4 * weight[:, 256:].norm()
