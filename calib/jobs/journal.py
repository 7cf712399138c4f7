"""What is finished of a long job, in a folder beside its OUT, so that a run that was killed can go on.

A page is one safetensors file: tensors, and notes as JSON in its metadata. It is written under another name, flushed
and renamed, so a page is whole or absent. The first page says what the job is; a journal of another job is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from calib import BadInput, Damaged, Failed
from calib.blockwise.activation_store import ActivationStore
from calib.jobs.options import difference, without_memory
from calib.jobs.output_folder import beside, lock
from calib.model.weights import read_file, read_metadata
from calib.runtime.disk import disk_full, sync
from calib.runtime.distributed import all_reduce_sum_, barrier, is_main_process, raise_together, rank

_JOB = "job"
_SHARE = 0.02  # of the time, at most, that is spent on writing a page again and again


class Journal:
    """Pages by name.  Among several processes the first writes, all read."""

    def __init__(self, folder: Path, within: str = "") -> None:
        """`within`: of a job that is part of a larger one, what tells its pages from the other's."""
        self.folder, self._within = folder, within

    def __contains__(self, page: str) -> bool:
        return self._file(page).exists()

    def read(self, page: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read an entry: (tensors, notes)."""
        with self._whole(page):
            tensors, metadata = read_file(self._file(page))
            return tensors, _mapping(metadata["notes"])

    def notes(self, page: str) -> dict[str, Any]:
        """Without reading the tensors."""
        with self._whole(page):
            return _mapping(read_metadata(self._file(page))["notes"])

    @contextmanager
    def _whole(self, page: str) -> Iterator[None]:
        """Raises BadInput where what is read inside is not as it was written."""
        try:
            yield
        except (BadInput, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{self._file(page)}: is damaged; start anew with --no-resume, or without the folder"
            ) from error

    def write(self, page: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write an entry from the main process; other processes do nothing."""
        if is_main_process():
            self.write_own(page, tensors, notes)

    def write_own(self, page: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write an entry from the process that calls; every process must name another entry."""
        # Other jobs may write the same page of a shared folder.
        new = self.folder / f"{self._within}{page}.{os.getpid()}.new"
        held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with disk_full(self.folder, sum(t.nbytes for t in held.values())):
            save_file(held, new, metadata={"notes": json.dumps(notes)})
            sync(new)
            new.rename(self._file(page))
            sync(self.folder)

    def remove(self, page: str) -> None:
        """Remove an entry; the process that wrote it does."""
        self._file(page).unlink()

    def drop(self) -> None:
        """Remove all pages of a job that is part of a larger one; the main process does."""
        assert self._within, "pages of the larger job are its own to keep"
        barrier()
        for page in self.folder.glob(f"{self._within}*.page") if is_main_process() else ():
            page.unlink()
        barrier()

    def _file(self, page: str) -> Path:
        return self.folder / f"{self._within}{page}.page"


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError
    return value


class CheckpointSlot:
    """A page that is written again and again, as often as a small share of the time allows."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        self._written, self._cost = time.monotonic(), 0.0
        self._turn, self._stores = 0, dict[str, ActivationStore]()

    def keeping(self, stores: Mapping[str, ActivationStore]) -> CheckpointSlot:
        """A copy that keeps these stores too, which are the same in all processes: read and written row by row, so
        that no more than a row is in memory."""
        made = CheckpointSlot(self._journal, self._name)
        made._stores = dict(stores)
        return made

    def sibling(self, what: str, *, stores: bool = False) -> CheckpointSlot:
        """Another page, of the same work, with the same stores if wished."""
        return CheckpointSlot(self._journal, f"{self._name}-{what}").keeping(self._stores if stores else {})

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read what was kept: (tensors, notes), this process's own tensors among them; None where nothing was."""
        if self._name not in self._journal:
            return None
        tensors, notes = self._journal.read(self._name)
        if "turn" in notes:
            self._turn = int(notes["turn"])
            if notes.get("own", True):
                tensors |= self._journal.read(self._own)[0]
            for store, i in self._rows():
                self._stores[store][slice(i, i + 1)] = self._journal.read(self._row(store, i))[0]["row"]
        return tensors, notes

    def _rows(self) -> Iterator[tuple[str, int]]:
        return ((name, i) for name, store in self._stores.items() for i in range(len(store)))

    def _row(self, store: str, index: int) -> str:
        return f"{self._name}-{store}-{index}-{self._turn}"

    @property
    def _own(self) -> str:
        return f"{self._name}-{rank()}-{self._turn}"

    def notes(self) -> dict[str, Any] | None:
        """Without reading the tensors."""
        return self._journal.notes(self._name) if self._name in self._journal else None

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last write for another to be worth it."""
        return time.monotonic() - self._written >= self._cost / _SHARE

    def write(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], own: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write tensors and notes in place of the last ones.

        `own` are tensors of which each process has something else, and which it writes to an entry of its own; the
        common entry, which comes last, names the one of two such entries that counts, so that together they are of one
        state.
        """
        began = time.monotonic()
        if own is not None or self._stores:
            self._turn = 1 - self._turn
            for store, i in self._rows():
                self._journal.write(self._row(store, i), {"row": self._stores[store][slice(i, i + 1)]}, {})
            if own is not None:
                self._journal.write_own(self._own, own, {})
            barrier()
            notes = {**notes, "turn": self._turn, "own": own is not None}
        self._journal.write(self._name, tensors, notes)
        if "turn" in notes:
            barrier()
        self._written = time.monotonic()
        self._cost = self._written - began


@contextmanager
def journal_beside(out: Path, job: Mapping[str, Any], resume: bool | None) -> Iterator[Journal]:
    """The journal of OUT's making, `job` being all that decides about OUT's bytes.

    What an earlier run left is continued (resume True), discarded (False) or refused (None). When all is done the
    journal goes; it stays when the run is interrupted, killed, meets an error that may pass or is refused for what it
    made of the model, and goes where the run would only come to the same point again.
    """
    folder = beside(out, "journal")
    handle, journal = -1, Journal(folder)
    try:
        with raise_together():
            if is_main_process():
                handle = lock(folder, out)
                _start(journal, out, json.loads(json.dumps(job)), resume)
        try:
            yield journal
            barrier()
        except Damaged:
            raise
        except (BadInput, Failed):
            _remove(folder)
            raise
        _remove(folder)
    finally:
        if handle >= 0:
            os.close(handle)


def _remove(folder: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def check_journal(out: Path, job: Mapping[str, Any], resume: bool | None) -> bool:
    """Whether there is a run to continue.  Raises BadInput, as `journal_beside` will, where it is another's or is going
    on, or where no choice was made."""
    folder = beside(out, "journal")
    if folder.is_dir():
        os.close(lock(folder, out))
    return _continues(Journal(folder), out, json.loads(json.dumps(job)), resume)


def _continues(journal: Journal, out: Path, job: dict[str, Any], resume: bool | None) -> bool:
    if _JOB in journal and resume is not False:
        if resume is None:
            raise BadInput(
                f"{out}: an earlier run was interrupted; continue it with --resume, or discard it with --no-resume"
            )
        if different := difference(without_memory(journal.notes(_JOB)), without_memory(job)):
            raise BadInput(
                f"{out}: cannot continue an earlier run, whose {different}; start it as it was, or discard it with "
                "--no-resume"
            )
        return True
    return False


def _start(journal: Journal, out: Path, job: dict[str, Any], resume: bool | None) -> None:
    if _continues(journal, out, job, resume):
        return
    for file in journal.folder.iterdir():
        if file.is_dir() and not file.is_symlink():
            raise BadInput(f"{file}: is no page of a journal; move it away")
        file.unlink()
    journal.write(_JOB, {}, job)


def check_kept(folder: Path, what: str) -> Journal:
    """Raises BadInput where there is something else, or no place for a folder of pages."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise BadInput(f"{folder}: is no folder; give one, or a place for one")
    if any(place.exists() and not place.is_dir() for place in folder.parents):
        raise BadInput(f"{folder}: lies below a file; give another place")
    journal = Journal(folder)
    if "cache" not in journal and folder.exists() and any(file.suffix != ".new" for file in folder.iterdir()):
        raise BadInput(f"{folder}: exists and keeps no {what}; give another folder")
    return journal


def kept_apart(folder: Path, of: Mapping[str, Any], what: str) -> Journal:
    """A folder of pages for many jobs, made where there is none; `of` says what the pages are of, `what` they are.

    Raises BadInput where the folder holds pages of something else, or anything else.
    """
    journal, of = check_kept(folder, what), json.loads(json.dumps(of))
    if "cache" in journal and (different := difference(journal.notes("cache"), of)):
        raise BadInput(f"{folder}: keeps other {what}: {different}; give another folder")
    barrier()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    if "cache" not in journal:
        journal.write("cache", {}, of)
    barrier()
    return journal


# Interrupts: asked for once, a job stops where its journal is up to date.

_asked = False


@contextmanager
def gentle_interrupts(say: Any) -> Iterator[None]:
    """Inside the `with`, the first Ctrl-C (or SIGTERM) only asks jobs to stop; `say` tells the user so."""
    global _asked
    _asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked:
            raise KeyboardInterrupt
        _asked = True
        say("stopping as soon as the journal is up to date; once more to stop at once")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(TypeError):  # a handler that was not installed from Python cannot be put back
                signal.signal(number, handler)


def asked_to_stop() -> bool:
    """Whether the user, or the system, has asked this process to stop."""
    return _asked


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt, in all processes or none; to be called by all where the journal is up to date."""
    asked = torch.tensor([float(_asked)])
    all_reduce_sum_([asked])
    if asked.item():
        raise KeyboardInterrupt
