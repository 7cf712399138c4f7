"""A linear layer whose weight is codes on a grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calib.quant.grid import decode
from calib.quant.grid_types import Grid


@dataclass(frozen=True)
class Rounded:
    """A linear's weight on its grid: codes (out, in) int8; scale (out, in/g) in its stored dtype; zero (out, in/g).

    `offset` (out, in) float16, where it is kept: how far what was rounded lies from the level it was rounded to, in
    units of the scale and inside the code's cell. `outer` (1,): what scales are FP8 multiples of, where they are;
    `inputs` (1,): the same of its inputs' scales.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid
    offset: Tensor | None = None
    outer: Tensor | None = None
    inputs: Tensor | None = None

    def weight(self) -> Tensor:
        """The weight (out, in) that codes, scales and zero points stand for, float32."""
        return decode(self.codes, self.scale.float(), self.zero, self.grid)
