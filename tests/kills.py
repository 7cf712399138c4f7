"""What killing a job must not change."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def kill_and_resume(job: Callable[..., Any], folder: Path, pages: Sequence[str]) -> None:
    """SIGKILL to job(out, resume=True) as soon as each page appears; then the bytes of an undisturbed run."""
    out, whole = folder / "out", folder / "whole"
    for page in pages:
        if (process := os.fork()) == 0:
            job(out, resume=True)
            os._exit(0)
        while not (folder / f".out.journal/{page}.page").exists():
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL and not out.exists(), page
    job(out, resume=True)
    job(whole, resume=None)
    assert digest(out) == digest(whole)
    assert {p.name for p in folder.iterdir()} == {"out", "whole"}
