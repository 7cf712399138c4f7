"""llama.cpp's block types as grids: how many bits a code has, how scales are kept, and what 256 or 32 weights take."""

from __future__ import annotations

from dataclasses import dataclass

from calib.quant.codebooks import iq4
from calib.quant.grid_types import Grid

SUPER_BLOCK = 256  # weights of a K-quant that share numbers in half precision


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's: its grid; the largest whole number that a scale is made of (0: scales are in half precision
    themselves); the bytes of so many weights; whether a group has a least value, and whether its scale may be
    negative."""

    grid: Grid
    top: int
    bytes: int
    weights: int = SUPER_BLOCK
    least: bool = False
    signed: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, with its share of scales and least values."""
        return 8 * self.bytes / self.weights


BLOCK_TYPES = {
    "q2_k": BlockType(Grid(2, False, 16, scales="q2_k"), 15, 84, least=True),
    "q3_k": BlockType(Grid(3, True, 16, scales="q3_k"), 31, 110, signed=True),
    "q4_k": BlockType(Grid(4, False, 32, scales="q4_k"), 63, 144, least=True),
    "q5_k": BlockType(Grid(5, False, 32, scales="q5_k"), 63, 176, least=True),
    "q6_k": BlockType(Grid(6, True, 16, scales="q6_k"), 127, 210, signed=True),
    "iq4_xs": BlockType(Grid(4, True, 32, table=iq4(), scales="iq4_xs"), 31, 136, signed=True),
    "iq4_nl": BlockType(Grid(4, True, 32, table=iq4(), scales="iq4_nl"), 0, 18, 32, signed=True),
    "q4_0": BlockType(Grid(4, True, 32, scales="q4_0"), 0, 18, 32, signed=True),
    "q5_0": BlockType(Grid(5, True, 32, scales="q5_0"), 0, 22, 32, signed=True),
    "q8_0": BlockType(Grid(8, True, 32, scales="q8_0"), 0, 34, 32),
    "q4_1": BlockType(Grid(4, False, 32, scales="q4_1"), 0, 20, 32, least=True),
    "q5_1": BlockType(Grid(5, False, 32, scales="q5_1"), 0, 24, 32, least=True),
}

# What llama.cpp takes where 256 does not divide a row.
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}


def fitting(kind: str, width: int) -> str | None:
    """A block type for rows of `width` weights: the one that is asked for, or what llama.cpp takes in its place; None
    where no type divides them."""
    if width % BLOCK_TYPES[kind].weights == 0:
        return kind
    return FALLBACKS[kind] if kind in FALLBACKS and width % 32 == 0 else None
