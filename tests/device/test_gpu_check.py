"""The check that is prepared for a GPU, with tiny shapes where there is none: no minute of one is to go on a typo."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("step", sorted(gpu.STEPS.keys() - {"tests", "jobs", "gradients"}))
def test_a_step(step: str, tmp_path: Path) -> None:
    failed = {
        name: of for name, of in gpu.STEPS[step](True, tmp_path).items() if isinstance(of, dict) and "failed" in of
    }
    assert not failed


def test_one_of_each_command(tmp_path: Path) -> None:
    found = gpu.jobs(True, tmp_path)
    assert all(of["same bytes twice"] for of in found.values())


def test_gradients_on_the_device_are_those_of_double_precision(tmp_path: Path) -> None:
    found = gpu.gradients(True, tmp_path)
    assert all(of["relative error"] < (1e-9 if "64" in name else 1e-2) for name, of in found.items())
