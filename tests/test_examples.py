"""The scripts in examples/ do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def said(script: str, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, f"examples/{script}.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_every_script_is_run_here() -> None:
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == {
        "quantize_and_gate", "distil_a_smaller_model", "forget_and_prove",
        "one_step_generator",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("agreement", "status", "word"), [(0.5, 0, "let through: "), (0.9999, 1, "is not let through")]
)
def test_what_agrees_too_seldom_is_not_let_through(agreement: float, status: int, word: str, tmp_path: Path) -> None:
    text = said("quantize_and_gate", tmp_path / "out", "--agreement", agreement, status=status)
    assert word in text and (tmp_path / "out/report.html").is_file()


def test_a_student_gets_nearer_to_its_teacher(tmp_path: Path) -> None:
    text = said("distil_a_smaller_model", tmp_path / "out")
    before, after = (float(found) for found in re.findall(r"perplexity ([\d.]+)", text))
    assert after < 0.8 * before and "weights instead of" in text


def test_what_is_forgotten_becomes_less_likely_than_the_rest(tmp_path: Path) -> None:
    text = said("forget_and_prove", tmp_path / "out")
    (deleted, gone_after), (kept, kept_after) = re.findall(r"([\d.]+) nats a token before, ([\d.]+) after", text)
    assert float(gone_after) - float(deleted) > 2 * (float(kept_after) - float(kept))


def test_one_step_draws_better_digits_after_training_than_the_teacher_in_one() -> None:
    text = said("one_step_generator", "--steps", 60, "--seeds", 1, "--divergences", "js")
    found = {name: float(far) for name, far in re.findall(r"^(.+), 0: ([\d.]+), [\d.]+%$", text, re.M)}
    assert found.keys() == {"teacher in 40 steps", "teacher in one", "js"}
    assert found["js"] < found["teacher in one"]
