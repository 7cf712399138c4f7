"""What a job on a model that has forgotten rows must show before its output is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.jobs.recipe import forgettings

Gate = Callable[[Path], dict[str, Any]]  # a finished folder -> what it found, for the report; raises to hold it back


def check_unforgetting(folder: Path, *, measured: bool = True) -> None:
    """Raises BadInput for a model that was made to forget: rounding may undo it."""
    if forgettings(folder):
        way = "give gate=parewell.gate(...)" if measured else "it cannot be measured in this format"
        raise BadInput(f"{folder}: was made to forget, which rounding may undo; {way}, or allow it "
                       "(allow_recovery=True, --allow-recovery)")  # fmt: skip
