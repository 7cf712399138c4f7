"""What a format can say of a model, and what reads it: a value that stands beside the code that writes the format."""

from __future__ import annotations

from dataclasses import dataclass

ANY_GPU = "GPUs and CPUs"
WEIGHTS_ALONE = "16"  # bits of activations, keys and values where a format rounds none


@dataclass(frozen=True, kw_only=True)
class FormatDescription:
    """A row of `parewell formats`.  Texts, as a table shows them; no field has a default that a new format could take
    without a thought.

    Args:
        title: what its readers call the format.
        contents: what is written.
        bits: of weights, such as "2, 3, 4, 8".
        groups: how many weights of a row share a scale; "channel": all of a row.
        zero_points: whether grids may have them.
        mixed: whether linears may have bits, or types, of their own.
        activations: bits that inputs of linears may be rounded to; 16: they are left alone.
        tables: what embedding and head may be.
        readers: what reads it, or a part of it, which stands in brackets; of a format of `export` those beside the ones
            that EXPORT_FORMATS names.
        hardware: where its readers run it.
        bits_per_weight: scales included, in b (bits), g (weights that share a scale) and n (outputs).
        zero_bits: what zero points add to that, "" where nothing.
    """

    title: str
    contents: str
    bits: str
    groups: str
    zero_points: bool
    mixed: bool
    activations: str
    tables: str
    readers: tuple[str, ...]
    hardware: str
    bits_per_weight: str
    zero_bits: str = ""


def number_list(numbers: tuple[int | None, ...]) -> str:
    """Numbers as a table has them; None is a whole channel."""
    return ", ".join("channel" if number is None else f"{number:,}" for number in numbers)
