"""Hidden states at rest: on an accelerator that has room, else in RAM up to a budget, beyond it in a nameless file.

The file is written and read, not mapped: pages of a mapped file count as this process's memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from calib.model.weights import tensor_bytes
from calib.runtime.device import DeviceMemory, is_accelerator
from calib.runtime.disk import disk_full

NO_ROOM = DeviceMemory(torch.device("cpu"))


class ActivationStore:
    """A tensor (N, ...), read and written by slices of its first dimension."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, budget: int, folder: Path, room: DeviceMemory = NO_ROOM
    ) -> None:
        """Lies on the accelerator where `room` has as much, and else takes at most `budget` bytes of RAM, pinned for an
        accelerator; the file, if one is needed, lies in `folder` and has no name."""
        self.shape, self.dtype = shape, dtype
        self._row = torch.Size(shape[1:]).numel() * dtype.itemsize
        size = self._row * shape[0]
        self._held: Tensor | None = None
        if room.fits(size):
            self._held = torch.empty(shape, dtype=dtype, device=room.device)
        elif size <= budget:
            self._held = torch.empty(shape, dtype=dtype, pin_memory=is_accelerator(room.device))
        else:
            self._file, name = tempfile.mkstemp(dir=folder, prefix=".states-")
            Path(name).unlink()
            weakref.finalize(self, os.close, self._file)
            with disk_full(folder, size):
                os.posix_fallocate(self._file, 0, size)  # all of it now, so that no later write can fail

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of the states that are in memory, not in a file."""
        return 0 if self._held is None or is_accelerator(self._held.device) else self._held.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """What the caller may change without changing the store."""
        if self._held is not None:
            return self._held[rows].clone()
        start, stop, _ = rows.indices(len(self))
        result = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        left, position = tensor_bytes(result), start * self._row
        while left:
            count = os.preadv(self._file, [left], position)
            left, position = left[count:], position + count
        return result

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        if self._held is not None:
            self._held[rows] = value.detach().to(self.dtype)
            return
        value = value.detach().to("cpu", self.dtype)
        left, position = tensor_bytes(value.contiguous()), rows.indices(len(self))[0] * self._row
        while left:
            count = os.pwrite(self._file, left, position)
            left, position = left[count:], position + count
