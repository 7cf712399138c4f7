"""Files that reach the disk, and a full disk said as such."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from calib import NoSpace


@contextmanager
def disk_full(path: Path, bytes_needed: int) -> Iterator[None]:
    """Inside the `with`, running out of space is NoSpace, which names `path` and how much it needs."""
    try:
        yield
    except NoSpace:
        raise
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
            needed = f"{bytes_needed / 1e6:,.1f} MB" if bytes_needed >= 1e5 else f"{bytes_needed:,} bytes"
            raise NoSpace(f"{path}: no space left, {needed} needed; make room") from error
        raise


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
