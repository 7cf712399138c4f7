"""What stages say of themselves, by a clock that the tests move."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from select import select
from threading import Event

import pytest
import torch
from rich.console import Console
from tqdm import tqdm

from calib.jobs.journal import CheckpointSlot, Journal
from calib.jobs.training_loop import Group, OptimizerConfig, optimize, steps_done
from calib.runtime import progress
from calib.runtime.progress import bars, clock, line, recording, speed_of, stage

Log = Callable[[], list[str]]


class Clock:
    """Readings that only `tick` changes."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at

    def tick(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(progress, "now", made)
    monkeypatch.setattr(progress, "EVERY", 30.0)
    monkeypatch.setattr(progress, "_ended", float("-inf"))
    yield made


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    """What stands on a stderr that is no terminal, so far."""
    read = list[str]()

    def so_far() -> list[str]:
        read.extend(capsys.readouterr().err.splitlines())
        return read

    return so_far


def test_a_line_every_half_minute_and_one_when_a_long_stage_ends(time: Clock, log: Log) -> None:
    with stage("learn", 10, "steps") as done:
        for step in range(10):
            time.tick(12)
            done(f"loss {step}")
    assert log() == [
        "parewell: learn: 3/10 steps, 12.00s/it, 1:24 left, loss 2",
        "parewell: learn: 6/10 steps, 12.00s/it, 0:48 left, loss 5",
        "parewell: learn: 9/10 steps, 12.00s/it, 0:12 left, loss 8",
        "parewell: learn: 10 steps in 2:00",
    ]


def test_short_stages_stay_silent_but_a_job_of_many_says_where_it_is(time: Clock, log: Log) -> None:
    for number in range(5):
        with stage(f"audit {number}", 2, "rows") as done:
            for _ in range(2):
                time.tick(4)
                done()
        assert len(log()) == (number > 2)
    assert log() == ["parewell: audit 3: 2/2 rows, 4.00s/it, 0:00 left"]
    time.tick(1000)  # another job in the same process
    with stage("evaluate", 1, "rows") as done:
        time.tick(29)
        done()
    assert len(log()) == 1


def test_lines_come_while_nothing_finishes(time: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    waited, over = list[float](), Event()

    class Waiting:
        """Time passes as the watching thread waits, three times."""

        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            if len(waited) > 3:
                over.set()
                return True
            time.tick(seconds)
            return False

        def set(self) -> None:
            pass

    monkeypatch.setattr(progress, "Event", Waiting)
    with stage("round (gptq)", 22, "blocks") as done:
        assert over.wait(60)
        done()
    assert waited == [30] * 4
    assert log() == ["parewell: round (gptq): 0/22 blocks"] * 3 + ["parewell: round (gptq): 1 blocks in 1:30"]


def test_a_resumed_stage_goes_by_its_own_speed(time: Clock, log: Log) -> None:
    with stage("tune", 100, "steps", begun=60) as done:
        for _ in range(5):
            time.tick(10)
            done()
    assert log()[0] == "parewell: tune: 63/100 steps, 10.00s/it, 6:10 left"
    assert log()[-1] == "parewell: tune: 65 steps in 0:50"


def test_units_that_are_passed_over_say_nothing_of_the_speed(time: Clock, log: Log) -> None:
    with stage("float model", 22, "blocks") as done:
        for _ in range(10):
            time.tick(0.1)
            done(again=True)
        time.tick(60)
        done()
        time.tick(60)
        done()
    assert log()[:2] == [
        "parewell: float model: 11/22 blocks, 60.00s/it, 11:00 left",
        "parewell: float model: 12/22 blocks, 60.00s/it, 10:00 left",
    ]


def test_the_first_unit_counts_only_while_there_is_no_other(time: Clock, log: Log) -> None:
    """It also makes what all need."""
    with stage("distil", 11, "steps") as done:
        time.tick(100)
        done()
        for _ in range(9):
            time.tick(4)
            done()
    assert log()[0].endswith("1/11 steps, 100.00s/it, 16:40 left")
    assert log()[1].endswith("9/11 steps, 4.00s/it, 0:08 left")


def test_units_that_come_together(time: Clock, log: Log) -> None:
    with stage("write", 96, "rows") as done:
        for _ in range(2):
            time.tick(64)
            done(units=32)
    assert log()[1] == "parewell: write: 64/96 rows, 2.00s/it, 1:04 left"


def test_stages_inside_others_share_a_line_with_one_time_left(time: Clock, log: Log) -> None:
    with stage("search a rate", 5, "rates") as outer:
        for rate in range(2):
            with stage("unlearn", 20, "steps") as inner:
                for _ in range(20):
                    time.tick(1)
                    inner("loss 2")
            outer(f"1e-{rate}")
    assert log() == [
        "parewell: search a rate: 1/5 rates, 20.00s/it, 1:10 left, 1e-0; unlearn: 10/20 steps, loss 2",
        "parewell: search a rate: 2 rates in 0:40",
    ]


def test_nothing_to_do_says_nothing(time: Clock, log: Log) -> None:
    for total, begun in ((0, 0), (7, 7)):
        with recording() as seen, stage("teacher", total, "rows", begun) as _:
            time.tick(100)
        assert seen == {"teacher": []}
    assert not log()


def test_one_process_speaks_and_none_where_it_is_quiet(time: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        with stage("learn", 2, "steps") as done:
            time.tick(100)
            done()
        return len(log())

    with monkeypatch.context() as patch:
        patch.setattr(progress, "is_main_process", lambda: False)
        assert run() == 0
    monkeypatch.setenv(progress.QUIET, "1")
    assert run() == 0
    monkeypatch.setenv(progress.QUIET, "0")
    assert run() == 2


def test_a_log_that_is_full_stops_nothing(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with stage("learn", 2, "steps") as done:
        time.tick(100)
        done()


def test_what_is_recorded_is_shown_as_well(time: Clock, log: Log) -> None:
    with recording() as seen, stage("tune", 2, "steps") as done:
        for seconds in (5, 40):
            time.tick(seconds)
            done()
    assert seen == {"tune": [5, 40]} and log()[0] == "parewell: tune: 2/2 steps, 40.00s/it, 0:00 left"


@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 754, 3599, 3600, 90061])
def test_times_are_tqdms(seconds: int) -> None:
    assert clock(seconds) == tqdm.format_interval(seconds).removeprefix("0")


@pytest.mark.parametrize("each", [0.001, 0.4, 2.5, 90])
def test_speeds_are_tqdms(time: Clock, each: float) -> None:
    one = progress.ProgressStage("learn", 100, "steps", 0, time(), time())
    for _ in range(40):
        time.tick(each)
        one.passed(time(), "", 1, False)
    meter = tqdm.format_meter(40, 100, 40 * each, bar_format="{rate_fmt}|{remaining}")
    assert f"{speed_of(one)}|{clock(one.seconds_left(time()) or 0)}" == meter.replace(" ", "").replace("|0", "|")


def test_a_bar_has_one_time_left_that_counts_down(time: Clock) -> None:
    one = progress.ProgressStage("learn", 10, "steps", 0, time(), time())

    def shown() -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(bars([one], time()))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    time.tick(5)
    assert "0/10 steps [0:05<?]" in shown()
    time.tick(15)
    one.passed(time(), "loss 2.5", 1, False)
    assert "1/10 steps [0:20<3:00, 20.00s/it] loss 2.5" in shown()
    time.tick(8)
    assert "[0:28<2:52, 20.00s/it]" in shown()
    time.tick(60)  # the unit takes longer than it should: what is left waits for it
    assert "[1:28<2:40, 20.00s/it]" in shown()
    assert line([one], time()) == "learn: 1/10 steps, 20.00s/it, 2:40 left, loss 2.5"


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with stage("measure", 2, "runs") as outer:
            for _ in range(2):
                with stage("learn", 3, "steps") as inner:
                    for _ in range(3):
                        inner("loss 1")
                outer()
        terminal.flush()
        shown = ""
        while select([ours], [], [], 1.0)[0]:  # what was written comes in pieces
            shown += os.read(ours, 2**16).decode(errors="replace")
    os.close(ours)
    assert "measure" in shown and "2/2 runs [0:00<0:00" in shown and "parewell:" not in shown
    assert not progress._open


def test_what_a_page_has_of_a_descent(tmp_path: Path) -> None:
    page = CheckpointSlot(Journal(tmp_path), "learn")
    assert steps_done(None) == steps_done(page) == 0
    p = torch.ones(2, requires_grad=True)

    def gradients(step: int) -> dict[str, float]:
        p.grad = torch.ones(2)
        return {"loss": 1.0}

    optimize([Group([p], 0.1)], gradients, OptimizerConfig(steps=3), page=page)
    assert steps_done(page) == 3
