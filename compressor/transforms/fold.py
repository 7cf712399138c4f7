"""Transforms that leave a model's function alone, folded into its weights (OSTQuant, OpenReview rAcgDBdKnP, section 4).

One code path: learning folds in float32 with a graph, the merge in float64 without, so what is trained is what ships;
and what is proved (`compressor.transforms.proof`) is what is folded. Which matrices a transform meets, along which
axis and at which rows, is data (`calib.probe.parts`). Row convention: x (tokens, in), y = x W^T + b. With d hidden:

    gains         readers W := W diag(gain), norm weight := 1, norm bias := (bias / gain) R; the head takes the final
                  norm's gain: where there is an R
    residual R    tables, readers and head W := W R; writers W := R^T W, b := R^T b
    norm scales   norm weight := 1/s, norm bias := bias / s, readers' columns times s
    pair scales   outputs of the source divided by s, with their bias, inputs of the target times s: values and output
                  projection, with s repeated for the query heads of a group; up and down projection, of every expert
    pair R_j      per group j, where attention alone stands between: source W := R_j^T W, b := R_j^T b; target's columns
                  of j, of each query head, W := W R_j
    plane scale   keys times s, queries divided by s, one s for the two channels that position turns as one plane: a
    plane angle   common factor and a common turn are all that commutes with it
    Hadamard      down W := W H, against H on its input at run time

Where queries and keys are normalised after their projections the plane scale goes into the gains of those norms, and
there is no turn; where the norm is over each head by itself (Qwen3) one scale serves all heads. Where a norm stands
between a writer and the stream (Gemma, OLMo 2) nothing can pass it, and the residual rotation is left out; where none
stands before the readers (OLMo 2) there are no norm scales. A norm that takes the mean away (LayerNorm) commutes with
every rotation that leaves the vector of ones alone.

A rotation passes a norm only if the norm's gain is in the readers. Without one the gains stay in the norms: in the
readers nothing would spread them again, and gains of gemma-3-270m lie between 0 and 123 within one norm, so that 61% of
a gate's 4-bit codes would be 0. (The same as scales that start at 1 / |gain|, but for gains that are 0 or negative, of
which this has nothing to fear.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import micro_batches
from calib.probe.parts import FoundParts, ModelParts, Norm, Pair, Planes
from compressor.engine.rotations import apply_hadamard

FoldStep = tuple[Literal["rows", "columns"], Callable[[Tensor], Tensor]]  # on (out, any) or on (any, in)


class Turn(Protocol):
    """A rotation R of the residual stream."""

    def columns(self, w: Tensor) -> Tensor:
        """w R, for w (..., d)."""

    def rows(self, w: Tensor) -> Tensor:
        """R^T w, for w (d, columns)."""


@dataclass(frozen=True)
class DenseTurn:
    """A rotation that is written out, r (d, d)."""

    r: Tensor

    def columns(self, w: Tensor) -> Tensor:
        """w R, for w (..., d)."""
        return w @ self.r

    def rows(self, w: Tensor) -> Tensor:
        """R^T w, for w (d, columns)."""
        return self.r.mT @ w

    def back(self, x: Tensor) -> Tensor:
        """x R^T, for x (..., d)."""
        return x @ self.r.mT


@dataclass(frozen=True)
class BlockTransform:
    """Transforms of one block; scales are positive factors, not logarithms.

    Args:
        norm_scales: by name of a norm, (d,).
        pair_scales: by name of a pair, (g, h); of stacked experts (E, g, h).
        pair_rotations: by name of a pair whose groups rotate, (g, h, h).
        plane_scales: by attention layer, (G, n) for n planes; (1, n) for all heads.
        plane_angles: the same, radians; only where planes may turn.
    """

    norm_scales: Mapping[str, Tensor] = field(default_factory=dict)
    pair_scales: Mapping[str, Tensor] = field(default_factory=dict)
    pair_rotations: Mapping[str, Tensor] = field(default_factory=dict)
    plane_scales: Mapping[str, Tensor] = field(default_factory=dict)
    plane_angles: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Mapping[str, Tensor]]:
        """All transforms, by kind and name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockTransform:
        """Apply `change` to every tensor."""
        return BlockTransform(**{k: {name: change(t) for name, t in of.items()} for k, of in self.kinds.items()})

    def to(self, where: torch.dtype | torch.device) -> BlockTransform:
        """Move all tensors to a dtype or a device."""
        return self.map(lambda t: t.to(where))


def identity_transform(parts: FoundParts, dtype: torch.dtype = torch.float64) -> BlockTransform:
    """Transforms of a block that change nothing: one of each kind that its parts admit."""

    def scale(pair: Pair) -> Tensor:
        experts = parts.matrices[pair.source].experts
        shape = len(pair.rows), len(pair.rows[0])
        return torch.ones(*((experts, *shape) if experts else shape), dtype=dtype)

    width = next((m.into for n in parts.norms for m in (parts.matrices[r] for r in n.readers)), 0)
    heads = {p.name: 1 if min(len(p.queries), len(p.keys)) == 1 else p.heads for p in parts.planes}
    return BlockTransform(
        {norm.name: torch.ones(width, dtype=dtype) for norm in parts.norms if norm.scales},
        {pair.name: scale(pair) for pair in parts.pairs},
        {
            pair.name: torch.eye(len(pair.rows[0]), dtype=dtype).repeat(len(pair.rows), 1, 1)
            for pair in parts.pairs
            if pair.rotates
        },
        {p.name: torch.ones(heads[p.name], len(p.channels), dtype=dtype) for p in parts.planes},
        {p.name: torch.zeros(heads[p.name], len(p.channels), dtype=dtype) for p in parts.planes if p.turns},
    )


@dataclass(frozen=True)
class _Rows:
    """Places (g, h) or (g, m, h) along an axis; `plain`: they are 0, 1, 2 and so on."""

    index: Tensor
    plain: bool

    def cover(self, count: int) -> bool:
        """Whether they are all places, in order."""
        return self.plain and self.index.numel() == count

    def spread(self, values: Tensor, count: int) -> Tensor:
        """`values` at their places along an axis of so many, ones elsewhere."""
        if self.cover(count):
            return values.flatten()
        ones = torch.ones(count, dtype=values.dtype, device=values.device)
        return ones.index_copy(0, self.index.flatten(), values.flatten())


class BlockFold:
    """Folds transforms into the parameters of a block, or of what stands around the blocks, one matrix at a time.

    Args:
        parts: what was found of it.
    """

    def __init__(self, parts: FoundParts) -> None:
        self.parts, self._places = parts, dict[Any, _Rows | None]()
        self._reads = {reader: norm for norm in parts.norms for reader in norm.readers}
        self._turned = {*parts.bare, *self._reads}

    def linear(
        self,
        one: Linear,
        w: Tensor,
        params: Mapping[str, Tensor],
        t: BlockTransform,
        turn: Turn | None,
        *,
        hadamard: bool = False,
    ) -> Tensor:
        """The matrix (out, in) of a linear in the transformed basis.

        Args:
            one: the linear.
            w: its matrix (out, in).
            params: parameters of the block; with a turn the gain of the norm that it reads must be there.
            t: the block's transforms.
            turn: rotation of the residual stream.
            hadamard: whether its input passes a Hadamard transform as the model runs.
        """
        for _, step in self.steps(one.parameter, params, t, turn, rows=one.rows, expert=one.expert, hadamard=hadamard):
            w = step(w)
        return w

    def steps(
        self,
        name: str,
        params: Mapping[str, Tensor],
        t: BlockTransform,
        turn: Turn | None,
        *,
        rows: tuple[int, int] | None = None,
        expert: int | None = None,
        hadamard: bool = False,
    ) -> list[FoldStep]:
        """List the maps of the rows and columns of a matrix (out, in), in order; those of rows are for its bias,
        too.  `rows`: which of its outputs there are."""
        steps, norm = list[FoldStep](), self._reads.get(name)
        if turn is not None and norm is not None and norm.gain is not None:
            gain = params[norm.gain] + norm.offset
            steps.append(("columns", lambda w: w * gain))
        for planes in self.parts.planes:
            steps += [("rows", change) for change in self._plane_steps(planes, name, t, rows)]
        for pair in self.parts.pairs:
            scale, rotation = t.pair_scales.get(pair.name), t.pair_rotations.get(pair.name)
            if scale is None or name not in (pair.source, pair.target):
                continue
            scale = scale[expert] if scale.dim() == 3 and expert is not None else scale
            if pair.source == name and (own := self._at(pair.rows, scale.device, rows)) is not None:
                steps.append(("rows", partial(_source_step, rows=own, scale=scale, rotation=rotation)))
            if pair.target == name and (own := self._at(pair.columns, scale.device)) is not None:
                steps.append(("columns", partial(_target_step, columns=own, scale=scale, rotation=rotation)))
        if hadamard:
            steps.append(("columns", apply_hadamard))
        if turn is not None and name in self.parts.writers:
            steps.append(("rows", turn.rows))
        if turn is not None and name in self._turned:
            steps.append(("columns", turn.columns))
        if norm is not None and (scale := t.norm_scales.get(norm.name)) is not None:
            steps.append(("columns", lambda w, s=scale: w * s))  # type: ignore[misc]
        return steps

    def vector(self, name: str, params: Mapping[str, Tensor], t: BlockTransform, turn: Turn | None) -> Tensor:
        """A parameter that is no matrix, in the transformed basis."""
        value = params[name]
        for matrix in self.parts.matrices.values():
            if matrix.bias == name:
                return self._bias(matrix.name, value, params, t, turn)
        for norm in self.parts.norms:
            if name in (norm.gain, norm.bias):
                value = self._of_norm(norm, name, params, turn)
                scale = t.norm_scales.get(norm.name)
                if scale is not None:
                    offset = norm.offset if name == norm.gain else 0.0
                    value = (value + offset) / scale.view_as(value) - offset
                return value
        for planes in self.parts.planes:
            if name in (planes.query, planes.key) and planes.name in t.plane_scales:
                value = self._gain(planes, name, value, t.plane_scales[planes.name])
        return turn.columns(value) if turn is not None and name in self.parts.writers else value

    def _bias(
        self, matrix: str, value: Tensor, params: Mapping[str, Tensor], t: BlockTransform, turn: Turn | None
    ) -> Tensor:
        """What is added to the outputs of a matrix; of stacked ones (E, out)."""

        def folded(b: Tensor, expert: int | None) -> Tensor:
            b = b[:, None]
            for side, step in self.steps(matrix, params, t, turn, expert=expert):
                b = step(b) if side == "rows" else b
            return b[:, 0]

        return folded(value, None) if value.dim() == 1 else torch.stack([folded(b, e) for e, b in enumerate(value)])

    def _of_norm(self, norm: Norm, name: str, params: Mapping[str, Tensor], turn: Turn | None) -> Tensor:
        """Gain or bias of a norm, whose gain goes to its readers where the stream turns."""
        value = params[name]
        if turn is None or norm.gain is None:
            return value
        if name == norm.gain:
            return torch.ones_like(value) - norm.offset
        return turn.columns(value / (params[norm.gain] + norm.offset))

    def _gain(self, planes: Planes, name: str, value: Tensor, scale: Tensor) -> Tensor:
        """A gain of queries or keys: it takes the scales that their matrices cannot."""
        assert planes.offset is not None
        keys = name == planes.key
        entries, channels = (
            self._at(planes.keys if keys else planes.queries, scale.device),
            self._at(planes.channels, scale.device),
        )
        assert entries is not None and channels is not None
        if not keys and len(entries.index) > 1 and len(scale) > 1:
            scale = scale.repeat_interleave(planes.group, 0)
        where = entries.index[:, channels.index]  # (heads, n, 2), or (1, n, 2) for all heads
        both = scale.expand(len(where), -1)[..., None].expand(where.shape)
        factor = _Rows(where, plain=False).spread(both, value.numel()).view_as(value)
        value = value + planes.offset
        return (value * factor if keys else value / factor) - planes.offset

    def _plane_steps(
        self, planes: Planes, name: str, t: BlockTransform, rows: tuple[int, int] | None
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        if planes.offset is not None or (scale := t.plane_scales.get(planes.name)) is None:
            return
        angle, channels = t.plane_angles.get(planes.name), self._at(planes.channels, scale.device)
        assert channels is not None
        for matrix, table, keys in ((planes.key, planes.keys, True), (planes.query, planes.queries, False)):
            own = self._at(table, scale.device, rows) if matrix == name else None
            if own is None:
                continue
            share = 1 if keys or len(scale) == 1 else planes.group
            yield partial(
                _plane_step,
                rows=own.index[:, channels.index],
                scale=(scale if keys else 1 / scale).repeat_interleave(share, 0),
                angle=None if angle is None else angle.repeat_interleave(share, 0),
            )

    def _at(self, numbers: Sequence[object], device: torch.device, part: tuple[int, int] | None = None) -> _Rows | None:
        """Places as a tensor, counted from the start of a part of the axis; None where they lie outside of it."""
        key = id(numbers), device, part
        if key not in self._places:
            index = torch.tensor(numbers) - (part[0] if part else 0)
            inside = part is None or (int(index.min()) >= 0 and int(index.max()) < part[1] - part[0])
            plain = torch.equal(index.flatten(), torch.arange(index.numel()))
            self._places[key] = _Rows(index.to(device), plain) if inside else None
        return self._places[key]


def _source_step(w: Tensor, rows: _Rows, scale: Tensor, rotation: Tensor | None) -> Tensor:
    """w (out, columns): rows (g, h) divided by their scales, then turned within each group."""
    w = w / rows.spread(scale, len(w))[:, None]
    if rotation is None:
        return w
    if rows.cover(len(w)):
        return (rotation.mT @ w.unflatten(0, rotation.shape[:2])).flatten(0, 1)
    return w.index_copy(0, rows.index.flatten(), (rotation.mT @ w[rows.index]).flatten(0, 1))


def _target_step(w: Tensor, columns: _Rows, scale: Tensor, rotation: Tensor | None) -> Tensor:
    """w (rows, in): columns (g, m, h) times the scales (g, h), then turned within each group and copy."""
    shape, whole = columns.index.shape, columns.cover(w.shape[1])
    if whole:
        scaled = w.unflatten(1, shape) * scale[:, None]
        return scaled.flatten(1) if rotation is None else _turned_groups(scaled, rotation)
    w = w * columns.spread(scale[:, None].expand(shape), w.shape[1])
    if rotation is None:
        return w
    return w.index_copy(1, columns.index.flatten(), _turned_groups(w[:, columns.index], rotation))


def _turned_groups(w: Tensor, rotation: Tensor) -> Tensor:
    """w (rows, g, m, h) turned by rotation (g, h, h) -> (rows, g * m * h)."""
    by_group = w.transpose(0, 1).flatten(1, 2) @ rotation  # (g, rows * m, h)
    return by_group.unflatten(1, (-1, w.shape[2])).transpose(0, 1).flatten(1)


def _plane_step(w: Tensor, rows: Tensor, scale: Tensor, angle: Tensor | None) -> Tensor:
    """w (out, columns): the planes rows (heads, n, 2) scaled and turned, scale and angle (heads, n) or (1, n)."""
    first, second = w[rows[..., 0]], w[rows[..., 1]]
    scale, angle = scale[..., None], None if angle is None else angle[..., None]
    if angle is None:
        one, other = first * scale, second * scale
    else:
        cos, sin = scale * angle.cos(), scale * angle.sin()
        one, other = first * cos - second * sin, first * sin + second * cos
    where = torch.cat([rows[..., 0].flatten(), rows[..., 1].flatten()])
    return w.index_copy(0, where, torch.cat([one.flatten(0, 1), other.flatten(0, 1)]))


def fold_block(
    params: Mapping[str, Tensor],
    fold: BlockFold,
    t: BlockTransform,
    turn: Turn | None,
    linears: Sequence[Linear],
    *,
    hadamard: Collection[str] = (),
) -> dict[str, Tensor]:
    """Fold a block's transforms into its parameters.

    Args:
        params: the block's parameters.
        fold: of its parts.
        t: its transforms.
        turn: rotation of the residual stream, where there is one.
        linears: its linears that are quantized.
        hadamard: names of those whose inputs pass a Hadamard transform as the model runs.

    Returns:
        The parameters in the transformed basis.
    """
    weights = {
        one.name: fold.linear(one, one.of(params), params, t, turn, hadamard=one.name in hadamard) for one in linears
    }
    folded = put_together(linears, weights)
    return {name: folded[name] if name in folded else fold_other(name, params, fold, t, turn) for name in params}


def fold_other(
    name: str, params: Mapping[str, Tensor], fold: BlockFold, t: BlockTransform, turn: Turn | None
) -> Tensor:
    """Fold transforms into a parameter that is none of the linears that are quantized: a router, a norm, a bias, a
    table."""
    matrix, value = fold.parts.matrices.get(name), params[name]
    if matrix is None or not value.is_floating_point():
        return fold.vector(name, params, t, turn) if value.is_floating_point() else value

    def folded(w: Tensor, expert: int | None) -> Tensor:
        w = w.mT if matrix.transposed else w
        for _, step in fold.steps(name, params, t, turn, expert=expert):
            w = step(w)
        return w.mT if matrix.transposed else w

    return torch.stack([folded(w, e) for e, w in enumerate(value)]) if matrix.experts else folded(value, None)


@torch.no_grad()
def folded_block(
    params: Mapping[str, Tensor],
    fold: BlockFold,
    t: BlockTransform,
    turn: Turn | None,
    linears: Sequence[Linear],
    *,
    hadamard: Collection[str] = (),
) -> dict[str, Tensor]:
    """Fold as `fold_block`, one matrix after the other in float64; the parameters keep their dtypes."""
    others = {name: p.double() if p.is_floating_point() and p.dim() < 2 else p for name, p in params.items()}
    weights = {
        one.name: fold.linear(
            one, one.of(params).double(), others, t, turn, hadamard=one.name in hadamard
        ).to(params[one.parameter].dtype)
        for one in linears
    }  # fmt: skip
    folded = put_together(linears, weights)
    for name, p in params.items():
        if name not in folded:
            exact = others | ({name: p.double()} if p.is_floating_point() else {})
            folded[name] = fold_other(name, exact, fold, t, turn).to(p.dtype)
    return {name: folded[name] for name in params}


@torch.no_grad()
def folded_outer(
    outer: Mapping[str, Tensor], parts: ModelParts, turn: Turn, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Fold a rotation of the residual stream into what stands around the blocks.

    Args:
        outer: parameters of what is no block's.
        parts: of the model.
        turn: the rotation.
        dtypes: of what changes, by name.

    Returns:
        The parameters; where embedding and head were one table they are two.
    """
    around, nothing = parts.around, BlockTransform()
    fold, changed = BlockFold(around), dict[str, Tensor]()
    vectors = {name: p.double() for name, p in outer.items() if p.dim() < 2 and p.is_floating_point()}
    readers = {*around.bare, *(reader for norm in around.norms for reader in norm.readers)}
    gains = {name for norm in around.norms for name in (norm.gain, norm.bias) if name}
    for name in {*around.writers, *readers, *gains}:
        value, matrix = outer[name], around.matrices.get(name)
        if value.dim() < 2 or (matrix is not None and (matrix.transposed or name in around.writers)):
            changed[name] = fold_other(name, vectors | {name: value.double()}, fold, nothing, turn).to(dtypes[name])
            continue
        changed[name] = torch.empty_like(value, dtype=dtypes[name])
        for some in micro_batches(len(value), 1):  # the whole table in float64 would be twice as large again
            exact = fold_other(name, vectors | {name: value[some].double()}, fold, nothing, turn)
            changed[name][some] = exact.to(dtypes[name])
    return {**outer, **changed}
