"""Writing a model folder: complete or absent, whatever happens on the way."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from calib import BadInput
from calib.model.companions import BASE_CARD, CARD, is_companion, is_companion_folder
from calib.model.config import RECIPE, read_json
from calib.report.model_card import is_own_card, model_card, read_metadata_of
from calib.runtime.disk import disk_full, sync

TEACHER_FOLDER = "teacher"  # in an output, of a teacher that was trained together with its student
SHARD_BYTES = 2**28  # what is held in memory while OUT is written
REPORT = "report.json"
_OURS = {"config.json", REPORT, "report.html", "model.safetensors.index.json", BASE_CARD}
_OURS |= {"adapter_config.json", "adapter_model.safetensors", "quantize_config.json"}
_OUR_PATTERN = re.compile(r"parewell\.\w+|model(-\d+-of-\d+)?\.safetensors")


def check_destination(out: Path, models: Sequence[Path], bytes_needed: int) -> None:
    """Raises BadInput where OUT cannot or must not be written, as it is made from `models`."""
    try:
        real = out.resolve()
        if len(os.fsencode(f".{real.name}.replaced")) > 255:
            raise BadInput(f"{real.name[:40]}...: is too long a name; choose a shorter one")
        real.exists()
        str(real).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{out}: is not UTF-8, which safetensors cannot open; choose another place") from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which may be what is too long
        raise BadInput(f"{out}: leads nowhere ({reason}); choose another place") from error
    for state in ("journal", "partial", "replaced"):
        if (place := beside(out, state)).exists() and not place.is_dir():
            raise BadInput(f"{place}: is in the way; remove it, or choose another place")
    for model in models:
        check_apart(out, model, "the model folder")
    if real.exists():
        if not real.is_dir() or (any(real.iterdir()) and not _has_recipe(real)):
            raise BadInput(f"{out}: exists and was not written by parewell; choose another place or remove it")
        exported = _exported_name(real)
        for file in sorted(real.iterdir()):
            if file.name != exported and not is_ours(file):
                raise BadInput(
                    f"{out}: would be replaced, but holds {file.name}, which parewell did not write; move it"
                )
        if real.is_mount():
            raise BadInput(f"{out}: is a mount point, which cannot be replaced; give a folder inside it")
    parent = real.parent
    if not parent.is_dir():
        raise BadInput(f"{parent}: is no folder; make it first")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise BadInput(f"{parent}: cannot be written to")
    # What an interrupted run left is part of what is needed, or makes room for it.
    left = sum(file.stat().st_size for state in ("journal", "partial") for file in beside(out, state).rglob("*"))
    free = shutil.disk_usage(parent).free + left
    if free < bytes_needed:
        raise BadInput(f"{parent}: {free / 1e6:,.0f} MB free, about {bytes_needed / 1e6:,.0f} MB needed; make room")


def _exported_name(folder: Path) -> str | None:
    """The file that a format is called after, such as model.gguf, in a folder whose recipe ends with an export."""
    steps = read_json(folder / RECIPE).get("recipe") if (folder / RECIPE).is_file() else None
    last = steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], dict) else {}
    options = last.get("options")
    return f"model.{options.get('to')}" if last.get("job") == "export" and isinstance(options, dict) else None


def check_apart(out: Path, other: Path, what: str) -> None:
    """Raises BadInput where one lies inside the other."""
    real, source = out.resolve(), other.resolve()
    if real.is_relative_to(source):
        raise BadInput(f"{out}: lies inside {what} {other}; choose another place")
    if source.is_relative_to(real):
        raise BadInput(f"{out}: contains {what} {other}; choose another place")


def is_ours(file: Path) -> bool:
    """Whether an entry of a folder is one that a job writes."""
    if file.is_dir() and not file.is_symlink():
        moved = file.name == TEACHER_FOLDER and _has_recipe(file) and all(is_ours(inner) for inner in file.iterdir())
        return moved or is_companion_folder(file)
    if file.name == CARD:  # which whoever published the folder may have gone on writing
        return file.is_file() and is_own_card(file.read_text(encoding="utf-8", errors="replace"))
    return file.name in _OURS or bool(_OUR_PATTERN.fullmatch(file.name)) or is_companion(Path(file.name))


def _has_recipe(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / RECIPE).get("recipe"), list)
    except BadInput:
        return False


def beside(out: Path, state: str) -> Path:
    """The hidden folder next to OUT that holds it in one state of its making."""
    return out.resolve().parent / f".{out.resolve().name}.{state}"


def check_cache(cache: Path, out: Path, models: Sequence[Path]) -> None:
    """Raises BadInput where a folder that is to stay would go when OUT is made, or lies in a model."""
    try:
        for state in ("", "journal", "partial", "replaced"):
            check_apart(cache, beside(out, state) if state else out, "what becomes of OUT,")
        for model in models:
            check_apart(cache, model, "the model folder")
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{cache}: leads nowhere ({error}); choose another place") from error


@contextmanager
def atomic_folder(out: Path, bytes_needed: int) -> Iterator[Path]:
    """A scratch folder beside OUT that takes its place if the `with` ends well, and vanishes if it does not.

    A scratch folder left by a killed run is emptied; one in use by a living run is refused. A full disk is NoSpace.
    """
    out, scratch, replaced = out.resolve(), beside(out, "partial"), beside(out, "replaced")
    handle = -1
    try:
        handle = lock(scratch, out)
        _restore(replaced, out)  # a run killed between the two renames below left OUT there
        for leftover in scratch.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        with disk_full(out, bytes_needed):
            yield scratch
        mode = scratch.stat().st_mode & 0o666  # what the umask allows; safetensors writes 0600
        for file in scratch.rglob("*"):
            if not file.is_dir():
                file.chmod(mode)
            sync(file)
        sync(scratch)
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        scratch.rename(out)
        sync(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if handle >= 0:
            shutil.rmtree(scratch, ignore_errors=True)
            _restore(replaced, out)
        raise
    finally:
        if handle >= 0:
            os.close(handle)


def lock(scratch: Path, out: Path) -> int:
    """Make the folder `scratch` and lock it -> a file descriptor that holds the lock until it is closed.

    The lock is on the folder itself, so it goes where the folder is renamed to and lasts until all is done.
    """
    while True:
        scratch.mkdir(exist_ok=True)
        handle = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BadInput(f"{out}: another run is writing it; wait for that one or choose another place") from error
        # The run that held it may have renamed or removed the folder between our opening and our locking it.
        if scratch.exists() and os.path.samestat(os.fstat(handle), scratch.stat()):
            return handle
        os.close(handle)


def _restore(replaced: Path, out: Path) -> None:
    if replaced.exists() and not out.exists():
        replaced.rename(out)


class Shards:
    """Writes tensors into numbered safetensors files as they come, holding at most one file's worth."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []
        self.bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by name; a shard that is full is written."""
        for name, tensor in tensors.items():
            if self._held and self._held_bytes + tensor.nbytes > self._limit:
                self._flush()
            self._held[name] = tensor.detach().cpu().contiguous()
            self._held_bytes += tensor.nbytes
            self.bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._held, self._folder / f"shard-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Give the files their names, and write the index where there is more than one."""
        self._flush()
        count = len(self._files)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            (self._folder / f"shard-{i}").rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, held in zip(names, self._files, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._folder / "model.safetensors.index.json", index)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON."""
    file.write_text(
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
        errors="backslashreplace",
    )


def write_described(
    folder: Path,
    report: Mapping[str, Any],
    recipe: Sequence[Mapping[str, Any]],
    page: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], str],
) -> None:
    """Write what every job leaves beside its weights: recipe, report as JSON and as a page, and model card."""
    write_json(folder / RECIPE, {"recipe": recipe})
    write_json(folder / REPORT, report)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    card = model_card(report, recipe, config, read_metadata_of(folder / BASE_CARD))
    for name, text in (("report.html", page(report, recipe)), (CARD, card)):
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
