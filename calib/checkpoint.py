"""Reading a model folder with suspicion, writing one that is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from calib import BadInput
from calib.anatomy import anatomy_of

RECIPE = "parewell.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SHARD_BYTES = 2 * 2**30


def find_model(model: str | Path) -> Path:
    """The folder called `model`, or the hub repository of that name, fetched (config, tokenizer, safetensors only)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                str(model), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{model}: no such folder, and not to be had from the hub ({reason})") from error


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a float model of a known architecture."""
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown")
        raise BadInput(f"{folder}: is quantized already ({method}); give the model it was made from")
    anatomy_of(raw.get("model_type"))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library validates in several ways and raises as many kinds
        raise BadInput(f"{folder / 'config.json'}: cannot be used ({str(error).splitlines()[0]})") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{file}: is missing; a model folder needs it") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{file}: is not a JSON object")
    return value


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """None where the folder has no tokenizer."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds, from many places
        raise BadInput(f"{folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from error


def check_destination(out: Path, model: Path, bytes_needed: int) -> None:
    """Raises BadInput where OUT cannot or must not be written."""
    if out.resolve().is_relative_to(model.resolve()):
        raise BadInput(f"{out}: lies inside the model folder {model}; choose another place")
    if model.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"{out}: contains the model folder {model}; choose another place")
    if out.exists() and not (out / RECIPE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"{out}: exists and was not written by parewell; choose another place or remove it")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise BadInput(f"{parent}: is no folder; make it first")
    if not os.access(parent, os.W_OK):
        raise BadInput(f"{parent}: cannot be written to")
    free = shutil.disk_usage(parent).free
    if free < bytes_needed:
        raise BadInput(f"{parent}: {free / 1e6:,.0f} MB free, about {bytes_needed / 1e6:,.0f} MB needed; make room")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A scratch folder beside OUT that takes its place if the `with` ends well, and vanishes if it does not.

    A scratch folder left by a killed run is removed; one in use by a living run is refused. A full disk is BadInput.
    """
    scratch, replaced = (out.resolve().parent / f".{out.name}.{state}" for state in ("partial", "replaced"))
    scratch.mkdir(exist_ok=True)
    lock = os.open(scratch / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise BadInput(f"{out}: another run is writing it; wait for that one or choose another place") from error
    try:
        if replaced.exists() and not out.exists():  # killed between the two renames below
            replaced.rename(out)
        for leftover in scratch.iterdir():
            if leftover.name != ".lock":
                leftover.unlink()
        yield scratch
        mode = (scratch / ".lock").stat().st_mode & 0o666  # what the umask allows; safetensors writes 0600
        (scratch / ".lock").unlink()
        for file in scratch.iterdir():
            file.chmod(mode)
            _sync(file)
        _sync(scratch)
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        scratch.rename(out)
        _sync(out.resolve().parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and _disk_full(error):
            raise BadInput(f"{out.resolve().parent}: no space left while writing {out.name}; make room") from error
        raise
    finally:
        os.close(lock)


def _disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Shards:
    """Writes tensors into numbered safetensors files as they come, holding at most one file's worth."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []
        self.bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
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
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's and generation's small files, byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
