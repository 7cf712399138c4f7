"""Progress of long stages on stderr: a bar on a terminal; elsewhere, for logs, a line every EVERY seconds.

A line comes by the clock, also while nothing finishes, and only where the last one is that long ago: a job of many
short stages says where it is, and a short job says nothing. Stages inside others share their bars and lines. Of several
processes only the first speaks, and none where the environment has PAREWELL_QUIET=1.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Event, RLock, Thread
from typing import Protocol, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from calib.runtime.distributed import is_main_process

EVERY = 30.0  # seconds between two lines
QUIET = "PAREWELL_QUIET"
Log = dict[str, list[float]]  # stage -> seconds of each call that said that units were done

T = TypeVar("T")

now = time.monotonic


class Done(Protocol):
    """The callback of a stage: call it after every unit, or after `units` of them together, with a word on how it went;
    `again` where an earlier run had computed them, so that they tell nothing about the time of those to come."""

    def __call__(self, note: str = "", units: int = 1, *, again: bool = False) -> None: ...


@dataclass(eq=False)
class ProgressStage:
    """A stage under way: of `total` units `done` are done, those of earlier runs included.  Times are readings of
    `now`; `first` and `last` are of the first and last call of this run, `at_first` and `counted` the units done
    then."""

    label: str
    total: int
    unit: str
    done: int
    began: float
    start: float
    first: float = 0.0
    last: float = 0.0
    at_first: int = 0
    counted: int = 0
    note: str = ""

    def passed(self, at: float, note: str, units: int, again: bool) -> None:
        """Count `units` that were finished at time `at`, with a note."""
        self.done, self.note = self.done + units, note
        if again:
            self.start = self.start if self.counted else at
            return
        self.counted, self.last = self.counted + units, at
        if self.counted == units:
            self.first, self.at_first = at, units

    @property
    def seconds_each(self) -> float | None:
        """Seconds per unit of this run; the first call's, which also set up what all need, count only while there are
        no others.  None before any."""
        if self.counted > self.at_first:
            return (self.last - self.first) / (self.counted - self.at_first)
        return (self.first - self.start) / self.counted if self.counted else None

    def seconds_left(self, at: float) -> float | None:
        """Seconds until the stage is done, as of time `at`; None where its speed is not known."""
        each = self.seconds_each
        return None if each is None else each * (self.total - self.done) - min(at - self.last, each)


_log: Log | None = None
_open = list[ProgressStage]()  # from the outermost to the innermost
_live = False  # whether these are shown as bars
_said, _ended = 0.0, -math.inf  # when the last line was printed, and when the last outermost stage ended
_speaking = RLock()


@contextmanager
def recording() -> Iterator[Log]:
    """Inside the `with`, what each unit of each stage took is also written down."""
    global _log
    before, _log = _log, {}
    try:
        yield _log
    finally:
        _log = before


@contextmanager
def stage(label: str, total: int, unit: str, begun: int = 0) -> Iterator[Done]:
    """Yields what is to be called after each of `total` units, of which `begun` were done by an earlier run."""
    here = ProgressStage(label, total, unit, begun, now(), now())
    noted = None if _log is None else _log.setdefault(label, [])
    since = here.began

    def done(note: str = "", units: int = 1, *, again: bool = False) -> None:
        nonlocal since
        at = now()
        here.passed(at, note, units, again)
        if noted is not None:
            noted.append(at - since)
        since = at
        if here in _open and not _live:
            _say_if_due()

    with _shown(here) if begun < total and _speaks() else nullcontext():
        yield done


def unwatched(note: str = "", units: int = 1, *, again: bool = False) -> None:
    """Ignore the progress of a stage that nobody watches."""


def watched(label: str, parts: Iterable[tuple[slice, T]], total: int, unit: str) -> Iterator[tuple[slice, T]]:
    """Pass on the parts of a whole of `total` units, each with the slice that it takes, and show them as a stage."""
    with stage(label, total, unit) as done:
        for at, part in parts:
            yield at, part
            done(units=at.stop - at.start)


def _speaks() -> bool:
    return sys.stderr is not None and is_main_process() and os.environ.get(QUIET, "0") in ("", "0")


@contextmanager
def _shown(here: ProgressStage) -> Iterator[None]:
    global _live, _ended
    if not _open:
        _live = sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal
    around = nullcontext() if _open else _bars() if _live else _lines()
    _open.append(here)
    try:
        with around:
            yield
        if not _live and now() - here.began >= EVERY:
            _say(f"{here.label}: {here.done:,} {here.unit} in {clock(now() - here.began)}")
    finally:
        _open.remove(here)
        if not _open:
            _ended = now()


def _bars() -> AbstractContextManager[Live]:
    return Live(console=Console(stderr=True), get_renderable=lambda: bars(list(_open), now()), refresh_per_second=4)


def bars(stages: list[ProgressStage], at: float) -> Table:
    """Draw a bar for each stage: what, how far, time gone and left, speed, the last note."""
    table = Table.grid(padding=(0, 1))
    for _ in range(5):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for each in stages:
        left, speed = each.seconds_left(at), speed_of(each)
        times = f"[{clock(at - each.began)}<{'?' if left is None else clock(left)}{f', {speed}' if speed else ''}]"
        row = (each.label, f"{each.done:,}/{each.total:,} {each.unit}", times, each.note)
        name, *rest = (Text(part) for part in row)
        table.add_row(name, ProgressBar(each.total, each.done, width=30), *rest)
    return table


def line(stages: list[ProgressStage], at: float) -> str:
    """Describe all stages in a line, with the time left of the outermost that knows it."""
    known = next((each for each in stages if each.seconds_each is not None), None)
    parts = list[str]()
    for each in stages:
        words = [f"{each.label}: {each.done:,}/{each.total:,} {each.unit}"]
        left = each.seconds_left(at)
        if each is known and left is not None:
            words += [speed_of(each), f"{clock(left)} left"]
        parts.append(", ".join([*words, *([each.note] if each.note else [])]))
    return "; ".join(parts)


def speed_of(stage: ProgressStage) -> str:
    """Format a stage's speed as tqdm does: s/it of slow units, it/s of fast ones; "" where it is not known."""
    each = stage.seconds_each
    if not each:
        return ""
    return f"{each:.2f}s/it" if each > 1 else f"{1 / each:.2f}it/s"


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _lines() -> Iterator[None]:
    """Inside the `with`, lines also come while no unit is done."""
    global _said
    if now() - _ended >= EVERY:  # what went before is another job
        _said = now()
    stopped = Event()

    def watch() -> None:
        while not stopped.wait(max(0.0, _said + EVERY - now())):
            _say_if_due()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()


def _say_if_due() -> None:
    with _speaking:
        if _open and now() - _said >= EVERY:
            _say(line(list(_open), now()))


def _say(text: str) -> None:
    global _said
    with _speaking, suppress(OSError, ValueError):  # a log that is full or closed is no reason to stop
        _said = now()
        print(f"parewell: {text}", file=sys.stderr, flush=True)
