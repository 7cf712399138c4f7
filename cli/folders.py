"""Folders that commands are given: what they need of one, said where it is not there."""

from __future__ import annotations

from pathlib import Path

from calib import BadInput


def check_written(out: Path, name: str) -> None:
    """Raises BadInput where `out` is no folder that a job wrote, with the file `name` in it."""
    try:
        exists, is_folder, there = out.exists(), out.is_dir(), (out / name).exists()
    except OSError as error:
        raise BadInput(f"{out}: cannot be read ({error.strerror}); mend the path, or who may read it") from error
    made = "give a folder that parewell quantize, distill, unlearn or export wrote"
    if not exists:
        raise BadInput(f"{out}: no such folder; {made}")
    if not is_folder:
        raise BadInput(f"{out}: is a file; {made}")
    if not there:
        raise BadInput(f"{out}: has no {name}, which every job leaves beside its weights; {made}")
