"""Tensors of a checkpoint folder, paged in from safetensors shards by name.

Nothing here trusts the folder: an index may not point outside it, every tensor's name, shape and dtype is compared
with what the config's own model class expects, and `verify` reads each value once. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib import BadInput
from calib.model.config import RECIPE
from calib.runtime.progress import stage

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn}  # which mean something beside their scales alone
_INTEGERS = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
WRAPPERS = {  # what torch.compile, DataParallel and peft put around the names of a model's own tensors -> what is left
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+": "",
    r"\._orig_mod\.": ".",
    r"\.base_layer\.": ".",
}
_ADAPTERS = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save|original_module)\.")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """A tensor as a shard's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Weights:
    """The tensors of one folder.  Headers are read at once, values when asked for; no file stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in _shards(folder):
            entries = {_unwrapped(name, file): entry for name, entry in _header(file)[0].items()}
            if twice := sorted(self.entries.keys() & entries.keys()):
                other = self.entries[twice[0]].file.name
                raise BadInput(f"{file}: tensor '{twice[0]}' stands in {other} as well; get a sound copy")
            self.entries |= entries
        alone = [name for name, entry in self.entries.items() if entry.dtype in _FLOAT8.values()]
        if alone and not (folder / RECIPE).is_file():  # not an output, whose format is known
            raise BadInput(
                f"{self.entries[alone[0]].file}: tensor '{alone[0]}' has dtype F8_E4M3, whose scales are unknown, "
                "as config.json has no quantization_config; get a sound copy, or the checkpoint in bfloat16"
            )

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Copies, in the checkpoint's own dtype, of the tensors called `names`; in pinned memory, from which an
        accelerator takes them without waiting, where that is asked for.

        Read, not mapped: pages of a mapped file count as this process's memory for as long as the mapping lives.
        """
        return {name: _read(self.entry(name), pinned=pinned) for name in names}

    def entry(self, name: str) -> Entry:
        """Raises BadInput where there is none."""
        if name not in self.entries:
            raise BadInput(f"{self.folder}: tensor '{name}' is missing; the checkpoint is incomplete")
        return self.entries[name]

    def verify(self, expected: Collection[str], unbounded: Collection[str] = ()) -> str:
        """Look at every value of the tensors called `expected` once; those of `unbounded` may be infinite.

        -> a fingerprint: sha256 over names, dtypes, shapes and values, whatever files they are kept in.  Raises
        BadInput.
        """
        digest = hashlib.sha256()
        with stage("check weights", len(expected), "tensors") as done:
            for name in sorted(expected):
                tensor, entry = self.read([name])[name], self.entries[name]
                if tensor.is_floating_point() and name not in unbounded and not tensor.isfinite().all():
                    raise BadInput(f"{entry.file}: tensor '{name}' contains NaN or Inf; get a sound copy")
                digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
                digest.update(tensor_bytes(tensor))
                done("")
        return digest.hexdigest()


def _unwrapped(name: str, file: Path) -> str:
    """Raises BadInput for a tensor of adapters, which stand beside the weights that they change."""
    if _ADAPTERS.search(name):
        raise BadInput(
            f"{file}: tensor '{name}' is of adapters that are not merged; merge them (merge_and_unload of peft)"
        )
    for pattern, left in WRAPPERS.items():
        name = re.sub(pattern, left, name)
    return name


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: all tensors, and its metadata."""
    entries, metadata = _header(file)
    return {name: _read(entry) for name, entry in entries.items()}, metadata


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file without its tensors."""
    return _header(file)[1]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(entry: Entry, *, pinned: bool = False) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, pin_memory=pinned)
    left, position = tensor_bytes(tensor), entry.offset
    with entry.file.open("rb", buffering=0) as file:
        while left:
            count = os.preadv(file.fileno(), [left], position)
            if not count:
                raise BadInput(f"{entry.file}: ends too soon; it was changed while it was read")
            left, position = left[count:], position + count
    return tensor


def _shards(folder: Path) -> list[Path]:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BadInput(f"{index}: not a safetensors index ({error}); get a sound copy") from error
    elif whole.exists():
        names = [whole.name]
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise BadInput(
            f"{folder}: holds only pickle weights, which can run code when they are read; "
            "convert them to safetensors (transformers' save_pretrained does) and give that folder"
        )
    else:
        raise BadInput(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    shards = [_inside(folder, str(name), index) for name in names]
    if whole.exists() and whole.name not in names:  # the library would read the one, other loaders the others
        raise BadInput(
            f"{folder}: has both {whole.name} and an index of other shards ({index.name}); move away what is stale"
        )
    return shards


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The file `name` of `folder`.  Links are followed only within the folder, or into a hub cache's own blobs."""
    file = folder / name
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # layout of the hub's cache: snapshots/<revision>, blobs/
        allowed.append(folder.resolve().parents[1] / "blobs")
    try:
        plain = Path(name).name == name and "\0" not in name
        if not plain or not any(file.resolve().is_relative_to(root) for root in allowed):
            raise BadInput(f"{index}: names '{name}', a file outside the folder; refused")
        if not file.is_file():
            raise BadInput(f"{file}: this shard is missing; the checkpoint is incomplete")
    except (OSError, RuntimeError) as error:  # a name that is too long, links that go round in circles
        raise BadInput(f"{index}: names '{name}', which leads nowhere ({error}); get a sound copy") from error
    return file


def _header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        file.open("rb").close()  # the library calls a file that must not be read a missing one
        with safe_open(file, framework="pt") as shard:
            names = sorted(shard.keys())
        # The library has checked the header; where the values lie it does not tell, the header does: its length in
        # 8 bytes, then JSON, then values, with offsets counted from there.
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        entries = {}
        for name in names:
            dtype = (_DTYPES | _INTEGERS | _FLOAT8).get(header[name]["dtype"])
            if dtype is None:
                raise BadInput(f"{file}: tensor '{name}' has dtype {header[name]['dtype']}, which is not supported")
            offset = 8 + length + header[name]["data_offsets"][0]
            entries[name] = Entry(file, dtype, tuple(header[name]["shape"]), offset)
        return entries, header.get("__metadata__") or {}
    except (PermissionError, IsADirectoryError) as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); mend the path, or who may read it") from error
    except (SafetensorError, FileNotFoundError) as error:
        raise BadInput(f"{file}: not a complete safetensors file ({error}); copy it again") from error
