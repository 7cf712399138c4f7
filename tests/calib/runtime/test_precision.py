"""Products in 16 bits.  Half precision stands in for bfloat16, which not every processor can multiply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.hooks import observe_inputs
from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from calib.runtime.precision import autocast_dtype, in_float32
from calib.stats.moments import Moments
from tests import tiny, walked
from tests.architectures import ARCHITECTURES

HALF = torch.float16


def streams(model_type: str, folder: Path) -> tuple[BlockwiseModel, BlockwiseModel]:
    """With products in half precision, and all in single."""
    model = tiny.model_of(tiny.config_of(model_type), dtype=torch.float32)
    weights, cpu = Weights(tiny.save(model, folder)), torch.device("cpu")
    return BlockwiseModel(model.config, weights, cpu, products=HALF), BlockwiseModel(model.config, weights, cpu)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_products_are_short_the_stream_is_not(model_type: str, tmp_path: Path) -> None:
    short, plain = streams(model_type, tmp_path)
    hidden = torch.randn(2, 9, plain.hidden)
    params = plain.read_block(0)
    result, expected = (one.run(0, params, hidden, walked.rows_like(one, hidden)) for one in (short, plain))
    assert result.dtype == torch.float32
    assert 0 < relative(result, expected) < 1e-2  # not equal: the products were indeed short


def test_gradients_are_single_and_close(tmp_path: Path) -> None:
    short, plain = streams("llama", tmp_path)
    hidden, gradients = torch.randn(2, 9, 24), []
    for stream in (short, plain):
        params = {name: p.requires_grad_() for name, p in stream.read_block(0).items()}
        stream.run(0, params, hidden, walked.rows_like(stream, hidden)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in params.values() if p.grad is not None]))
    assert gradients[0].dtype == torch.float32
    assert relative(gradients[0], gradients[1]) < 1e-2


def test_statistics_are_exact_sums_of_what_passed(tmp_path: Path) -> None:
    """A sum of 40,000 squares of 16-bit numbers has no 16-bit value anywhere near it."""
    short, _ = streams("llama", tmp_path)
    hidden, params = 30 * torch.randn(40, 1000, 24), short.read_block(0)
    seen: list[Tensor] = []
    down = next(one for one in short.linears(0) if one.module == "mlp.down_proj")
    with observe_inputs(short.blocks[0], {down: lambda x, _: seen.append(x.double())}):
        short.run(0, params, hidden, walked.rows_like(short, hidden))
    moments = Moments.zero(40)

    with observe_inputs(short.blocks[0], {down: lambda x, _: moments.add(x)}):
        short.run(0, params, hidden, walked.rows_like(short, hidden))
    x = seen[0].flatten(0, 1)
    assert moments.count == 40_000
    assert relative(moments.gram, x.mT @ x) < 1e-5


def test_what_happens_at_run_time_happens_in_single_precision(tmp_path: Path) -> None:
    def change(*tensors: Tensor) -> tuple[Tensor, ...]:
        assert all(x.dtype == torch.float32 for x in tensors)
        assert (tensors[0] @ tensors[0].mT).dtype == torch.float32
        return tensors

    half = torch.randn(3, 3, dtype=HALF)
    with torch.autocast("cpu", HALF):
        same = in_float32(change)(half, half.float())
    assert [x.dtype for x in same] == [HALF, torch.float32] and torch.equal(same[0], half)
    assert in_float32(lambda x: None)(half) is None
    double = torch.randn(2, dtype=torch.float64)
    assert torch.equal(in_float32(torch.negative)(double), -double)


def test_precision_by_name() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("float32", cpu) is None
    with pytest.raises(BadInput, match="use --precision float32"):
        autocast_dtype("bfloat16", cpu)
    with pytest.raises(BadInput, match="choose from auto"):
        autocast_dtype("int3", cpu)


def test_sums_are_not_shortened_under_autocast() -> None:
    """bfloat16 products would be off by some 1e-3, and give a Gram matrix with an eigenvalue well below zero."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64).cumsum(0)
    exact = Moments.zero(64).add(x.double()).gram
    with torch.autocast("cpu", torch.bfloat16):
        found = Moments.zero(64).add(x).gram
    assert relative(found, exact) < 1e-6
    short = (x.bfloat16().mT @ x.bfloat16()).double()
    assert relative(short, exact) > 1e-4
