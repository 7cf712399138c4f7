"""What makes a long job shorter, of jobs whose cost is a sum that anyone can do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from calib import BadInput
from calib.jobs.cost import HOUR, Saving, costliest, fewer, savings


@dataclass(frozen=True)
class Job:
    steps: int = 100
    rows: int = 64
    halves: bool = False
    target: float | None = None

    def __post_init__(self) -> None:
        if self.halves and self.rows < 2:
            raise BadInput("rows: has no halves")


def seconds(job: Job, step: float = 30, row: float = 10) -> float:
    return (step * job.steps + row * job.rows) * (2 if job.halves else 1) + (0 if job.target is None else 1000)


def alternatives(job: Job) -> list[dict[str, object]]:
    return [
        {"halves": False},
        dict(fewer(job, "steps", job.steps, 10, seconds)),
        dict(fewer(job, "rows", job.rows, 16, seconds)),
        {"target": None},
    ]


def test_a_short_job_needs_nothing() -> None:
    job = Job(steps=98)  # 2940 + 640
    assert seconds(job) < HOUR and savings(job, alternatives(job), seconds) == []


def test_each_alone_where_one_of_them_is_enough() -> None:
    job = Job(halves=True)  # 2 x 3640
    assert savings(job, alternatives(job), seconds) == [
        Saving("--no-halves", 3640),
        Saving("--steps 25", 2 * (750 + 640)),  # 50 would take 2 x 2140
        Saving("--rows 16", 2 * (3000 + 160)),
    ]


def test_together_where_none_is_enough() -> None:
    job = Job(steps=130, rows=300, halves=True)  # 2 x 6900
    found = savings(job, alternatives(job), seconds)
    assert found == [
        Saving("--no-halves", 6900),
        Saving("--steps 16", 2 * (480 + 3000)),
        Saving("--rows 37", 2 * (3900 + 370)),
        Saving("--no-halves --steps 16", 3480),
    ]
    hopeless = Job(steps=10, rows=5000)
    assert savings(hopeless, alternatives(hopeless), seconds) == [Saving("--rows 625", 300 + 6250)]


def test_what_is_not_given_is_left_out() -> None:
    job = Job(steps=110, target=3.5)  # 3300 + 640 + 1000
    assert Saving("without --target", 3940) in savings(job, alternatives(job), seconds)


def test_what_hardly_helps_or_is_refused_is_not_named() -> None:
    job = Job(steps=200, rows=64, halves=True)
    named = [saving.options for saving in savings(job, [{"rows": 63}, {"rows": 1}, {"steps": 200}], seconds)]
    assert named == []


@pytest.mark.parametrize(("value", "least", "expected"), [(100, 10, {"steps": 50}), (19, 10, {}), (8, 1, {"steps": 4})])
def test_fewer_is_a_half_where_that_is_enough(value: int, least: int, expected: dict[str, int]) -> None:
    assert fewer(Job(steps=value), "steps", value, least, seconds) == expected


def test_costliest() -> None:
    assert costliest({"a": 3, "b": 5, "c": 0, "d": 4}) == ["b", "d"]
    assert costliest({"a": 3, "c": 0}) == ["a"]
