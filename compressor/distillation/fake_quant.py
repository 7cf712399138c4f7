"""Weights that pass through a quantization grid while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.in_memory import block_parts
from calib.model.weights import Weights
from calib.quant.grid import as_stored, encode, fit_clipped, on_grid
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.storage.compressed_tensors import CompressedTensors
from compressor.storage.quantized_linear import Rounded


@dataclass
class FakeQuantizer:
    """The grid of one linear: the logarithm of its scales, which is learned, and its zero points, which stay."""

    log_scale: Tensor
    zero: Tensor
    grid: Grid

    @staticmethod
    def fitted(weight: Tensor, grid: Grid, stored: torch.dtype) -> FakeQuantizer:
        """Least squares, as `quantize` starts too."""
        with torch.no_grad():
            scale, zero = fit_clipped(weight, grid, stored)
        return FakeQuantizer(scale.to(weight.dtype).log().requires_grad_(), zero, grid)

    @staticmethod
    def of(rounded: Rounded, dtype: torch.dtype) -> FakeQuantizer:
        """Start from the scales and zero points of a rounded linear."""
        return FakeQuantizer(rounded.scale.to(dtype).log().requires_grad_(), rounded.zero.to(dtype), rounded.grid)

    def value(self, weight: Tensor) -> Tensor:
        """Round a weight (out, in) to the grid, differentiable in weight and scales."""
        return on_grid(weight, self.log_scale.exp(), self.zero, self.grid)

    def reach(self) -> Tensor:
        """(..., n/g): half of what the grid covers, as it is now."""
        return self.log_scale.detach().exp() * -self.grid.low

    @torch.no_grad()
    def rounded(self, weight: Tensor, stored: torch.dtype) -> Rounded:
        """Codes, scales and zero points of a weight (out, in), scales in the dtype `stored`."""
        scale = as_stored(self.log_scale.exp(), stored)
        return Rounded(encode(weight, scale.to(weight.dtype), self.zero, self.grid), scale, self.zero, self.grid)


class NormalizedWeight:
    """A weight (..., n), trained as its share of the reach (..., n/g) that its grid had at first."""

    def __init__(self, weight: Tensor, fake: FakeQuantizer) -> None:
        self._reach, self._grid = fake.reach()[..., None], fake.grid
        self.trained = (fake.grid.split(weight.detach()) / self._reach).requires_grad_()

    def weight(self) -> Tensor:
        """The weight (out, in), from its normalized form."""
        return (self.trained * self._reach).flatten(-2)


def fake_quantizers(model: Any, scheme: Scheme, stored: torch.dtype) -> dict[str, FakeQuantizer]:
    """Grids fitted to a float model's weights."""
    names = quantized_weights(model)
    return {name: FakeQuantizer.fitted(model.get_parameter(name).detach(), scheme.weights, stored) for name in names}


def read_fake_quantizers(folder: Path, model: Any, scheme: Scheme) -> dict[str, FakeQuantizer]:
    """Grids as a quantized folder has them; `model` is that folder, loaded."""
    weights, fakes = Weights(folder), dict[str, FakeQuantizer]()
    for name in quantized_weights(model):
        linear = name.removesuffix(".weight")
        stored = weights.read(CompressedTensors().names(linear, scheme))
        fakes[name] = FakeQuantizer.of(
            CompressedTensors().decode(linear, stored, scheme), model.get_parameter(name).dtype
        )
    return fakes


def quantized_weights(model: Any) -> list[str]:
    """Names of the weights that a scheme quantizes, in the library's model.  Raises BadInput where it has others."""
    linears = [(block.name, linear) for block in block_parts(model.config) for linear in block.linears]
    if any(linear.step for _, linear in linears):
        raise BadInput(
            f"config.json: {model.config.model_type} stacks the weights of its experts, which cannot be trained "
            "fake-quantized; leave out --student-scheme"
        )
    if any(linear.transposed for _, linear in linears):
        raise BadInput(
            f"config.json: {model.config.model_type} keeps weights as (in, out), which cannot be trained "
            "fake-quantized; leave out --student-scheme"
        )
    return [f"{block}.{linear.parameter}" for block, linear in linears]
