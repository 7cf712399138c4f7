"""Reading a model folder, with suspicion."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from calib import BadInput, first_line
from calib.model.companions import copy_companions, has_tokenizer, hub_patterns
from calib.model.config import RECIPE, is_quantized, read_json

if TYPE_CHECKING:  # the libraries are imported where they read; a folder that is not there is refused before that
    from transformers import PreTrainedTokenizerBase

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_MADE: dict[str, Path] = {}  # a name that was given -> the plain folder that was made of it in this process


def find_model(model: str | Path, *, base_model: str | Path | None = None, dequantize: bool = False) -> Path:
    """The folder called `model`, or the hub repository of that name, fetched (no code, no pickles).

    A folder of adapters is merged into its base: `base_model`, or the one that its config names. A GGUF file or a model
    in few bits becomes floats where `dequantize` says so. What is made so lies in a scratch folder until the process
    ends, and is found again by the same name. Raises BadInput.
    """
    if (made := _MADE.get(str(model))) is not None:
        return made
    folder = _found(model)
    adapters = folder.is_dir() and (folder / "adapter_config.json").is_file()
    whole = folder.is_dir() and (folder / "config.json").is_file()
    if adapters and whole and any(folder.glob("model*.safetensors")):
        raise BadInput(f"{folder}: holds a whole model and adapters beside it; move one of them away, or merge them")
    if base_model is not None and not adapters:
        raise BadInput(f"base-model: {model} is no folder of adapters; leave it out")
    if adapters:
        return _made(model, folder, _base_of(folder, base_model))
    if folder.is_dir() and not whole and (inner := sorted(folder.glob("*/adapter_config.json"))):
        names = ", ".join(file.parent.name for file in inner)
        raise BadInput(f"{folder}: holds adapters in the folders {names}; give one of them, such as {inner[0].parent}")
    weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    gguf = [folder] if folder.is_file() else [] if weights else sorted(folder.glob("*.gguf"))
    quantized = bool(gguf) or (whole and is_quantized(read_json(folder / "config.json")))
    if gguf and not dequantize:
        raise BadInput(f"{gguf[0]}: is a GGUF file; add --dequantize to go on with the floats that it stands for")
    if len(gguf) > 1:
        raise BadInput(f"{folder}: holds several GGUF files; give one of them, such as {gguf[0]}")
    if dequantize:
        if not quantized:
            raise BadInput(f"{model}: is a float model already; leave out --dequantize")
        return _made(model, gguf[0] if gguf else folder, None)
    return folder


def local(model: str | Path) -> Path | None:
    """The folder or GGUF file called `model`; None where it can only be the name of a repository on the hub.  Raises
    BadInput where it is neither, or cannot be read."""
    folder = Path(model)
    try:
        if folder.is_file() and folder.suffix.lower() == ".gguf":
            return folder
        if folder.is_dir():
            str(folder.resolve()).encode()
            next(folder.iterdir(), None)
            return folder
        if folder.is_file():
            raise BadInput(f"{model}: is a file; give the folder with config.json and the weights, or a .gguf file")
    except OSError as error:  # a name that is too long, a folder that others keep to themselves
        raise BadInput(f"{model}: cannot be read ({error.strerror}); mend the path, or who may read it") from error
    except UnicodeEncodeError as error:
        raise BadInput(f"{model}: has a name that is not UTF-8, which safetensors cannot open; rename it") from error
    if not _REPOSITORY.fullmatch(str(model)):
        raise BadInput(f"{model}: no such folder; mend the path, or give a model's name on the hub, such as OWNER/NAME")
    return None


def _found(model: str | Path) -> Path:
    if (found := local(model)) is not None:
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=hub_patterns()))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"{model}: no such folder, and not to be had from the hub ({first_line(error)})") from error


def _base_of(folder: Path, given: str | Path | None) -> Path:
    """The model that adapters were trained on.  Raises BadInput."""
    named = given or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str | Path) or not str(named):
        raise BadInput(f"{folder}: holds adapters and does not name their base; give --base-model")
    try:
        return find_model(named)
    except BadInput as error:
        raise BadInput(
            f"{folder}: holds adapters of {named}, which cannot be had ({error}); give --base-model"
        ) from error


def _made(model: str | Path, source: Path, base: Path | None) -> Path:
    from calib.model import conversion  # which reads folders with what stands here

    place = tempfile.mkdtemp(prefix="parewell-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    into = Path(place) / (source.stem if source.is_file() else source.resolve().name)
    into.mkdir()
    if base is None:
        conversion.dequantize(source, into)
        beside = [source] if source.is_dir() else []
    else:
        conversion.merge_adapters(source, base, into)
        beside = [base, source]
    for folder in beside:  # what adapters bring of their own comes last
        copy_companions(folder, into)
    if (source / RECIPE).is_file():
        shutil.copyfile(source / RECIPE, into / RECIPE)
    _MADE[str(model)] = into
    return into


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """None where the folder has no tokenizer."""
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds, from many places
        for package in ("sentencepiece", "tiktoken"):
            if package in str(error).lower() and find_spec(package) is None:
                raise BadInput(
                    f"{folder}: its tokenizer has no tokenizer.json and wants {package}; pip install {package}"
                ) from error
        raise BadInput(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error
