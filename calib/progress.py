"""Progress of long stages: what, how far, how fast, how long still; on stderr, silent where that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Log = dict[str, list[float]]  # stage -> seconds of each of its units

_log: Log | None = None


@contextmanager
def recording() -> Iterator[Log]:
    """Inside the `with`, stages say nothing, and what each of their units took is written down."""
    global _log
    _log = {}
    try:
        yield _log
    finally:
        _log = None


@contextmanager
def stage(label: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Yields a function to be called after each of `total` units, with a word on how it went (or "")."""
    if _log is not None:
        yield _noting(_log.setdefault(label, []))
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, note="", speed="")

        def done(note: str = "") -> None:
            speed = progress.tasks[task].speed
            progress.update(task, advance=1, note=note, speed=f"{speed:.3g}/s" if speed else "")

        yield done


def _noting(seconds: list[float]) -> Callable[[str], None]:
    began = time.perf_counter()

    def done(note: str = "") -> None:
        nonlocal began
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()

    return done
