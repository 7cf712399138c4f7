"""llama.cpp's block types: searches against slow ones, bytes against the gguf package's own reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.quant.block_types import BLOCK_TYPES, FALLBACKS, fitting
from calib.quant.grid import decode, encode, fit_clipped
from calib.quant.scheme import Scheme
from compressor.storage.gguf_blocks import pack_blocks, unpack_blocks
from compressor.storage.quantized_linear import Rounded

TYPES = tuple(BLOCK_TYPES)


def weights(rows: int = 6, width: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).exp() * 0.03
    w[0, :40] = 0
    w[1] = 0
    w[2] = w[2].abs()  # no value below zero
    w[3, :256] *= 1e-5  # less than half precision holds well
    return w


def rounded(w: Tensor, kind: str, importance: Tensor | None = None) -> Rounded:
    grid = Scheme.parse(kind).weights
    scale, zero = fit_clipped(w, grid, torch.bfloat16, importance=importance)
    return Rounded(encode(w, scale, zero, grid), scale, zero, grid)


def test_names_bits_and_fallbacks_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra")
    for name, kind in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == (kind.weights, kind.bytes)
        assert Scheme.parse(name.upper()).name == name and Scheme.parse(name).bits_per_weight("", 256) == (
            8 * kind.bytes / kind.weights
        )
    assert [fitting("q4_k", width) for width in (256, 576, 100)] == ["q4_k", "q5_0", None]
    assert all(BLOCK_TYPES[other].weights == 32 for other in FALLBACKS.values())


@pytest.mark.parametrize("name", TYPES)
def test_blocks_say_to_gguf_what_was_meant_and_come_back(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra")
    made = rounded(weights(), name)
    blocks = pack_blocks(made)
    kind = BLOCK_TYPES[name]
    assert blocks.dtype == torch.uint8 and blocks.shape == (6, 512 // kind.weights * kind.bytes)
    read = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    meant = made.weight()
    assert np.abs(read - meant.numpy()).max() <= 1e-6 * meant.abs().max().item()
    back = unpack_blocks(blocks, name)
    assert torch.equal(back.codes, made.codes) and torch.equal(back.scale, made.scale)
    assert torch.allclose(back.zero, made.zero, rtol=1e-5)
    assert torch.equal(pack_blocks(back), blocks)


@pytest.mark.parametrize("name", TYPES)
def test_any_block_of_gguf_is_read_as_gguf_reads_it(name: str) -> None:
    """Blocks of random bytes, but for the numbers in half precision."""
    gguf = pytest.importorskip("gguf", reason="needs the extra")
    kind = BLOCK_TYPES[name]
    made = pack_blocks(rounded(weights(seed=1), name))
    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.integers(0, 256, made.shape, dtype=np.uint8))
    halves = {"q2_k": (80, 84), "q3_k": (108, 110), "q4_k": (0, 4), "q5_k": (0, 4), "q6_k": (208, 210), "q4_1": (0, 4),
              "q5_1": (0, 4)}.get(name, (0, 2))  # fmt: skip
    parts, kept = noise.unflatten(1, (-1, kind.bytes)), made.unflatten(1, (-1, kind.bytes))
    parts[..., slice(*halves)] = kept[..., slice(*halves)]
    read = torch.from_numpy(gguf.quants.dequantize(noise.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    found = unpack_blocks(noise, name)
    zero_scale = found.scale == 0
    values = decode(found.codes, found.scale, found.zero, found.grid)
    seen = ~zero_scale.repeat_interleave(found.grid.group or 1, 1)
    assert torch.allclose(values[seen], read[seen], rtol=1e-4, atol=1e-6 * float(read.abs().max()))


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_1"])
def test_least_values_come_near_the_best_that_any_scale_gives(name: str) -> None:
    """Against all pairs of a scale and a least value on a fine mesh, before they are made to share."""
    kind, generator = BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    group = kind.grid.group or 1
    x, importance = torch.randn(8, group, generator=generator), torch.rand(group, generator=generator) + 0.2
    from calib.quant.kquants import _best_with_least

    top = 2**kind.grid.bits - 1
    scale, least = _best_with_least(x[:, None], importance[None], top)
    best = torch.full((8,), torch.inf)
    span = x.amax(1) - x.amin(1).clamp(max=0)
    for share in torch.linspace(0.5, 1.1, 61):
        for start in torch.linspace(0.3, 1.1, 81):
            s, m = span * share / top, -x.amin(1).clamp(max=0) * start
            q = ((x + m[:, None]) / s[:, None]).round().clamp(0, top)
            best = torch.minimum(best, ((q * s[:, None] - m[:, None] - x).square() * importance).sum(1))
    q = ((x + least) / scale).round().clamp(0, top)
    found = ((q * scale - least - x).square() * importance).sum(1)
    assert (least >= 0).all() and (found <= 1.25 * best).all() and found.mean() <= 1.1 * best.mean()


def test_columns_that_matter_are_met_better() -> None:
    w, importance = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), torch.ones(512)
    importance[::2] = 100
    for name in ("q2_k", "q3_k", "q4_k", "iq4_xs"):
        plain, minded = (rounded(w, name, given).weight() - w for given in (None, importance))
        assert minded[:, ::2].norm() < 0.97 * plain[:, ::2].norm()


@pytest.mark.parametrize("name", TYPES)
def test_what_half_precision_cannot_hold_is_held_as_far_as_it_goes(name: str) -> None:
    w = weights()
    w[3:5] -= 7.5e4
    made = rounded(w, name)
    assert made.scale.isfinite().all() and made.zero.isfinite().all() and made.weight().isfinite().all()
    assert torch.equal(unpack_blocks(pack_blocks(made), name).codes, made.codes)
