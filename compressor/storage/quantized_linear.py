"""A linear layer whose weight is codes on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.quant.grid import decode
from calib.quant.scheme import Grid


@dataclass(frozen=True)
class Rounded:
    """A linear's weight on its grid: codes (out, in) int8; scale (out, in/g) in its stored dtype; zero (out, in/g)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return decode(self.codes, self.scale.float(), self.zero, self.grid)


def stacked(parts: Sequence[Rounded]) -> Rounded:
    """One linear of the rows of several that share their input."""
    codes, scale, zero = (torch.cat([getattr(p, kind) for p in parts]) for kind in ("codes", "scale", "zero"))
    return Rounded(codes, scale, zero, parts[0].grid)
