"""Hidden states of rows on their way through a model's blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.walk import RowBatch


@dataclass(frozen=True)
class RowStates:
    """Hidden states (N, T, d) of rows, read and written by slices of rows, and the batches in which they pass through
    a block; of an encoder's tokens also which are real."""

    store: ActivationStore
    batches: list[tuple[slice, RowBatch]]
    source_mask: Tensor | None = None

    def real(self, mask: Tensor, *, sources: bool) -> Tensor:
        """Tell which tokens (N, T) are real: of those that an encoder read, for `sources`, else as `mask` says."""
        return self.source_mask if sources and self.source_mask is not None else mask

    def parted(self, rows: int) -> tuple[RowStates, RowStates]:
        """The batches that hold the first so many rows, and those after them, of the same states."""
        parts = list[tuple[slice, RowBatch]](), list[tuple[slice, RowBatch]]()
        for some, batch in self.batches:
            parts[some.start >= rows].append((some, batch))
        first, rest = (RowStates(self.store, part, self.source_mask) for part in parts)
        return first, rest

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, d)."""
        return self.store.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return self.store.dtype

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of the states that are in memory, not in a file."""
        return self.store.bytes_in_ram

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: slice) -> Tensor:
        """What the caller may change without changing the states."""
        return self.store[rows]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self.store[rows] = value
