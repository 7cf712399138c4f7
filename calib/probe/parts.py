"""How the parts of a model hang together: what reads from and writes to the residual stream, which outputs of one
matrix scale or turn inputs of another.  Found by `calib.probe.find`, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

Indices = tuple[tuple[int, ...], ...]  # by group: (g, h)
GroupIndices = tuple[tuple[tuple[int, ...], ...], ...]  # by group and copy: (g, m, h)


@dataclass(frozen=True)
class Matrix:
    """A parameter that inputs are multiplied by: (..., out, in), or (..., in, out).

    Args:
        name: of the parameter, from the block.
        transposed: whether it is (..., in, out).
        bias: the parameter that is added to its outputs, if any.
        experts: how many matrices it stacks, 0 where it is one.
        out: number of outputs.
        into: number of inputs.
        router: whether its outputs choose experts.
    """

    name: str
    transposed: bool
    bias: str | None
    experts: int
    out: int
    into: int
    router: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    Args:
        name: of its module, from the block.
        gain: its parameter that it multiplies by, once `offset` is added to it; None where it has none.
        bias: its parameter that it adds, if any.
        offset: what is added to the gain.
        readers: matrices that multiply what it gives.
        scales: whether its channels may be scaled against theirs.
    """

    name: str
    gain: str | None
    bias: str | None
    offset: float
    readers: tuple[str, ...]
    scales: bool = True


@dataclass(frozen=True)
class Pair:
    """Outputs of one matrix that reach, each alone and in proportion, inputs of another.

    Outputs `rows[g][c]` of `source` go to inputs `columns[g][k][c]` of `target` for every copy k: a value channel to
    every query head that shares it. A common factor of the one may be taken out of the other; where groups `rotate`,
    within each g also a rotation over c.
    """

    source: str
    target: str
    rows: Indices
    columns: GroupIndices
    rotates: bool

    @property
    def name(self) -> str:
        """How the pair is called: by its matrices."""
        return " -> ".join(name.removesuffix(".weight") for name in (self.source, self.target))


@dataclass(frozen=True)
class Planes:
    """Queries and keys by channel: which pairs of channels position turns together.

    Args:
        name: of the attention layer, from the block.
        heads: number of key heads; of query heads `group` times as many.
        group: query heads that share a key head.
        width: channels of a head.
        channels: (n, 2), the planes: a common factor and angle of both channels commute with what position does.
        queries: where their channels are made, (H, width): rows of a matrix, or entries of a norm's gain.
        keys: the same for keys, (G, width); (1, width) where one gain serves all heads.
        query: name of that matrix or gain.
        key: name of that matrix or gain.
        offset: of those gains; None where they are matrices.
        turns: whether planes may turn, too.
    """

    name: str
    heads: int
    group: int
    width: int
    channels: Indices
    queries: Indices
    keys: Indices
    query: str
    key: str
    offset: float | None = None
    turns: bool = True


@dataclass(frozen=True)
class AttentionShape:
    """Queries, keys and values of a layer as its attention function sees them: heads, and channels of a key."""

    name: str
    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class FoundParts:
    """Parts of a block, or of what stands around the blocks.

    Args:
        matrices: every parameter that inputs are multiplied by, in the order of their first use.
        tables: parameters that rows are looked up in.
        writers: parameters whose outputs, or which themselves, are added to the stream: matrices and their biases,
            tables and vectors.
        norms: of the stream, with what reads them.
        bare: matrices that read the stream, or a norm of it that has no gain.
        centred: whether some norm of the stream takes the mean away, so that only rotations that leave the vector of
            ones alone pass it.
        pairs: outputs that scale or turn inputs.
        gains: parameters that norms multiply by, of the stream or of anything else, and what is added to each first.
        planes: of queries and keys, by attention layer.
        attention: layers that are open to edits.
        obstacle: why nothing can turn the stream; None where it may be tried.
        refused: transforms that were tried and changed what is computed, and why they are left out.
    """

    matrices: dict[str, Matrix] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ()
    bare: tuple[str, ...] = ()
    centred: bool = False
    pairs: tuple[Pair, ...] = ()
    gains: Mapping[str, float] = field(default_factory=dict)
    planes: tuple[Planes, ...] = ()
    attention: tuple[AttentionShape, ...] = ()
    obstacle: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def without(self, refused: Mapping[str, str]) -> FoundParts:
        """The parts without what `refused` names: a transform and what it is of, and why it is not admitted."""

        def kept(kind: str, name: str) -> bool:
            return f"{kind} of {name}" not in refused

        return replace(
            self,
            norms=tuple(replace(n, scales=n.scales and kept(NORM_SCALE, n.name)) for n in self.norms),
            pairs=tuple(
                replace(p, rotates=p.rotates and kept(PAIR_ROTATION, p.name))
                for p in self.pairs
                if kept(PAIR_SCALE, p.name)
            ),
            planes=tuple(
                replace(p, turns=p.turns and kept(PLANE_ANGLE, p.name))
                for p in self.planes
                if kept(PLANE_SCALE, p.name)
            ),
            obstacle=self.obstacle or refused.get(RESIDUAL),
            refused={**self.refused, **refused},
        )


# Transforms, as they are refused.
RESIDUAL = "rotation of the residual stream"
NORM_SCALE, PAIR_SCALE, PAIR_ROTATION = "scale", "scale", "rotation"
PLANE_SCALE, PLANE_ANGLE = "key scale", "key angle"


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model: of every block, of what stands before the first and of what follows the last."""

    blocks: tuple[FoundParts, ...]
    start: FoundParts
    end: FoundParts

    @property
    def obstacle(self) -> str | None:
        """Why the residual stream is not rotated, or None."""
        return next((p.obstacle for p in (self.start, *self.blocks, self.end) if p.obstacle), None)

    @property
    def centred(self) -> bool:
        """Whether only rotations that leave the vector of ones alone pass the norms."""
        return any(parts.centred for parts in (*self.blocks, self.end))

    @property
    def around(self) -> FoundParts:
        """Parts before the first block and behind the last, as one."""
        matrices = {**self.start.matrices, **self.end.matrices}
        return replace(
            self.end, matrices=matrices, tables=self.start.tables, writers=self.start.writers, obstacle=self.obstacle
        )
