"""Giving memory back to the operating system."""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Hand freed memory back: glibc's malloc keeps it otherwise, so that a walk would seem to grow block by block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and need none
        if trim is not None:
            trim(0)
