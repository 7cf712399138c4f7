"""What a teacher said, kept on disk: a page of safetensors for every row, written whole or not at all.

Kept is either the top-k of each of its distributions (8 bytes a token and entry) or tokens drawn from it. A job keeps
it in its own journal; or it lies in a folder of its own, for many jobs, which says which teacher and text it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.jobs.journal import Journal, kept_apart
from calib.losses.top_k import SampledTargets, TopK

TARGET_KINDS = {"top": TopK, "drawn": SampledTargets}


class TeacherCache:
    """A teacher's answers on disk, one `TopK` or `SampledTargets` (T, k) for every row; any process writes a row, and
    all read it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __contains__(self, row: int) -> bool:
        return f"teacher-{row}" in self._journal

    def write(self, row: int, targets: TopK | SampledTargets) -> None:
        """Store the answers to a row; whole or not at all."""
        kind = next(name for name, of in TARGET_KINDS.items() if isinstance(targets, of))
        tensors = asdict(targets) | {"index": targets.index.int()}
        self._journal.write_own(f"teacher-{row}", tensors, {"kind": kind})

    def read(self, row: int) -> Any:
        """`TopK` or `SampledTargets`, whichever was written.  Raises BadInput where it is neither."""
        tensors, notes = self._journal.read(f"teacher-{row}")
        try:
            targets = TARGET_KINDS[notes["kind"]](**(tensors | {"index": tensors["index"].long()}))
            index, *beside = asdict(targets).values()
            sound = index.dim() == 2 and bool((index >= 0).all()) and beside[0].shape == index.shape
            if not sound or any(len(x) != len(index) or x.isnan().any() for x in beside):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            page = self._journal.folder / f"teacher-{row}.page"
            raise BadInput(f"{page}: is not what a teacher says; remove it, and it is asked again") from error
        return targets


def shared_cache(folder: Path, of: Mapping[str, Any]) -> TeacherCache:
    """The cache in `folder`, made where there is none; `of` says which teacher, text and k.  Raises BadInput."""
    return TeacherCache(kept_apart(folder, of, "words of a teacher"))
