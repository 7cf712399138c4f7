"""Giving memory back to the operating system.

glibc's malloc keeps what is freed for later use, and learns from large blocks that it should keep even those, so that
a walk over many blocks seems to grow. Two calls mend that; other C libraries have neither, and need neither.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which may be what there was no memory for
    pass

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_KEPT = 2**27
_PAUSE = 0.2  # seconds

_released = 0.0


def limit_malloc_cache(budget: int) -> None:
    """Keep little of what is freed for the rest of the process: 128 MiB, or next to nothing where `budget` is less.

    Memory that comes fresh from the system is cleared page by page, which costs a walk up to a third of its time.
    """
    roomy = budget >= _KEPT
    if (mallopt := _libc("mallopt")) is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT if roomy else 2**17)
        mallopt(_MMAP_THRESHOLD, 2**25 if roomy else 2**21)  # larger blocks go straight back


def trim_heap() -> None:
    """Hand back what is free now; but a few times a second at most, for what is handed back must be fetched again."""
    global _released
    if time.monotonic() - _released < _PAUSE:
        return
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)
    _released = time.monotonic()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, which torch and the system say in their own ways."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in message for words in ("t allocate memory", "cannot allocate", "bad_alloc", "can't start new thread")
    )


def peak_rss() -> int:
    """Bytes of RAM: the most that this process has held so far."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def available_memory() -> int:
    """Bytes of memory that this process may still take: what is free or can be freed, and what its control group, such
    as a container's, has left; where neither is told, what the machine has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (info := Path("/proc/meminfo")).exists():
        found += [int(kilobytes) * 1024 for kilobytes in re.findall(r"MemAvailable:\s+(\d+)", info.read_text())]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()).isdecimal():
        found.append(int(most) - int(used.read_text()))
    return max(0, min(found))


def _libc(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
