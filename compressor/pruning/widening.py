"""Prove of the units of a model that cutting some out leaves a model that computes what it should.

A narrow model is drawn and widened by units that nothing reads: the wide model, which is of the teacher's sizes, must
compute what the narrow one does. Norms see those units all the same, so that each is a copy of one that is read, as
many of each: means stay what they are. Copies of heads have the opposite sign, which no mean square sees, so that none
can be taken for its like. It is an identity, exact for every width that keeps one of so many units; it fails where
units were looked for in the wrong place, where parts of two were taken for one, and where the library's code depends on
a width in another way.

Matrices are drawn as products of two thin ones, so that this costs no memory at any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib import first_line
from calib.blockwise.arguments import answer_of
from calib.blockwise.walk import RowBatch, Walk
from calib.probe.bench import drawn, normal, outer_shapes, text
from calib.probe.find import block_kind, remembered, walk_of_config
from calib.probe.parts import Matrix
from calib.probe.products import AnsweredProducts, Asked
from calib.probe.stream import TOKENS
from calib.probe.units import HEADS, HIDDEN, ModelUnits, PieceUnits
from calib.runtime.memory import is_out_of_memory
from compressor.pruning.narrowing import narrowed_shapes
from compressor.pruning.widths import in_proportion, resized, shapes_in, units_of, widths_of

WIDENED = 1e-9  # relative difference that double precision leaves, with room
ROOT = 1e-6  # of the factor that a library computes in single precision
THIN = 8  # rank of drawn matrices
SHARES = 6  # the smallest divisors of a width, of which one unit each is kept


@dataclass(frozen=True)
class WidthProof:
    """A finding about cutting units of some kinds.

    Args:
        reason: why it is refused; None where it holds.
        grows: whether embeddings are multiplied by the root of the hidden width.
    """

    reason: str | None = None
    grows: bool = False


_known = dict[str, dict[tuple[str, ...], WidthProof]]()  # by config and kinds of units


def prove_widths(config: PretrainedConfig, kinds: tuple[str, ...]) -> WidthProof:
    """Prove that units of these kinds can be cut out of a model of this config, or remember what was found.  Raises
    BadInput."""
    known = remembered(_known, config, lambda: dict[tuple[str, ...], WidthProof]())
    if kinds not in known:
        try:
            known[kinds] = _proved(config, kinds)
        except Exception as error:  # whatever the library's code does with parameters that it did not make
            if is_out_of_memory(error):
                raise
            known[kinds] = WidthProof(f"it cannot be proved ({first_line(error)})")
    return known[kinds]


def _proved(config: PretrainedConfig, kinds: tuple[str, ...]) -> WidthProof:
    widths, units, reason = widths_of(config), units_of(config), "there is but one"
    layers, wide = range(len(units.blocks)), walk_of_config(config)
    for to in _shares(widths.counts, kinds):
        try:
            small = resized(config, layers, to)
            small.validate()
            narrow = walk_of_config(small)
        except Exception as error:  # as many classes as there are configs
            if is_out_of_memory(error):
                raise
            reason = first_line(error.__cause__ or error)
            continue
        widening = {
            kind: Widening(widths.counts[kind], count, -1.0 if kind == HEADS else 1.0) for kind, count in to.items()
        }
        kept = [{kind: one.kept for kind, one in widening.items()}] * len(layers)
        expected = narrowed_shapes(shapes_in(wide.model), units, [c.name for c in wide.calls], layers, kept)
        if (differ := first_difference(config, to, expected, shapes_in(narrow.model))) is not None:
            return WidthProof(differ)
        return _compared(wide.in_double(), narrow.in_double(), units, widening)
    return WidthProof(f"no student with an equal share of them can be built to prove it ({reason})")


def _shares(counts: Mapping[str, int], kinds: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Sizes of which the teacher's are multiples; the same multiple of all first."""
    each = [[n for n in range(2, counts[kind] + 1) if counts[kind] % n == 0][:SHARES] for kind in kinds]
    for shares in sorted(product(*each), key=lambda some: (len(set(some)), some)):
        yield {kind: counts[kind] // n for kind, n in zip(kinds, shares, strict=True)}


def first_difference(
    config: PretrainedConfig,
    to: Mapping[str, int],
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Say where shapes that a cut leaves and those that the library asks for differ; None where they do not.

    Args:
        config: of the teacher.
        to: units that the student has, by kind.
        expected: shapes that the cut leaves, by name.
        found: those that the library asks for.
    """
    for name in dict.fromkeys((*expected, *found)):
        if (cut := expected.get(name)) == (asked := found.get(name)):
            continue
        if not in_proportion(config, to):
            width = widths_of(config).head_dim
            return f"its heads are {width} wide where hidden is {width} times heads, and else not"
        left = "is not there" if cut is None else f"would be {list(cut)}"
        return f"{name} {left}, where the library asks for {'none' if asked is None else list(asked)}"
    return None


class Widening:
    """A wide model's units as copies of a narrow one's, as many of each.

    Args:
        wide: number of units.
        narrow: number of those that are kept.
        sign: of the copies.
    """

    def __init__(self, wide: int, narrow: int, sign: float) -> None:
        order = torch.randperm(wide, generator=torch.Generator().manual_seed(wide))
        self.sign, self.kept = sign, sorted(order[:narrow].tolist())
        self.like = torch.empty(wide, dtype=torch.int64)  # the kept unit that each is a copy of
        self.like[order] = order[:narrow].repeat(wide // narrow)

    def along(self, units: Tensor, source: Tensor) -> Tensor:
        """Find where each entry along an axis has its like.

        Args:
            units: (n,), the unit of each entry.
            source: (n,), what is known so far: itself mostly.
        """
        owned = (units >= 0).nonzero()[:, 0]
        # One row for each unit; where units are not alike, or some have none, this cannot be.
        by_unit = owned[units[owned].argsort(stable=True)].view(len(self.like), -1)
        if not torch.equal(units[by_unit[:, 0]], torch.arange(len(self.like))):
            raise ValueError("its units are not alike")
        return source.index_copy(0, by_unit.flatten(), by_unit[self.like].flatten())


class _Weights:
    """Parameters of a narrow piece, drawn, and of the wide piece that it becomes.

    Args:
        piece: where units lie in the wide piece.
        widening: of each kind of units.
        narrow: the narrow piece's parameters, on whatever device.
        wide: the wide piece's.
    """

    def __init__(
        self,
        piece: PieceUnits,
        widening: Mapping[str, Widening],
        narrow: Mapping[str, Tensor],
        wide: Mapping[str, Tensor],
    ) -> None:
        self._piece, self.narrow, self.wide = piece, narrow, wide
        self._places = dict[tuple[str, int], Tensor]()  # entry of the wide one -> entry of the narrow one
        self._signs, self._read = dict[tuple[str, int], Tensor](), dict[tuple[str, int], Tensor]()
        sources = dict[tuple[str, int], Tensor]()
        for kind, one in widening.items():
            for axis, units in piece.kinds[kind].axes.items() if kind in piece.kinds else ():
                sources[axis] = one.along(units, sources.get(axis, torch.arange(len(units))))
                ones = torch.ones(len(units), dtype=torch.float64)
                kept = (units < 0) | torch.isin(units, torch.tensor(one.kept))
                self._read[axis] = self._read.get(axis, ones) * kept
                self._signs[axis] = self._signs.get(axis, ones) * torch.where(kept, 1.0, one.sign)
        for axis, source in sources.items():
            self._places[axis] = ((self._read[axis] > 0).cumsum(0) - 1)[source]
        self._drawn = dict[Any, tuple[Tensor, Tensor]]()

    def given(self, *, widened: bool) -> dict[str, Tensor]:
        """Parameters by name; those that are multiplied by or looked up in are on the meta device."""
        result = dict[str, Tensor]()
        for name, p in (self.wide if widened else self.narrow).items():
            if name in self._piece.matrices or name in self._piece.tables:
                result[name] = torch.empty(p.shape, dtype=torch.float64, device="meta")
                continue
            result[name] = drawn(name, self.narrow[name], none=False)
            for axis in range(p.dim()) if widened else ():
                result[name] = self._widened(result[name], (name, axis))
        return result

    def _widened(self, value: Tensor, axis: tuple[str, int], along: int | None = None) -> Tensor:
        """A narrow parameter, or a factor of it, with what writes the units that are added."""
        if axis not in self._places:
            return value
        along = axis[1] if along is None else along
        shape = [-1 if i == along else 1 for i in range(value.dim())]
        return value.index_select(along, self._places[axis]) * self._signs[axis].view(shape)

    def product(self, asked: Asked, *, widened: bool) -> Tensor:
        """The answer to a product, of stacked matrices to all at once or to one."""
        matrix, expert = self._piece.matrices[asked.use.parameter], asked.use.expert
        if matrix.experts and expert is None:
            return torch.stack([self._one(x, matrix, e, widened=widened) for e, x in enumerate(asked.x)])
        return self._one(asked.x, matrix, expert, widened=widened)

    def _one(self, x: Tensor, matrix: Matrix, expert: int | None, *, widened: bool) -> Tensor:
        last = self.narrow[matrix.name].dim() - 1
        rows, columns = (last, last - 1) if matrix.transposed else (last - 1, last)
        key = matrix.name, expert
        if key not in self._drawn:
            shape = self.narrow[matrix.name].shape
            a = normal(f"{matrix.name} {expert} out", (shape[rows], THIN)) / THIN**0.5
            b = normal(f"{matrix.name} {expert} in", (THIN, shape[columns])) / shape[columns] ** 0.5
            self._drawn[key] = a, b
        a, b = self._drawn[key]
        if widened:
            a = self._widened(a, (matrix.name, rows), 0)
        if widened and (axis := (matrix.name, columns)) in self._places:
            b = b[:, self._places[axis]] * self._read[axis]
        return x @ b.mT @ a.mT

    def rows(self, name: str, index: Tensor, *, widened: bool) -> Tensor:
        """Rows of a table."""
        shape, last = self.narrow[name].shape, self.narrow[name].dim() - 1
        values = normal(name, (int(index.max()) + 1, *shape[1:]))[index]
        return self._widened(values, (name, last), values.dim() - 1) if widened else values

    def output(self, run: Callable[[Mapping[str, Tensor], Tensor], Tensor], hidden: Tensor, *, widened: bool) -> Tensor:
        """Run the narrow piece, or the wide one, on hidden states (B, T, d)."""
        given = self.given(widened=widened)
        experts = {m.experts for m in self._piece.matrices.values() if m.experts}
        mode = AnsweredProducts(
            given,
            lambda asked: self.product(asked, widened=widened),
            lambda name, index: self.rows(name, index, widened=widened),
            experts=experts,
        )
        with torch.no_grad(), mode:
            return run(given, hidden)


def _compared(wide: Walk, narrow: Walk, units: ModelUnits, widening: Mapping[str, Widening]) -> WidthProof:
    """Run both, piece by piece."""
    width = narrow.state_shape[-1]
    channel = torch.arange(width)
    if HIDDEN in widening:
        one = widening[HIDDEN]
        channel = torch.searchsorted(torch.tensor(one.kept), one.like)
    hidden, seen = normal("tokens", (*TOKENS, width)), set[Any]()
    for index, piece in enumerate(units.blocks):
        if (kind := block_kind(wide.modules[index])) in seen:
            continue
        seen.add(kind)
        weights = _Weights(piece, widening, _block(narrow, index), _block(wide, index))
        large = weights.output(partial(_block_output, wide, index), hidden[..., channel], widened=True)
        off = _apart(large, weights.output(partial(_block_output, narrow, index), hidden, widened=False)[..., channel])
        if off > WIDENED:
            return WidthProof(f"block {index} would compute something else without them, by {off:.0e}")
    ends = _Weights(units.end, widening, outer_shapes(narrow, narrow.leaving), outer_shapes(wide, wide.leaving))
    off = _apart(
        ends.output(lambda p, h: answer_of(wide.finish(text(wide, h), p, h)), hidden[..., channel], widened=True),
        ends.output(lambda p, h: answer_of(narrow.finish(text(narrow, h), p, h)), hidden, widened=False),
    )
    if off > WIDENED:
        return WidthProof(f"logits would be others without them, by {off:.0e}")
    return _start(wide, narrow, units.start, widening, channel)


def _start(
    wide: Walk, narrow: Walk, piece: PieceUnits, widening: Mapping[str, Widening], channel: Tensor
) -> WidthProof:
    ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS) % 7
    batch, nothing = RowBatch(wide.inputs(ids)), torch.zeros(1, 1, 1, dtype=torch.float64)
    weights = _Weights(piece, widening, outer_shapes(narrow, narrow.entering), outer_shapes(wide, wide.entering))
    large = weights.output(lambda p, _: wide.start(batch, p), nothing, widened=True)
    small = weights.output(lambda p, _: narrow.start(batch, p), nothing, widened=False)[..., channel]
    if (off := _apart(large, small)) <= WIDENED:
        return WidthProof()
    root = math.sqrt(len(channel) / narrow.state_shape[-1])
    if len(weights.wide) == 1 and _apart(large, small * root) <= ROOT:
        return WidthProof(grows=True)
    return WidthProof(f"what enters the blocks would be something else without them, by {off:.0e}")


def _block_output(walk: Walk, index: int, params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    return walk.run(index, params, hidden, text(walk, hidden))


def _block(walk: Walk, index: int) -> dict[str, Tensor]:
    module = walk.modules[index]
    return {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of a from b, of b's largest entry; infinite where one has no number."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)
