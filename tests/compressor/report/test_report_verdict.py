"""Verdicts of compressions: where the thresholds lie, that more damage is never a better grade, and no nonsense."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report.quantization import qsur_phrase
from compressor.report.verdict import (
    classified_verdict,
    distilled_verdict,
    exported_verdict,
    level_of,
    quantized_verdict,
)

LEVELS = ("good", "doubtful", "bad")
SHARES = st.floats(0, 1)
KLS = st.floats(0, 20)


def quality(changed: float, kl: float, perplexity: float = 8.0) -> dict[str, Any]:
    return {
        "tokens": 2032,
        "perplexity": perplexity,
        "reference_perplexity": 8.0,
        "kl": kl,
        "top1_agreement": 1 - changed,
    }


def quantized(changed: float, kl: float, *, rows: int = 128, learned: bool = True, **more: Any) -> dict[str, Any]:
    found = quality(changed, kl)
    return {
        "quality": found, "quality_by_stage": {"rounded": found}, "bytes": {"before": 4e6, "after": 1e6},
        "data": {"calibration": {"rows": rows}}, "curves": {"learn": [0.1]} if learned else {}, **more,
    }  # fmt: skip


def exported(changed: float, kl: float) -> dict[str, Any]:
    return {
        "quality": quality(changed, kl), "bytes": {"before": 4e6, "after": 1e6}, "bits_per_weight": 4.5, "runtime": "x"
    }  # fmt: skip


def distilled(before: float, after: float, perplexity: float, changed: float = 0.3) -> dict[str, Any]:
    stages = {"before": quality(0.9, before, 100.0), "after": quality(changed, after, perplexity)}
    return {
        "quality_by_stage": stages, "parameters": {"teacher": 2_000, "student": 1_000},
        "curves": {"forward-kl": [1.0] * 20}, "data": {"training": {"rows": 32}},
    }  # fmt: skip


def classified(teacher: float, after: float) -> dict[str, Any]:
    stages = {name: {"accuracy": value, "ece": 0.1, "rows": 40} for name, value in
              (("teacher", teacher), ("before", 0.5), ("after", after))}  # fmt: skip
    return {"quality_by_stage": stages, "parameters": {"teacher": 2_000, "student": 1_000}}


@pytest.mark.parametrize("verdict", [quantized_verdict, exported_verdict])
def test_where_a_model_stops_being_good(verdict: Any) -> None:
    """One in twenty tokens, 0.05 nats; one in four, 0.3 nats: whichever is worse."""
    report = quantized if verdict is quantized_verdict else exported
    for level, pairs in {
        "good": [(0, 0), (0.0499, 0.0499)], "doubtful": [(0.0501, 0.0), (0.0, 0.0501), (0.2499, 0.2999)],
        "bad": [(0.2501, 0.0), (0.0, 0.3001), (1.0, 9.0), (0.0, math.nan)],
    }.items():  # fmt: skip
        for pair in pairs:
            assert verdict(report(*pair)).level == level, pair


@given(SHARES, KLS, SHARES, KLS)
def test_more_damage_is_never_a_better_grade(changed: float, kl: float, more: float, further: float) -> None:
    better, worse = quantized(changed, kl), quantized(min(1, changed + more), kl + further)
    assert LEVELS.index(quantized_verdict(better).level) <= LEVELS.index(quantized_verdict(worse).level)
    grades = {"good": "Good: ", "doubtful": "Noticeable loss: ", "bad": "Large loss: "}
    for report in (better, worse):
        found = quantized_verdict(report)
        assert found.judgment.startswith(grades[found.level]) and str(found) == f"{found.judgment} {found.figures}"


def test_the_sentence() -> None:
    assert quantized_verdict(quantized(0.012, 0.011)).judgment == "Good: 1.2% of top tokens changed, KL 0.011 nats."
    found = quantized_verdict(quantized(0.22, 0.2, rows=16, learned=False)).judgment
    start = "Noticeable loss: 22.0% of top tokens changed, KL 0.2 nats; 16 calibration rows were used, "
    assert found == f"{start}more rows or tuning usually help."
    assert quantized_verdict(quantized(0.22, 0.2, rows=16)).judgment == f"{start}more rows usually help."
    assert quantized_verdict(quantized(0.22, 0.2, learned=False)).judgment.endswith("tuning usually helps.")
    assert quantized_verdict(quantized(0.22, 0.2)).judgment.endswith("; more bits, or smaller groups, usually help.")


@given(st.floats(-1e-3, 1e-3), st.floats(-1e-9, 1e-9))
def test_no_change_has_no_sign(change: float, kl: float) -> None:
    report = quantized(0.0, kl)
    report["quality"]["perplexity"] = 8.0 * (1 + change)
    report["recovery"] = {"worst": -abs(change)}
    for found in (quantized_verdict(report), exported_verdict(exported(change, kl))):
        assert not re.search(r"-0(\.0+)?(%|\s)|nats-|KL -", str(found)), found
    assert "; 0% of the forgotten knowledge is recovered" in str(quantized_verdict(report))


def test_a_damaged_output_is_bad_whatever_its_figures() -> None:
    report = quantized(0.0, 0.0, damage={"found": "worse than rounding", "allowed": True})
    found = quantized_verdict(report)
    assert found.level == "bad" and found.judgment.startswith("Bad: worse than rounding")
    assert quantized_verdict(quantized(0.0, 0.0, damage={"found": None, "allowed": True})).level == "good"


def test_an_export_that_was_not_run_is_not_judged() -> None:
    report = exported(0, 0)
    del report["quality"]
    found = exported_verdict(report | {"not_run": "there is no text"})
    assert found.level == "doubtful" and found.judgment == "Not judged: not run, as there is no text."


def test_a_student_is_judged_by_its_teachers_perplexity() -> None:
    for perplexity, level in ((7.0, "good"), (8.79, "good"), (8.81, "doubtful"), (11.9, "doubtful"), (12.1, "bad")):
        assert distilled_verdict(distilled(2.0, 1.0, perplexity)).level == level
    assert "perplexity is 12.5% below the teacher's" in str(distilled_verdict(distilled(2.0, 1.0, 7.0)))
    found = str(distilled_verdict(distilled(2.0, 1.0, 24.0)))
    assert "perplexity is 3.0 times the teacher's" in found and "(50% of the way)" in found
    assert "20 steps were trained on 32 rows, more usually help" in found
    found = str(distilled_verdict(distilled(2.0, 1.0, 24.0) | {"written_rows": 1024}))
    assert "20 steps were trained on 32 rows and 1,024 that the teacher wrote, more usually help" in found


@given(st.floats(-1e-6, 10), st.floats(-1e-6, 10))
def test_the_way_is_told_only_where_there_is_one(before: float, after: float) -> None:
    """Of a student that began at its teacher, or ended farther from it, no share of the way is told."""
    found = str(distilled_verdict(distilled(before, after, 9.0)))
    ways = [int(way) for way in re.findall(r"\((-?\d+)% of the way\)", found)]
    assert len(ways) == (before >= 1e-3 and 0 < after < before) and all(0 <= way <= 100 for way in ways)
    assert ("began at its teacher" in found) == (before < 1e-3)


def test_a_classifier_is_judged_by_what_it_lost() -> None:
    for after, level in ((0.95, "good"), (0.891, "good"), (0.889, "doubtful"), (0.851, "doubtful"), (0.849, "bad")):
        assert classified_verdict(classified(0.9, after)).level == level
    assert "accuracy is 0.850, 0.050 below the teacher's" in str(classified_verdict(classified(0.9, 0.85)))
    several = classified(0.9, 0.9)
    several["quality_by_stage"] = {when: {"f1_micro": 0.8, "f1_macro": 0.7, "rows": 4} for when in several["quality_by_stage"]}  # fmt: skip  # noqa: E501
    assert "micro F1 is 0.800" in str(classified_verdict(several))


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.just(0.1), st.just(0.2)), min_size=1))
def test_the_worst_measure_decides(measured: list[tuple[float, float, float]]) -> None:
    values = [value for value, *_ in measured]
    bad, good = any(not v <= 0.2 for v in values), all(v <= 0.1 for v in values)
    assert level_of(*measured) == ("bad" if bad else "good" if good else "doubtful")


def layers(before: float | None, after: float | None) -> list[dict[str, Any]]:
    return [{"before": {of: {"ratio": before} for of in ("activations", "weights")},
             "after": {of: {"ratio": after} for of in ("activations", "weights")}}]  # fmt: skip


def test_a_falling_qsur_is_explained_where_the_error_falls_too() -> None:
    nearest = {"quality_by_stage": {"nearest": {"kl": 0.2}}, "quality": {"kl": 0.1}}
    assert "QSUR fell" in str(qsur_phrase(nearest | {"layers": layers(0.6, 0.5)}))
    assert qsur_phrase(nearest | {"layers": layers(0.5, 0.6)}) is None, "it rose"
    assert qsur_phrase(nearest | {"layers": layers(0.6, None)}) is None, "it is not known"
    worse = {"quality_by_stage": {"nearest": {"kl": 0.2}}, "quality": {"kl": 0.3}, "layers": layers(0.6, 0.5)}
    assert qsur_phrase(worse) is None, "the error rose"
    assert qsur_phrase(worse | {"quality_by_stage": {}}) is None, "nothing to compare with"
