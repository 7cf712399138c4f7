"""Tensors of a checkpoint folder, paged in from safetensors shards by name.

Nothing here trusts the folder: an index may not point outside it, every tensor's name, shape and dtype is compared
with what the config's own model class expects, and `verify` reads each value once. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib import BadInput
from calib.progress import stage

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Weights:
    """The tensors of one folder.  Headers are read at once, values when asked for; no file stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in _shards(folder):
            self.entries.update(_header(file))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies, in the checkpoint's own dtype, of the tensors called `names`."""
        with ExitStack() as stack:
            open_files: dict[Path, safe_open] = {}
            tensors = {}
            for name in names:
                file = self.entries[name].file
                if file not in open_files:
                    open_files[file] = stack.enter_context(safe_open(file, framework="pt"))
                # A copy: what safetensors hands out is a view of the mapped file.
                tensors[name] = open_files[file].get_tensor(name).clone()
            return tensors

    def fingerprint(self) -> str:
        """sha256 over the shards' bytes, in order of name."""
        digest = hashlib.sha256()
        for file in sorted({entry.file for entry in self.entries.values()}):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def verify(self, expected: Mapping[str, Tensor]) -> None:
        """Compare names, shapes, dtypes with `expected` (meta tensors will do), then look at every value once."""
        for name, want in expected.items():
            if name not in self.entries:
                raise BadInput(f"{self.folder}: tensor '{name}' is missing; the checkpoint is incomplete")
            entry = self.entries[name]
            if entry.shape != tuple(want.shape):
                raise BadInput(
                    f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, config.json asks for "
                    f"{list(want.shape)}; the two do not belong together"
                )
            if entry.dtype not in _DTYPES.values():
                raise BadInput(f"{entry.file}: tensor '{name}' has dtype {entry.dtype}; weights must be floating point")
        for name in self.entries.keys() - expected.keys():
            if not name.endswith("rotary_emb.inv_freq"):  # stored by old versions, derived from the config by all
                raise BadInput(
                    f"{self.entries[name].file}: tensor '{name}' has no place in the model that config.json "
                    "describes; the two do not belong together"
                )
        with stage("check weights", len(expected), "tensors") as done:
            for name in expected:
                if not self.read([name])[name].isfinite().all():
                    raise BadInput(f"{self.entries[name].file}: tensor '{name}' contains NaN or Inf; get a sound copy")
                done("")


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(f"{index}: not a safetensors index ({error}); get a sound copy") from error
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise BadInput(
            f"{folder}: holds only pickle weights, which can run code when they are read; "
            "convert them to safetensors (transformers' save_pretrained does) and give that folder"
        )
    else:
        raise BadInput(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    return [_inside(folder, str(name), index) for name in names]


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The file `name` of `folder`.  Links are followed only within the folder, or into a hub cache's own blobs."""
    file = folder / name
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # layout of the hub's cache: snapshots/<revision>, blobs/
        allowed.append(folder.resolve().parents[1] / "blobs")
    if Path(name).name != name or "\0" in name or not any(file.resolve().is_relative_to(root) for root in allowed):
        raise BadInput(f"{index}: names '{name}', a file outside the folder; refused")
    if not file.is_file():
        raise BadInput(f"{file}: this shard is missing; the checkpoint is incomplete")
    return file


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as shard:
            entries = {}
            for name in shard.keys():  # noqa: SIM118  (no mapping: only keys() iterates)
                view = shard.get_slice(name)
                dtype = (_DTYPES | _INTEGERS).get(view.get_dtype())
                if dtype is None:
                    raise BadInput(f"{file}: tensor '{name}' has dtype {view.get_dtype()}, which is not supported")
                entries[name] = Entry(file, dtype, tuple(view.get_shape()))
            return entries
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: not a complete safetensors file ({error}); copy it again") from error
