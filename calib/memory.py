"""Giving memory back to the operating system.

glibc's malloc keeps what is freed for later use, and learns from large blocks that it should keep even those, so that
a walk over many blocks seems to grow. Two calls mend that; other C libraries have neither, and need neither.
"""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _LARGE = -3, 2 * 2**20


def lean() -> None:
    """For the rest of the process, blocks of 2 MiB and more come straight from the system and go straight back."""
    if (mallopt := _libc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)


def release() -> None:
    """Hand back what is free now."""
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _libc(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
