"""Where channels of queries and keys are made, and which of them the rotary embedding turns together.

At the first position nothing is turned: what multiplies an output, or a norm's gain, multiplies one channel. Later
ones show which other channel a channel reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calib.blockwise.attention_hooks import editing_attention
from calib.probe.bench import Bench, Change, normal
from calib.probe.pairs import LONE_TOKENS, distinct_factors, multiplied_by
from calib.probe.parts import AttentionShape, Planes

LATE = 7  # a position at which everything that is turned has been


def find_planes(
    bench: Bench, width: int, names: tuple[str, ...]
) -> tuple[tuple[AttentionShape, ...], tuple[Planes, ...]]:
    """Find attention layers and, where their queries and keys are plain, the planes of their channels.

    Args:
        bench: the block.
        width: of a token's hidden state.
        names: attention layers that are open to edits.
    """
    shapes, planes = list[AttentionShape](), list[Planes]()
    for name in names:
        layer = _Layer(bench, name, width)
        query, key = layer.seen({}, {})
        shapes.append(AttentionShape(name, query.shape[1], key.shape[1], key.shape[-1]))
        if query.shape[-1] == key.shape[-1] and query.shape[1] % key.shape[1] == 0:
            planes += filter(None, [layer.planes(query, key)])
    return tuple(shapes), tuple(planes)


@dataclass(frozen=True)
class _Owner:
    """What makes queries or keys, channel by channel: rows (heads, h) of a matrix, or entries of a gain that `offset`
    is added to."""

    name: str
    rows: Tensor
    offset: float | None

    @property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """The rows by head; once where all heads share them."""
        alike = len(self.rows) > 1 and all(torch.equal(row, self.rows[0]) for row in self.rows)
        return tuple(map(tuple, (self.rows[:1] if alike else self.rows).tolist()))


class _Layer:
    """What an attention layer sees."""

    def __init__(self, bench: Bench, name: str, width: int) -> None:
        self._bench, self._name, self._module = bench, name, bench.modules[name]
        self._alone, self._row = normal("alone", (LONE_TOKENS, 1, width)), normal("row", (1, LATE + 1, width))

    def seen(
        self, change: Mapping[str, Change], params: Mapping[str, Tensor], *, late: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, T, h) under other answers, or with other vectors."""
        met = list[tuple[Tensor, Tensor]]()

        def edit(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            met.append((query, key))
            return query, key, value

        with editing_attention(self._module, edit):
            self._bench.run(
                self._row if late else self._alone, change, params=params, silent=self._bench.matrices.keys()
            )
        return met[0]

    def planes(self, query: Tensor, key: Tensor) -> Planes | None:
        """The planes of the queries and keys seen, or None where these are no plain outputs or gains."""
        queries, keys = self._owner(0, query), self._owner(1, key)
        if queries is None or keys is None or queries.offset != keys.offset:
            return None
        partner = self._partners(keys)
        if partner is None:
            return None
        turned = [(channel, other) for channel, other in enumerate(partner) if channel < other]
        free = [channel for channel, other in enumerate(partner) if channel == other]
        half = len(free) // 2  # of those that nothing turns, any two may
        channels = (*turned, *zip(free[:half], free[half : 2 * half], strict=True))
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        return Planes(
            self._name, heads, group, key.shape[-1], channels, queries.table, keys.table, queries.name, keys.name,
            keys.offset, keys.offset is None,
        )  # fmt: skip

    def _owner(self, which: int, plain: Tensor) -> _Owner | None:
        """Find what makes queries (0) or keys (1), of which `plain` were seen."""
        base, shape = plain[:, :, 0].flatten(1), (plain.shape[1], plain.shape[-1])

        def multiplied(change: Mapping[str, Change], params: Mapping[str, Tensor], factors: Tensor) -> Tensor | None:
            hit = multiplied_by(base, self.seen(change, params)[which][:, :, 0].flatten(1), factors)
            return hit.view(shape) if (hit >= 0).all() else None

        for name, matrix in self._bench.matrices.items():
            factors = distinct_factors(matrix.out)
            rows = None if matrix.router else multiplied({name: partial(torch.mul, factors)}, {}, factors)
            if rows is not None:
                return _Owner(name, rows, None)
        for name, p in self._bench.params.items():
            if p.device.type == "meta" or not p.is_floating_point() or p.numel() not in (shape[1], base.shape[1]):
                continue
            factors = distinct_factors(p.numel())
            for offset in (0.0, 1.0):
                value = (p + offset) * factors.view(p.shape) - offset
                if (rows := multiplied({}, {name: value}, factors)) is not None:
                    return _Owner(name, rows, offset)
        return None

    def _partners(self, keys: _Owner) -> list[int] | None:
        """For each channel the one that position turns it with, itself where there is none; None where that is not
        mutual.  Its number is read bit by bit: where only channels with a bit are made, one without it is reached if
        its partner has it."""
        width = keys.rows.shape[1]
        channel, partner = torch.arange(width), torch.zeros(width, dtype=torch.int64)
        for bit in range(max(1, (width - 1).bit_length())):
            has = (channel >> bit & 1).bool()
            by_those, by_others = self._reached(keys, keys.rows[:, has]), self._reached(keys, keys.rows[:, ~has])
            partner += torch.where(has, ~by_others, by_those).long() << bit
        return partner.tolist() if torch.equal(partner[partner.clamp(max=width - 1)], channel) else None

    def _reached(self, keys: _Owner, entries: Tensor) -> Tensor:
        """Channels that are not zero at a late position where keys are made of `entries` alone."""
        gain = keys.offset is not None
        count = self._bench.params[keys.name].numel() if gain else self._bench.matrices[keys.name].out
        kept = torch.zeros(count, dtype=torch.float64)
        kept[entries.flatten()] = 1
        if keys.offset is None:
            key = self.seen({keys.name: partial(torch.mul, kept)}, {}, late=True)[1]
        else:
            p = self._bench.params[keys.name]
            key = self.seen({}, {keys.name: (p + keys.offset) * kept.view(p.shape) - keys.offset}, late=True)[1]
        return key[0, :, LATE].abs().amax(0) > 0
