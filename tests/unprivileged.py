"""Root without its right to read and write everything, so that read-only folders are read-only in a test."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522  # of the structures that capget and capset take
_OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def unprivileged() -> Iterator[None]:
    """Inside the `with`, permissions bind this thread and those that it starts.  Skips where that cannot be had."""
    if not sys.platform.startswith("linux"):
        pytest.skip("capabilities are Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    header, now = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, now):
        pytest.skip("the system does not tell what this process may do")
    less = (ctypes.c_uint32 * 6)(*now)
    less[0] &= ~_OVERRIDE  # effective; what is permitted stays, to be taken up again
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, now) == 0
