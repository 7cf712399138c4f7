"""Progress of long stages: what, how far, how fast, how long still; on stderr, silent where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def stage(label: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Yields a function to be called after each of `total` units, with a word on how it went (or "")."""
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
