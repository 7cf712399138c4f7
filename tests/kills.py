"""What killing a job must not change."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def kill_and_resume(job: Callable[..., Any], folder: Path, pages: Sequence[str]) -> None:
    """SIGKILL to job(out, resume=True) as soon as each page appears; then the bytes of an undisturbed run."""
    out, whole = folder / "out", folder / "whole"
    for page in pages:
        if (process := os.fork()) == 0:
            alone(lambda: job(out, resume=True))
        while not (folder / f".out.journal/{page}.page").exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0), f"over before there was a page '{page}'"
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL and not out.exists(), page
    job(out, resume=True)
    job(whole, resume=None)
    assert digest(out) == digest(whole)
    assert {p.name for p in folder.iterdir()} == {"out", "whole"}


def alone(job: Callable[[], Any]) -> NoReturn:
    """In a process that was forked, and must never come back to the tests."""
    # Threads of the library's that load weights race for torch's own, which did not survive the fork.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
