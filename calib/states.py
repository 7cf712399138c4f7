"""Hidden states at rest: in RAM up to a budget, beyond it in a nameless file on disk.

The file is written and read, not mapped: pages of a mapped file count as this process's memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from calib.weights import bytes_of
from calib.writing import disk_full


class States:
    """A tensor (N, ...) on the CPU, read and written by slices of its first dimension."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, budget: int, folder: Path) -> None:
        """Takes at most `budget` bytes of RAM; the file, if one is needed, lies in `folder` and has no name."""
        self.shape, self.dtype = shape, dtype
        self._row = torch.Size(shape[1:]).numel() * dtype.itemsize
        size = self._row * shape[0]
        self._ram = torch.empty(shape, dtype=dtype) if size <= budget else None
        if self._ram is None:
            self._file, name = tempfile.mkstemp(dir=folder, prefix=".states-")
            Path(name).unlink()
            weakref.finalize(self, os.close, self._file)
            with disk_full(folder, size):
                os.posix_fallocate(self._file, 0, size)  # all of it now, so that no later write can fail

    @property
    def bytes_in_ram(self) -> int:
        return 0 if self._ram is None else self._ram.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """What the caller may change without changing the store."""
        if self._ram is not None:
            return self._ram[rows].clone()
        start, stop, _ = rows.indices(len(self))
        result = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        left, position = bytes_of(result), start * self._row
        while left:
            count = os.preadv(self._file, [left], position)
            left, position = left[count:], position + count
        return result

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        value = value.detach().to("cpu", self.dtype)
        if self._ram is not None:
            self._ram[rows] = value
            return
        left, position = bytes_of(value.contiguous()), rows.indices(len(self))[0] * self._row
        while left:
            count = os.pwrite(self._file, left, position)
            left, position = left[count:], position + count
