"""Grids whose levels are not evenly spaced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.quant.codebooks import CODEBOOKS
from calib.quant.grid import decode, encode, fit_weights, on_grid, search_clip
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.quantization.gptq import factor_of, gptq
from compressor.storage import bitsandbytes
from compressor.storage.bitsandbytes import BitsAndBytes
from compressor.storage.quantized_linear import Rounded

kinds = st.sampled_from(list(CODEBOOKS))
seeds = st.integers(0, 1000)


def grid_of(kind: str, group: int | None = None) -> Grid:
    return Grid(4, group=group, table=CODEBOOKS[kind]())


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_levels_ascend_from_minus_one_to_one_and_hold_zero(kind: str) -> None:
    levels = CODEBOOKS[kind]()
    assert len(levels) == 16 and levels[0] == -1 and levels[-1] == 1 and 0 in levels
    assert list(levels) == sorted(levels)


@given(kinds, seeds, st.sampled_from([1.0, 0.6]))
def test_codes_are_those_of_the_nearest_level(kind: str, seed: int, ratio: float) -> None:
    grid, x = grid_of(kind, 8), values(seed, 5, 24)
    scale, zero = fit_weights(x, grid, ratio)
    chosen = decode(encode(x, scale, zero, grid), scale, zero, grid)
    table = torch.tensor(grid.table, dtype=x.dtype)
    every = scale.repeat_interleave(8, 1)[..., None] * table
    assert torch.allclose((chosen - x).abs(), (every - x[..., None]).abs().amin(-1))


@given(kinds, seeds)
def test_the_largest_magnitude_of_a_group_is_kept(kind: str, seed: int) -> None:
    grid, x = grid_of(kind, 8), values(seed, 3, 16)
    scale, zero = fit_weights(x, grid)
    assert torch.equal(scale, x.view(3, 2, 8).abs().amax(-1))
    y = on_grid(x, scale, zero, grid).view(3, 2, 8)
    assert torch.equal(y.abs().amax(-1), scale)


@given(kinds, seeds)
def test_gradients_go_straight_through(kind: str, seed: int) -> None:
    """y = level(x / s) s: dy/dx is 1 inside, 0 outside; dy/ds is level - x / s inside, level outside."""
    grid, x = grid_of(kind), values(seed, 2, 9).requires_grad_()
    scale = torch.tensor([[1.0], [0.5]], dtype=x.dtype, requires_grad=True)
    out = on_grid(x, scale, torch.zeros_like(scale), grid)
    weight = values(seed + 1, 2, 9)
    (out * weight).sum().backward()
    u = (x / scale).detach()
    inside = u.abs() <= 1
    level = out.detach() / scale.detach()
    assert x.grad is not None and torch.equal(x.grad, weight * inside)
    assert scale.grad is not None
    assert torch.allclose(scale.grad, ((level - u * inside) * weight).sum(1, keepdim=True))


@given(kinds, seeds)
def test_clipping_is_never_worse_than_not(kind: str, seed: int) -> None:
    grid, x = grid_of(kind, 12), values(seed, 4, 24)
    ratio = search_clip(x, grid)

    def error(r: torch.Tensor | float) -> torch.Tensor:
        return (on_grid(x, *fit_weights(x, grid, r), grid) - x).square().view(4, 2, 12).sum(-1)

    assert (error(ratio) <= error(1.0) * (1 + 1e-12)).all()


@given(kinds, seeds)
def test_gptq_with_a_diagonal_gram_matrix_is_plain_rounding(kind: str, seed: int) -> None:
    grid, w = grid_of(kind, 8), values(seed, 6, 16)
    scale, zero = fit_weights(w, grid)
    codes, loss, _ = gptq(
        w, factor_of(torch.diag(values(seed, 16).square() + 0.1), 0, dtype=w.dtype), scale, zero, grid
    )
    assert torch.equal(codes, encode(w, scale, zero, grid))
    correlated = values(seed + 1, 64, 16)
    gram = correlated.mT @ correlated
    codes, loss, _ = gptq(w, factor_of(gram.clone(), 0, dtype=w.dtype), scale, zero, grid)
    error = decode(codes, scale, zero, grid) - w
    assert torch.allclose(loss, ((error @ gram) * error).sum(1))


def test_a_gradient_of_no_number_is_no_crash() -> None:
    grid = grid_of("nf4")
    assert on_grid(torch.full((1, 4), torch.nan), torch.ones(1, 1), torch.zeros(1, 1), grid).shape == (1, 4)


@given(kinds, seeds)
def test_what_is_stored_can_be_restored(kind: str, seed: int) -> None:
    scheme = Scheme.parse(kind)
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (6, 128), generator=g).to(torch.int8)
    rounded = Rounded(codes, torch.rand(6, 2, generator=g).half(), torch.zeros(6, 2), scheme.weights)
    stored = BitsAndBytes().encode("x", rounded, scheme)
    assert set(stored) == set(BitsAndBytes().names("x", scheme))
    back = BitsAndBytes().decode("x", stored, scheme)
    assert torch.equal(back.codes, codes) and torch.equal(back.weight(), rounded.weight())
    assert sum(stored[f"x.{n}"].nbytes for n in ("weight", "weight.absmax")) * 8 == codes.numel() * 4.5
    assert scheme.bits_per_weight("", 128) == 4.5 == bitsandbytes.bnb_bits_per_weight(kind, 128)


@settings(max_examples=8)  # the library is slow to round on CPU
@given(st.sampled_from(["nf4", "fp4"]), st.integers(1, 5), st.integers(3, 150), seeds)
def test_the_library_reads_what_is_stored(kind: str, out: int, width: int, seed: int) -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="needs the extra eight-bit")
    w = values(seed, out, width).float()
    stored = {n.removeprefix("x.weight."): t for n, t in bitsandbytes.nearest_on_table("x", w, kind).items()}
    state = library.QuantState.from_dict({k: v for k, v in stored.items() if k != "x.weight"}, torch.device("cpu"))
    theirs = library.dequantize_4bit(stored["x.weight"], state)
    packed, same = library.quantize_4bit(w, quant_type=kind, blocksize=64)
    assert theirs.shape == w.shape
    want = library.dequantize_4bit(packed, same)
    assert (theirs != want).sum() <= 1 or torch.allclose(theirs, want, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 150), seeds)
def test_eight_bit_rows_are_the_library_s(out: int, width: int, seed: int) -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="needs the extra eight-bit")
    w = values(seed, out, width).float()
    stored = bitsandbytes.int8("x", w)
    codes, scale, _ = library.int8_vectorwise_quant(w.half())
    assert torch.equal(stored["x.SCB"], scale)
    assert (stored["x.weight"].int() - codes.int()).abs().max() <= 1
    assert (stored["x.weight"] != codes).sum() <= 1
