"""Factors of a rounded block: what is 16-bit anyway gives way.

Scales of the grids and gains of the norms are factors that a quantized checkpoint stores in 16 bits whatever their
value, so they may be chosen freely (the idea of PEQA, arXiv:2305.14152). Zero points stay: they are whole numbers, and
one more or less moves the ends of a group's grid by a whole level. So do scales that are few, such as powers of two:
what a step moves them by is less than what lies between two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calib.blockwise.linears import Linear, put_together
from calib.quant.grid import as_stored, decode, encode, on_grid
from compressor.quantization.rounding import RoundedBlock

Variables = Mapping[str, Tensor]  # rounding variables V (out, in) by linear; none where codes stay


class ScaleFactors:
    """Learned factors of one block: logarithms of what grids' scales and norms' gains are multiplied by, whose signs
    stay."""

    def __init__(
        self,
        block: RoundedBlock,
        linears: Sequence[Linear],
        gains: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`gains`: names of norms' weights, and what is added to a weight where it multiplies."""

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=device, requires_grad=True)

        self._dtype, self._linears, self._offsets = dtype, linears, dict(gains)
        self.scales = {name: zeros(one.scale) for name, one in block.linears.items() if one.grid.scales == "any"}
        self.gains = {name: zeros(block.rest[name]) for name in gains}

    def params(self, block: RoundedBlock, variables: Variables) -> dict[str, Tensor]:
        """Parameters that the block runs with, differentiable in the factors and in rounding variables."""
        params = {name: tensor.to(self._dtype) for name, tensor in block.rest.items()}
        for name, log in self.gains.items():
            params[name] = self._scaled(params[name], name, log)
        weights = dict[str, Tensor]()
        for name, rounded in block.linears.items():
            zero, scale = rounded.zero.to(self._dtype), rounded.scale.to(self._dtype)
            scale = scale * self.scales[name].exp() if name in self.scales else scale
            if name in variables:
                levels = on_grid(variables[name], torch.ones_like(scale), zero, rounded.grid)
                weights[name] = (rounded.grid.split(levels) * scale[..., None]).flatten(-2)
            else:
                weights[name] = decode(rounded.codes, scale, zero, rounded.grid)
        return params | put_together(self._linears, weights)

    def _scaled(self, weight: Tensor, name: str, log: Tensor) -> Tensor:
        offset = self._offsets[name]
        return weight * log.exp() if not offset else (weight + offset) * log.exp() - offset

    @torch.no_grad()
    def applied(self, block: RoundedBlock, variables: Variables) -> RoundedBlock:
        """The block with the factors worked in and codes by rounding variables, everything as it will be stored."""
        rest, linears = dict(block.rest), dict(block.linears)
        for name, log in self.gains.items():
            rest[name] = self._scaled(rest[name].to(self._dtype), name, log).to(rest[name].dtype)
        for name, rounded in block.linears.items():
            codes, scale = rounded.codes, rounded.scale
            if name in variables:
                zero = rounded.zero.to(self._dtype)
                codes = encode(variables[name], torch.ones_like(zero), zero, rounded.grid)
            if name in self.scales:
                scale = as_stored(scale.to(self._dtype) * self.scales[name].exp(), scale.dtype)
            linears[name] = replace(rounded, codes=codes, scale=scale, offset=None)
        return replace(block, linears=linears, rest=rest)
