"""Prove of each transform that it leaves a model's function alone, and leave out those that do not.

What `calib.probe` finds are candidates. Here every one is folded, by the code that folds what ships, and the piece is
run before and after in double precision; a difference above 1e-9 refuses it. First without the model's weights, by
drawn matrices of low rank, whose two factors are folded apart: that costs no memory at any width, and at two sizes of
activations shows what clamps hide. Then every block with its real weights, as it is first read. Tokens are sent
to every expert in turn, whatever routers say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calib import first_line
from calib.blockwise.arguments import answer_of, hidden_of
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.walk import RowBatch, Walk
from calib.jobs.journal import Journal
from calib.probe.bench import drawn, normal, text
from calib.probe.find import block_kind, found_parts, remembered, walk_on_cpu
from calib.probe.images import beside_text, image_inputs
from calib.probe.parts import (
    NORM_SCALE,
    PAIR_ROTATION,
    PAIR_SCALE,
    PLANE_ANGLE,
    PLANE_SCALE,
    RESIDUAL,
    FoundParts,
    Matrix,
    ModelParts,
)
from calib.probe.products import AnsweredProducts, Asked
from calib.runtime.distributed import rank, world_size
from calib.runtime.memory import is_out_of_memory
from compressor.engine.rotations import Reflections, nearest_orthogonal
from compressor.transforms.fold import BlockFold, BlockTransform, FoldStep, Turn, identity_transform

CPU = torch.device("cpu")
PROVED = 1e-9  # relative difference that double precision leaves, with room
SIZES = (1.0, 30.0)  # of drawn activations
RANK = 8  # of drawn matrices
AT_ONCE = 2**24  # numbers of a matrix that are in double precision together, where its rows may be apart
UNMET = "not every expert was met"


class TransformedPiece:
    """A block, or what stands around the blocks, to be run before and after its parameters are transformed.

    Args:
        run: (parameters, hidden states (B, T, d)) -> output.
        parts: what was found of it.
        shapes: its parameters.
        weights: their real values; None: they are drawn.
        size: of drawn activations.
    """

    def __init__(
        self,
        run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        parts: FoundParts,
        shapes: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None,
        size: float = 1.0,
    ) -> None:
        self._run, self._parts, self._weights, self._size = run, parts, weights, size
        self._drawn = dict[Any, tuple[Tensor, Tensor]]()
        self._vectors = {
            name: drawn(name, p, none=False) if weights is None else _double(weights[name])
            for name, p in shapes.items()
            if name not in parts.matrices and name not in parts.tables
        }
        self._meta = {
            name: torch.empty(p.shape, dtype=torch.float64, device="meta")
            for name, p in shapes.items()
            if name not in self._vectors
        }
        self.experts = {name: m.experts for name, m in parts.matrices.items() if m.experts}

    def output(self, hidden: Tensor, t: BlockTransform, turn: Turn | None) -> tuple[Tensor, list[Tensor], set[Any]]:
        """Run it with transformed parameters.

        Returns:
            The output, what routers said, and which matrix of which expert was asked for.
        """
        fold = BlockFold(self._parts)
        given = {name: fold.vector(name, self._vectors, t, turn) if p.is_floating_point() else p
                 for name, p in self._vectors.items()}  # fmt: skip
        said, met = list[Tensor](), set[Any]()

        def answer(asked: Asked) -> Tensor:
            use, matrix = asked.use, self._parts.matrices[asked.use.parameter]
            met.add((use.parameter, use.expert))
            if matrix.experts and use.expert is None:  # all at once
                met.update((use.parameter, e) for e in range(matrix.experts))
                return torch.stack(
                    [self._product(x, matrix, e, fold, t, turn) for e, x in enumerate(asked.x)]
                )  # fmt: skip
            made = self._product(asked.x, matrix, use.expert, fold, t, turn)
            if not matrix.router:
                return made
            said.append(made)
            return made

        def rows(name: str, index: Tensor) -> Tensor:
            if self._weights is None:
                shape = int(index.max()) + 1, *self._meta[name].shape[1:]
                values = normal(name, shape)[index]
            else:
                values = _double(self._weights[name][index.to(self._weights[name].device)])
            return turn.columns(values) if turn is not None and name in self._parts.writers else values

        with torch.no_grad(), AnsweredProducts({**given, **self._meta}, answer, rows, experts=self.experts.values()):
            return self._run({**given, **self._meta}, hidden), said, met

    def _product(
        self, x: Tensor, matrix: Matrix, expert: int | None, fold: BlockFold, t: BlockTransform, turn: Turn | None
    ) -> Tensor:
        steps = fold.steps(matrix.name, self._vectors, t, turn, expert=expert)
        if self._weights is None:
            a, b = self._factors(matrix, expert)
            return x @ _applied(b, steps, "columns").mT @ _applied(a, steps, "rows").mT
        w = self._weights[matrix.name]
        w = w if expert is None or w.dim() == 2 else w[expert]
        w = w.mT if matrix.transposed else w
        if w.numel() <= AT_ONCE or any(side == "rows" for side, _ in steps):
            return x @ _applied(_double(w), steps).mT
        some = w.split(max(1, AT_ONCE // w.shape[1]))
        return torch.cat([x @ _applied(_double(part), steps).mT for part in some], -1)

    def _factors(self, matrix: Matrix, expert: int | None) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in), whose product is the matrix."""
        if (matrix.name, expert) not in self._drawn:
            a = normal(f"{matrix.name} {expert} out", (matrix.out, RANK)) / RANK**0.5
            b = normal(f"{matrix.name} {expert} in", (RANK, matrix.into)) / matrix.into**0.5
            self._drawn[matrix.name, expert] = self._size * a, b
        return self._drawn[matrix.name, expert]


def _double(w: Tensor) -> Tensor:
    return w.double() if w.is_floating_point() else w


def _applied(w: Tensor, steps: Sequence[FoldStep], side: str | None = None) -> Tensor:
    for where, step in steps:
        w = step(w) if side in (None, where) else w
    return w


def residual_turn(width: int, *, centred: bool, device: torch.device) -> Reflections:
    """A rotation that mixes everything, and where `centred` leaves the vector of ones alone; it is not its inverse."""
    axes = normal("axes", (2, width))
    axes = axes - axes.mean(-1, keepdim=True) if centred else axes
    return Reflections((axes / axes.norm(dim=-1, keepdim=True)).to(device))


BESIDE = {"pair_rotations": "pair_scales", "plane_angles": "plane_scales"}


def random_transform(parts: FoundParts, seed: int = 0) -> BlockTransform:
    """Transforms of a block that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def changed(kind: str, t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if kind == "pair_rotations":
            return nearest_orthogonal(noise)
        return noise if kind == "plane_angles" else 0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64)

    kinds = identity_transform(parts).kinds
    return BlockTransform(
        **{kind: {name: changed(kind, t) for name, t in of.items()} for kind, of in kinds.items()}
    )  # fmt: skip


# Kind of transforms -> how it is called where it is refused.
CALLED = {
    "norm_scales": NORM_SCALE, "pair_scales": PAIR_SCALE, "pair_rotations": PAIR_ROTATION,
    "plane_scales": PLANE_SCALE, "plane_angles": PLANE_ANGLE,
}  # fmt: skip


class Trial:
    """Runs a piece as it is, and again with its parameters transformed, and says how far apart that is.

    Args:
        pieces: the piece, once for each size of drawn activations.
        parts: what was found of it.
        hidden: (B, T, d) that it is run on.
        enters: whether hidden states enter it, which turn.
        leaves: whether hidden states leave it, which turn.
    """

    def __init__(
        self,
        pieces: Sequence[TransformedPiece],
        parts: FoundParts,
        hidden: Tensor,
        *,
        enters: bool = True,
        leaves: bool = True,
    ) -> None:
        self._pieces, self._parts, self._hidden = pieces, parts, hidden
        self._enters, self._leaves = enters, leaves
        self._before = [one.output(hidden, BlockTransform(), None) for one in pieces]
        experts = pieces[0].experts.items()
        self._unmet = {
            name for _, _, met in self._before for name, n in experts for e in range(n) if (name, e) not in met
        }

    def apart(self, t: BlockTransform, turn: Turn | None) -> float:
        """How far outputs with transforms are from those without, relative to what the piece adds to the stream, and
        what routers say from what they said."""
        given = self._hidden if turn is None or not self._enters else turn.columns(self._hidden)
        worst = 0.0
        for one, (output, said, _) in zip(self._pieces, self._before, strict=True):
            changed, also, _ = one.output(given, t, turn)
            expected = output if turn is None or not self._leaves else turn.columns(output)
            added = output - self._hidden if output.shape == self._hidden.shape and self._enters else output
            scale = max(float(added.abs().max()), 1e-4 * float(output.abs().max()))
            worst = max(worst, _relative(changed, expected, scale))
            worst = max([worst, *(_relative(a, b, float(b.abs().max())) for a, b in zip(also, said, strict=True))])
        return worst

    def refused(self, turn: Turn | None) -> dict[str, str]:
        """Find the transforms that change what the piece computes.

        Args:
            turn: rotation of the residual stream; None: it is not asked about.

        Returns:
            Transform and what it is of -> why it is refused; all together hold where this is empty.
        """
        t = random_transform(self._parts).to(self._hidden.device)
        if not self._unmet and self.apart(t, turn) <= PROVED:
            return {}
        bad = {f"{CALLED[kind]} of {name}": why for kind, name, why in self._refused_alone(t)}
        if turn is not None:
            off = 0.0 if self._unmet else self.apart(BlockTransform(), turn)
            if self._unmet or off > PROVED:
                bad[RESIDUAL] = UNMET if self._unmet else f"it changes what is computed by {off:.0e}"
        rest = random_transform(self._parts.without(bad)).to(self._hidden.device)
        if self._unmet or (off := self.apart(rest, None if RESIDUAL in bad else turn)) <= PROVED:
            return bad
        every = {f"{CALLED[kind]} of {name}" for kind, of in t.kinds.items() for name in of}
        return dict.fromkeys({RESIDUAL, *every}, f"together they change the output by {off:.0e}")

    def _refused_alone(self, t: BlockTransform) -> Iterator[tuple[str, str, str]]:
        """Kind, name and reason of each transform in `t` that does not hold by itself."""
        unmet = {pair.name for pair in self._parts.pairs if pair.source in self._unmet}
        for kind, of in t.kinds.items():
            for name, value in of.items():
                beside = BESIDE.get(kind)  # scales, without which there is none of this kind
                ones = {} if beside is None else {beside: {name: torch.ones_like(t.kinds[beside][name])}}
                if name in unmet:
                    yield kind, name, UNMET
                elif (off := self.apart(replace(BlockTransform(), **ones, **{kind: {name: value}}), None)) > PROVED:
                    yield kind, name, f"it changes the output by {off:.0e}"


def _relative(a: Tensor, b: Tensor, scale: float) -> float:
    """The largest difference of a from b, of `scale`; infinite where one has no number, which would prove nothing."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max()) / max(scale, 1e-300)


def _tokens(parts: FoundParts, width: int, device: torch.device) -> Tensor:
    """Hidden states of so many tokens that every expert is the first for one."""
    count = max(10, *(math.ceil(m.experts / 2) for m in parts.matrices.values()), 10)
    return normal("tokens", (2, count, width)).to(device)


def prove_model(walk: Walk, parts: ModelParts) -> ModelParts:
    """Leave out of the parts of a model what does not hold for drawn weights.

    Args:
        walk: of the model, in any precision.
        parts: what was found of it.
    """
    if not walk.static or len(walk.state_shape) > 1:
        return parts
    walk, by_kind = walk.in_double(), dict[Any, FoundParts]()
    turn = None if parts.obstacle else residual_turn(walk.state_shape[-1], centred=parts.centred, device=CPU)
    for index, (module, found) in enumerate(zip(walk.modules, parts.blocks, strict=True)):
        if (kind := block_kind(module)) not in by_kind:
            by_kind[kind] = found.without(prove_block(walk, index, found, None, turn))
    blocks = tuple(by_kind[block_kind(module)] for module in walk.modules)
    start, end = parts.start, parts.end
    if turn is not None:
        start = start.without(prove_start(walk, start, None, turn))
        if {*start.writers} & {*beside_text(walk)}:
            start = start.without(prove_images(walk, start, turn))
        end = end.without(prove_end(walk, end, None, turn))
        if set(start.writers) & {*end.bare, *(reader for norm in end.norms for reader in norm.readers)}:
            end = end.without({RESIDUAL: "embedding and head are one parameter"})
    return ModelParts(blocks, start, end)


def prove_block(
    walk: Walk, index: int, parts: FoundParts, weights: Mapping[str, Tensor] | None, turn: Turn | None
) -> dict[str, str]:
    """Find the transforms of a block that change what it computes, as `Trial.refused` does.

    Args:
        walk: of the model, in double precision.
        index: of the block.
        parts: what was found of it.
        weights: its parameters; None: drawn ones.
        turn: rotation of the residual stream, where it is asked about.
    """
    module = walk.modules[index]
    shapes = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
    hidden = _tokens(parts, walk.state_shape[-1], _device(weights))

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return walk.run(index, params, hidden, text(walk, hidden))

    def trial() -> Trial:
        sizes = SIZES if weights is None else SIZES[:1]
        return Trial([TransformedPiece(run, parts, shapes, weights, size) for size in sizes], parts, hidden)

    return _tried(trial, turn, parts)


def prove_start(walk: Walk, parts: FoundParts, weights: Mapping[str, Tensor] | None, turn: Turn) -> dict[str, str]:
    """Find out whether what enters the first block turns with the tables that it is made of.

    Args:
        walk: of the model, in double precision.
        parts: what was found before the first block.
        weights: parameters there; None: drawn ones.
        turn: rotation of the residual stream.
    """
    hidden = _tokens(FoundParts(), walk.state_shape[-1], _device(weights))
    ids = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2]) % 7

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return walk.start(RowBatch(walk.inputs(ids)), params)

    def trial() -> Trial:
        return Trial([TransformedPiece(run, parts, _named(walk, walk.entering), weights)], parts, hidden, enters=False)

    return _tried(trial, turn, parts)


def prove_images(walk: Walk, parts: FoundParts, turn: Turn) -> dict[str, str]:
    """Find out whether what images write turns with the stream, by drawn weights and a drawn image.

    Args:
        walk: of the model, in double precision.
        parts: what was found before the first block.
        turn: rotation of the residual stream.
    """
    inputs = image_inputs(walk)
    names = [*walk.entering, *beside_text(walk)]

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return hidden_of(walk.before(len(walk.calls) - 1, RowBatch(inputs), params))

    def trial() -> Trial:
        hidden = torch.zeros(1, 1, 1, dtype=torch.float64)
        return Trial([TransformedPiece(run, parts, _named(walk, names), None)], parts, hidden, enters=False)

    return _tried(trial, turn, parts)


def prove_end(walk: Walk, parts: FoundParts, weights: Mapping[str, Tensor] | None, turn: Turn) -> dict[str, str]:
    """Find out whether logits stay as they are where what leaves the last block turns.

    Args:
        walk: of the model, in double precision.
        parts: what was found behind the last block.
        weights: parameters there; None: drawn ones.
        turn: rotation of the residual stream.
    """
    hidden = _tokens(FoundParts(), walk.state_shape[-1], _device(weights))

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return answer_of(walk.finish(text(walk, hidden), params, hidden))

    def trial() -> Trial:
        return Trial([TransformedPiece(run, parts, _named(walk, walk.leaving), weights)], parts, hidden, leaves=False)

    return _tried(trial, turn, parts)


def _named(walk: Walk, names: Sequence[str]) -> dict[str, Tensor]:
    every = dict(walk.model.named_parameters(remove_duplicate=False)) | walk.model.state_dict()
    return {name: every[name] for name in names}


def _device(weights: Mapping[str, Tensor] | None) -> torch.device:
    return CPU if weights is None else next(iter(weights.values())).device


def _tried(trial: Callable[[], Trial], turn: Turn | None, parts: FoundParts) -> dict[str, str]:
    try:
        return trial().refused(turn)
    except Exception as error:  # whatever the library's code does with parameters that it did not make
        if is_out_of_memory(error):
            raise
        kinds = identity_transform(parts).kinds
        names = [f"{CALLED[kind]} of {name}" for kind, of in kinds.items() for name in of]
        return dict.fromkeys([RESIDUAL, *names], f"it cannot be proved ({first_line(error)})")


_known = dict[str, ModelParts]()  # by config


def parts_of(stream: BlockwiseModel) -> ModelParts:
    """Find the parts of a model, and leave out what does not hold for drawn weights.  Nothing is read."""
    return remembered(_known, stream.config, lambda: prove_model(walk_on_cpu(stream), found_parts(stream)))


class Proof:
    """Holds the transforms of a model against its real weights, as these are read.

    Args:
        stream: the model.
        parts: what was found of it, and holds for drawn weights.
    """

    def __init__(self, stream: BlockwiseModel, parts: ModelParts) -> None:
        self._parts, self._walk, self._turn = parts, stream.walk.in_double(), None
        if parts.obstacle is None:
            self._turn = residual_turn(stream.hidden, centred=parts.centred, device=stream.device)

    def block(self, journal: Journal, index: int, params: Mapping[str, Tensor]) -> None:
        """Note in the journal what the weights of a block refuse."""
        found = self._parts.blocks[index]
        if found.norms or found.pairs or found.planes or self._turn is not None:
            self._note(journal, f"{index}", lambda: prove_block(self._walk, index, found, params, self._turn))

    def start(self, journal: Journal, params: Mapping[str, Tensor]) -> None:
        """Note in the journal whether the stream may turn as it enters the blocks."""
        if (turn := self._turn) is not None:
            self._note(journal, "start", lambda: prove_start(self._walk, self._parts.start, params, turn))

    def end(self, journal: Journal, params: Mapping[str, Tensor]) -> None:
        """Note in the journal whether the stream may turn as it leaves the blocks."""
        if (turn := self._turn) is not None:
            self._note(journal, "end", lambda: prove_end(self._walk, self._parts.end, params, turn))

    def _note(self, journal: Journal, what: str, prove: Callable[[], dict[str, str]]) -> None:
        if (page := self._page(what)) not in journal:
            journal.write_own(page, {}, prove())

    def _page(self, what: str, process: int | None = None) -> str:
        return f"proof-{what}-{rank() if process is None else process}"

    def admitted(self, journal: Journal) -> ModelParts:
        """The parts without what some process's look at the weights refused."""

        def bad(what: str) -> dict[str, str]:
            pages = [self._page(what, process) for process in range(world_size())]
            return {k: v for page in pages if page in journal for k, v in journal.notes(page).items()}

        blocks = tuple(found.without(bad(f"{i}")) for i, found in enumerate(self._parts.blocks))
        return ModelParts(blocks, self._parts.start.without(bad("start")), self._parts.end.without(bad("end")))


def left_out(parts: ModelParts) -> dict[str, str]:
    """Transform -> why a model does not have it, or in which blocks not, for a report."""
    reasons, count = dict[str, str](), len(parts.blocks)
    if parts.obstacle and not any(found.norms or found.pairs or found.planes for found in parts.blocks):
        return {"transforms": parts.obstacle}
    if parts.obstacle:
        reasons["residual_rotation"] = parts.obstacle
    blocks = parts.blocks
    if not any(norm.scales for found in blocks for norm in found.norms):
        reasons["norm_scales"] = "no norm of the stream stands before what reads it"
    if not any(pair.rotates for found in blocks for pair in found.pairs):
        reasons["value_rotation"] = "no values were found that attention sums and nothing else changes"
    if not any(not pair.rotates for found in blocks for pair in found.pairs):
        reasons["up_scale"] = "between the two steps of the feed-forward no channel stays in proportion"
    if not any(found.planes for found in blocks):
        reasons["key_scale"] = "queries and keys are not seen, or not made channel by channel"
    elif not any(planes.turns for found in blocks for planes in found.planes):
        reasons["key_angle"] = "queries and keys are normalised after their projections"
    for name in dict.fromkeys(name for found in blocks for name in found.refused if name != RESIDUAL):
        where = [found.refused[name] for found in blocks if name in found.refused]
        reasons[name] = where[0] if len(where) == count else f"in {len(where)} of {count} blocks {where[0]}"
    return reasons
