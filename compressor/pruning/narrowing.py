"""Which entries of each parameter are left where units of a model are left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from calib.probe.units import HIDDEN, ModelUnits, PieceUnits, Units

Kept = Mapping[str, Collection[int]]  # kind of units -> those that are kept


def kept_along(piece: PieceUnits, kept: Kept) -> dict[tuple[str, int], Tensor]:
    """Find the indices that are left along every axis of a parameter that loses some, in order.

    Args:
        piece: where the units of a block lie, or of what stands around the blocks.
        kept: which units are kept, by kind; of others all.
    """
    masks = dict[tuple[str, int], Tensor]()
    for kind, of in kept.items():
        left = torch.tensor(sorted(of), dtype=torch.int64)
        for axis, units in piece.kinds[kind].axes.items() if kind in piece.kinds else ():
            mask = (units < 0) | torch.isin(units, left)
            masks[axis] = masks[axis] & mask if axis in masks else mask
    return {axis: mask.nonzero()[:, 0] for axis, mask in masks.items()}


def around(units: ModelUnits) -> PieceUnits:
    """Channels before the first block and behind the last, where one parameter may stand in both, as one piece."""
    found = [piece.kinds[HIDDEN] for piece in (units.start, units.end) if HIDDEN in piece.kinds]
    if not found:
        return PieceUnits()
    return PieceUnits({HIDDEN: Units(found[0].count, {a: u for one in found for a, u in one.axes.items()})})


def narrowed(params: Mapping[str, Tensor], piece: PieceUnits, kept: Kept) -> dict[str, Tensor]:
    """Parameters of a block, or of what stands around the blocks, with some of its units."""
    result = dict(params)
    for (name, axis), index in kept_along(piece, kept).items():
        if name in result:
            result[name] = result[name].index_select(axis, index.to(result[name].device))
    return result


def narrowed_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    units: ModelUnits,
    names: Sequence[str],
    layers: Sequence[int],
    kept: Sequence[Kept],
) -> dict[str, tuple[int, ...]]:
    """Shapes that the parameters of a student have.

    Args:
        shapes: the teacher's, by name.
        units: of the teacher.
        names: of its blocks.
        layers: which of them are kept.
        kept: units that each of those keeps; channels are the first's.
    """
    blocks = tuple(f"{name}." for name in names)

    def cut(some: Mapping[str, tuple[int, ...]], piece: PieceUnits, left: Kept) -> dict[str, tuple[int, ...]]:
        result = {name: list(shape) for name, shape in some.items()}
        for (name, axis), index in kept_along(piece, left).items():
            if name in result:
                result[name][axis] = len(index)
        return {name: tuple(shape) for name, shape in result.items()}

    outer = {name: shape for name, shape in shapes.items() if not name.startswith(blocks)}
    outer = cut(outer, around(units), kept[0])
    for new, old in enumerate(layers):
        start = f"{names[old]}."
        own = {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
        outer |= {f"{names[new]}.{name}": shape for name, shape in cut(own, units.blocks[old], kept[new]).items()}
    return outer
