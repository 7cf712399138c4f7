"""Where the units of a block lie: channels of the stream, neurons of the feed-forward, heads with their queries.

A unit is a set of inputs of one matrix: a neuron is one input of the down projection, a key/value head and its queries
are the inputs of the output projection that they make, a channel is one input of whatever reads the stream. Whatever
reaches the inputs of one unit and of no other is the unit's own: outputs of matrices, however they are fused, entries
of gains and biases. What reaches what is seen by gradients, which are zero where there is no way. Statistics of norms
are held fixed, for these tie all that a norm divides to all that it sees.

Which inputs a unit has is read off bit by bit: of an output that reaches inputs whose unit has a bit, and none whose
unit has not, the unit has that bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calib import first_line
from calib.blockwise.walk import Walk
from calib.probe.bench import Bench, bench_of_block, bench_of_end, bench_of_start
from calib.probe.find import block_kind
from calib.probe.pairs import find_pairs
from calib.probe.parts import Matrix, Pair
from calib.probe.reach import NONE, SEVERAL, STREAM, Reach
from calib.probe.stream import TOKENS, find_gains
from calib.runtime.memory import is_out_of_memory

HIDDEN, FFN, HEADS = "hidden", "ffn", "heads"


@dataclass(frozen=True)
class Units:
    """Units of one kind, and where they lie.

    Args:
        count: how many there are.
        axes: parameter and axis -> the unit that each index along it belongs to, -1 for those of none.
        target: the matrix whose inputs they are, or "" where several read them.
        copies: query heads of each, where they are key/value heads.
        width: channels of a head.
    """

    count: int
    axes: Mapping[tuple[str, int], Tensor]
    target: str = ""
    copies: int = 1
    width: int = 1


@dataclass(frozen=True)
class PieceUnits:
    """Units of a block, or of what stands around the blocks.

    Args:
        kinds: the units by kind.
        missing: kind -> why none were found.
        matrices: every parameter that inputs are multiplied by.
        tables: parameters that rows are looked up in.
        readers: matrices that read the stream, in the order of their use -> the channel of each of their inputs.
        gains: parameters as wide as the stream that norms multiply by -> what is added to them first.
        behind: matrix that writes -> the one of these gains that multiplies what it writes.
    """

    kinds: Mapping[str, Units] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    readers: Mapping[str, Tensor] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelUnits:
    """Units of every block, of what stands before the first and of what follows the last."""

    blocks: tuple[PieceUnits, ...]
    start: PieceUnits
    end: PieceUnits


def find_units(walk: Walk) -> ModelUnits:
    """Find where the units of a model lie.

    Args:
        walk: of the model, in any precision; it must be static.
    """
    walk, width = walk.in_double(), walk.state_shape[-1]
    by_kind = dict[Any, PieceUnits]()
    for index, module in enumerate(walk.modules):
        if (kind := block_kind(module)) not in by_kind:
            by_kind[kind] = _tried(lambda i=index: bench_of_block(walk, i), block_units, width)  # type: ignore[misc]
    ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS) % 7
    start = _tried(lambda: bench_of_start(walk, ids), start_units, width)
    end = _tried(lambda: bench_of_end(walk), end_units, width)
    return ModelUnits(tuple(by_kind[block_kind(module)] for module in walk.modules), start, end)


def _tried(make: Callable[[], Bench], find: Callable[[Bench, int], PieceUnits], width: int) -> PieceUnits:
    """Whatever the library's code does where it is looked into, what cannot be found is left out."""
    try:
        return find(make(), width)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return PieceUnits(
            missing=dict.fromkeys((HIDDEN, FFN, HEADS), f"its code cannot be looked into ({first_line(error)})")
        )


def block_units(bench: Bench, width: int) -> PieceUnits:
    """Find the units of a block.

    Args:
        bench: the block.
        width: of a token's hidden state.
    """
    look = Reach(bench, width)
    pairs, gains = find_pairs(bench, width), _gains(bench, width)
    hidden, readers = _hidden(look, width)
    kinds, missing = {HIDDEN: hidden}, dict[str, str]()
    for kind, found in ((HEADS, _heads(look, pairs)), (FFN, _feed_forward(look, pairs, readers))):
        if isinstance(found, Units):
            kinds[kind] = found
        else:
            missing[kind] = found
    behind = _behind(look, hidden, gains)
    return PieceUnits(kinds, missing, dict(bench.matrices), tuple(bench.tables), readers, gains, behind)


def end_units(bench: Bench, width: int) -> PieceUnits:
    """Find the channels of the stream in what follows the last block."""
    look = Reach(bench, width)
    hidden, readers = _hidden(look, width)
    gains = _gains(bench, width)
    return PieceUnits({HIDDEN: hidden}, {}, dict(bench.matrices), tuple(bench.tables), readers, gains)


def start_units(bench: Bench, width: int) -> PieceUnits:
    """Find the channels of the stream in what stands before the first block."""
    look = Reach(bench, width)
    codes = look.reaching([look.output], torch.arange(width), width)
    return PieceUnits(
        {HIDDEN: Units(width, look.axes([codes]))}, {}, dict(bench.matrices), tuple(bench.tables)
    )  # fmt: skip


def _hidden(look: Reach, width: int) -> tuple[Units, dict[str, Tensor]]:
    """Channels of the stream, and the matrices that read them."""
    seen, inputs = list[dict[str, Tensor]](), dict[str, Tensor]()
    channels = torch.arange(width)
    for name, given in [*look.inputs.items(), (STREAM, [look.output])]:
        if any(z.shape[-1] != width for z in given):
            continue
        codes = look.reaching(given, channels, width)
        column = codes[STREAM]  # the one that each channel reaches
        if not torch.equal(column.sort().values, channels):
            continue
        channel = torch.empty_like(column).index_copy_(0, column, channels)
        seen.append({n: torch.where(c >= 0, channel[c.clamp(min=0)], c) for n, c in codes.items()})
        if name != STREAM:
            inputs[name] = channel
    return Units(width, look.axes(seen, inputs)), inputs


def _heads(look: Reach, pairs: Sequence[Pair]) -> Units | str:
    """Key/value heads with their queries; or why there are none."""
    summed = [pair for pair in pairs if pair.rotates]
    if len(summed) != 1:
        return f"{len(summed) or 'no'} attention layers of a block were found whose heads can be told apart"
    (pair,) = summed
    matrix = look.bench.matrices[pair.target]
    units = torch.full((matrix.into,), NONE)
    for g, group in enumerate(pair.columns):
        for columns in group:
            units[list(columns)] = g
    count = len(pair.rows)
    codes = look.reaching(look.inputs[pair.target], units, count)
    axes = look.axes([codes], {pair.target: units})
    return Units(count, axes, pair.target, len(pair.columns[0]), len(pair.rows[0]))


def _feed_forward(look: Reach, pairs: Sequence[Pair], readers: Mapping[str, Tensor]) -> Units | str:
    """Neurons of the feed-forward; or why there are none."""
    summed, found = {pair.target for pair in pairs if pair.rotates}, list[Units]()
    for name, matrix in look.bench.matrices.items():
        if name in summed or name in readers or matrix.router:
            continue
        units = torch.arange(matrix.into)
        codes = look.reaching(look.inputs[name], units, matrix.into)
        made = [codes[n] for n in look.bench.matrices if (codes[n] != NONE).any()]
        if not made or any((code == SEVERAL).any() for code in made):
            continue
        if all(len(code[code >= 0].unique()) == matrix.into for code in made):
            found.append(Units(matrix.into, look.axes([codes], {name: units}), name))
    if len(found) == 1:
        return found[0]
    if not found:
        return "no matrix of a block was found whose inputs are made one by one"
    return f"{len(found)} matrices of a block have inputs that are made one by one, not a single feed-forward's"


def _gains(bench: Bench, width: int) -> dict[str, float]:
    return {name: add for name, add in find_gains(bench, width).items() if bench.params[name].numel() == width}


def _behind(look: Reach, hidden: Units, gains: Mapping[str, float]) -> dict[str, str]:
    """Which gain multiplies what a matrix writes to the stream: without that gain it writes nothing."""
    bench, found = look.bench, dict[str, str]()
    writers = [name for name in bench.matrices if (name, look.sides(name)[0]) in hidden.axes]
    for gain, offset in gains.items():
        zero = torch.full_like(bench.params[gain], -offset)
        width = hidden.count
        other = Reach(bench, width, {gain: zero})
        codes = other.reaching([other.output], torch.arange(width), width)
        found |= {name: gain for name in writers if (codes[name] == NONE).all()}
    return found
