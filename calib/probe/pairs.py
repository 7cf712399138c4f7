"""Which outputs of one matrix reach inputs of another alone and in proportion, and which of them attention mixes alike.

Outputs are multiplied by numbers that are all different; an input that is multiplied by one of these is that output's.
Between one token's values and its attention output there is nothing else, and between up and down projections a gate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calib.probe.bench import Bench, Change, normal
from calib.probe.parts import Pair
from calib.probe.products import Asked

LONE_TOKENS = 4  # rows of one token each
HOPELESS = 6  # the round after which outputs that own nothing are given up
LOUD_ANSWERS = 30.0  # size of answers in which what is clamped shows
ROUNDS = 24  # in which some of the outputs are multiplied: those that share an input with others are met alone


def find_pairs(bench: Bench, width: int) -> tuple[Pair, ...]:
    """Find the pairs of matrices of a block whose outputs and inputs scale, or turn, together.

    Args:
        bench: the block.
        width: of a token's hidden state.
    """
    search, found = _Search(bench, normal("alone", (LONE_TOKENS, 1, width))), list[Pair]()
    for source in [m for m in bench.matrices.values() if not m.router]:
        base, moved = search.base(source.name), search.inputs({source.name: lambda y: y.flip(-1) * 1.1})
        for target, z in base.items():
            if target == source.name or target not in moved or moved[target].shape != z.shape:
                continue
            if torch.equal(moved[target], z) or bench.matrices[target].router:
                continue
            if (owner := search.sources(source.name, target)) is None or not search.holds(source.name, target, owner):
                continue
            if (pair := _pair(bench, width, source.name, target, owner)) is not None:
                found.append(pair)
    return tuple(found)


class _Search:
    """What enters each matrix, where answers are multiplied."""

    def __init__(self, bench: Bench, x: Tensor) -> None:
        self._bench, self._x, self._bases = bench, x, dict[tuple[str, float], dict[str, Tensor]]()

    def base(self, source: str, size: float = 1.0) -> dict[str, Tensor]:
        """What enters each matrix as things are, but that what `source` answers is positive: so a ReLU hides
        nothing."""
        if (source, size) not in self._bases:
            self._bases = {key: kept for key, kept in self._bases.items() if key[0] == source}
            self._bases[source, size] = self.inputs({source: positive}, size)
        return self._bases[source, size]

    def inputs(self, change: dict[str, Change], size: float = 1.0) -> dict[str, Tensor]:
        """What enters each matrix where all answers are `size` times as large."""
        names = {*change, *(self._bench.matrices if size != 1 else ())} - self._bench.routers

        def loud(name: str) -> Change:
            then = change.get(name)
            return lambda y: size * (y if then is None else then(y))

        return _inputs(self._bench, self._x, {name: loud(name) for name in names})

    def sources(self, source: str, target: str) -> Tensor | None:
        """The output of `source` that each input of `target` is in proportion to (in,); None where some have none."""
        base, count = self.base(source)[target], self._bench.matrices[source].out
        owner, factors = torch.full((base.shape[-1],), -1), distinct_factors(count)
        for number, mask in enumerate(_masks(count)):
            s = torch.where(mask, factors, 1.0)
            seen = self.inputs({source: lambda y: positive(y) * s})  # noqa: B023
            hit = multiplied_by(base, seen[target], torch.where(mask, factors, 7.0))
            owner = torch.where(owner < 0, hit, owner)
            if (owner >= 0).all():
                return owner
            if number == HOPELESS and (owner < 0).all():
                return None
        return None

    def holds(self, source: str, target: str, owner: Tensor) -> bool:
        """Whether large answers, which a clamp would cut, are owned alike."""
        factors = distinct_factors(self._bench.matrices[source].out)
        s = torch.ones_like(factors)
        s[owner] = factors[owner]
        seen = self.inputs({source: lambda y: positive(y) * s}, LOUD_ANSWERS)[target]
        base = self.base(source, LOUD_ANSWERS)[target]
        return bool((seen - base * s[owner]).abs().max() <= 1e-9 * base.abs().max())


def distinct_factors(count: int) -> Tensor:
    """Numbers between 0.5 and 1.5 that are all different."""
    generator = torch.Generator().manual_seed(1)
    return 0.5 + torch.linspace(0, 1, count, dtype=torch.float64)[torch.randperm(count, generator=generator)]


def _inputs(bench: Bench, x: Tensor, change: dict[str, Change]) -> dict[str, Tensor]:
    """What enters each matrix, of stacked ones the first that is met: (n, in) by name."""
    seen = list[Asked]()
    bench.run(x, change, silent=bench.matrices.keys(), seen=seen)  # biases go with what they are added to
    first = dict[str, Tensor]()
    for asked in seen:
        first.setdefault(asked.use.parameter, asked.x.flatten(0, -2))
    return first


def _masks(count: int) -> Iterator[Tensor]:
    """Which outputs are multiplied, one round after the other: all; halves, in the orders that layouts have; some."""
    index = torch.arange(count)
    yield torch.ones(count, dtype=torch.bool)
    yield index >= count // 2
    yield index < count // 2
    yield index % 2 == 1
    yield index % 2 == 0
    generator = torch.Generator().manual_seed(3)
    for _ in range(ROUNDS):
        yield torch.rand(count, generator=generator) < 0.5


def positive(y: Tensor) -> Tensor:
    """Values that are away from zero and positive."""
    return y.abs() + 0.1


def multiplied_by(base: Tensor, seen: Tensor, factors: Tensor) -> Tensor:
    """Find the one of `factors`, all different, that each column of base (n, in) is multiplied by in `seen`, in all
    rows; -1: none."""
    ratio = torch.where(base.abs() > 1e-30, seen / base, torch.nan)  # zeros tell nothing
    middle = ratio.nanmedian(0).values
    steady = (ratio - middle).abs().nan_to_num(0).amax(0) < 1e-9
    ordered, order = factors.sort()
    place = torch.searchsorted(ordered, middle.nan_to_num(-1.0)).clamp(max=len(factors) - 1)
    near = torch.stack([place, (place - 1).clamp(min=0)])
    best = near.gather(0, (ordered[near] - middle).abs().nan_to_num(9).argmin(0)[None])[0]
    close = steady & ((ordered[best] - middle).abs() < 1e-9) & (ordered[best] < 2)
    return torch.where(close, order[best], -1)


def _pair(bench: Bench, width: int, source: str, target: str, owner: Tensor) -> Pair | None:
    """The pair with its groups."""
    heads = _heads(bench, width, source, target, owner)
    if heads is not None:
        groups = dict[tuple[int, ...], list[tuple[int, ...]]]()
        for columns in heads:
            rows = owner[columns]
            order = rows.argsort()
            groups.setdefault(tuple(rows[order].tolist()), []).append(tuple(columns[order].tolist()))
        apart = all(len(set(rows)) == len(rows) for rows in groups)
        sizes = {len(rows) for rows in groups}, {len(copies) for copies in groups.values()}
        disjoint = len({r for rows in groups for r in rows}) == sum(map(len, groups))
        if apart and disjoint and max(map(len, sizes)) == 1 and min(sizes[0]) > 1:
            ordered = sorted(groups.items())
            return Pair(
                source, target, tuple(rows for rows, _ in ordered), tuple(tuple(sorted(c)) for _, c in ordered), True
            )
    rows, copies = owner.unique(return_counts=True)
    if len(copies.unique()) > 1:
        return None
    by_row = owner.argsort(stable=True).view(len(rows), -1)
    return Pair(
        source, target, (tuple(rows.tolist()),), (tuple(tuple(c.tolist()) for c in by_row.unbind(1)),), False
    )  # fmt: skip


def _heads(bench: Bench, width: int, source: str, target: str, owner: Tensor) -> list[Tensor] | None:
    """Sets of inputs of `target` that the same sums over tokens make of `source`; None where they are no sums."""
    x = normal("heads", (2, 10, width))
    plain, opposite = (
        _inputs(bench, x, {source: lambda y, sign=sign: _with(y, owner, sign * y)})[target]  # type: ignore[misc]
        for sign in (1, -1)
    )
    if (plain + opposite).abs().max() > 1e-9 * plain.abs().max():
        return None
    course = normal("course", (2, 10, 1))
    seen = _inputs(bench, x, {source: lambda y: _with(y, owner, _course_for(course, y))})[target]
    key = normal("key", (len(seen),)) @ seen
    ordered, order = key.sort()
    cuts = torch.where(ordered.diff() > 1e-9 * key.abs().max())[0] + 1
    return list(order.tensor_split(cuts.tolist()))


def _with(y: Tensor, owner: Tensor, other: Tensor) -> Tensor:
    """y (..., out) with other values where something reads them."""
    read = torch.zeros(y.shape[-1], dtype=torch.bool)
    read[owner] = True
    return torch.where(read, other, y)


def _course_for(course: Tensor, y: Tensor) -> Tensor:
    """One number for each token, whichever tokens y holds."""
    flat = course.flatten()
    count = y.shape[:-1].numel()
    return flat[torch.arange(count) % len(flat)].view(*y.shape[:-1], 1).expand_as(y)
