"""Reading a model folder, with suspicion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from calib import BadInput, first_line
from calib.anatomy import known
from calib.companions import hub_patterns

RECIPE = "parewell.json"


def find_model(model: str | Path) -> Path:
    """The folder called `model`, or the hub repository of that name, fetched: config, safetensors, companions."""
    folder = Path(model)
    try:
        if folder.is_dir():
            str(folder.resolve()).encode()
            if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                raise BadInput(f"{folder}: holds adapters, which only peft loads; make the whole model with --merge")
            next(folder.iterdir(), None)
            return folder
    except OSError as error:  # a name that is too long, a folder that others keep to themselves
        raise BadInput(f"{model}: cannot be read ({error.strerror}); mend the path, or who may read it") from error
    except UnicodeEncodeError as error:
        raise BadInput(f"{model}: has a name that is not UTF-8, which safetensors cannot open; rename it") from error
    try:
        return Path(snapshot_download(str(model), allow_patterns=hub_patterns()))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"{model}: no such folder, and not to be had from the hub ({first_line(error)})") from error


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a float model of a known architecture."""
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        how = raw["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise BadInput(f"{folder}: is quantized already ({method}); give the model it was made from")
    known(raw.get("model_type"))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library validates in several ways and raises as many kinds
        raise BadInput(f"{folder / 'config.json'}: cannot be used ({first_line(error)})") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadInput(f"{file}: is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{file}: is not a JSON object")
    return value


def read_recipe(folder: Path) -> list[dict[str, Any]]:
    """How a folder was made, step by step, oldest first.  A step whose model taught a student that was given has the
    model's own steps as its "teacher".  Raises BadInput where no recipe of ours is there."""
    steps = read_json(folder / RECIPE).get("recipe")
    try:
        sound = _are_steps(steps)
    except RecursionError:
        sound = False
    if not sound:
        raise BadInput(f"{folder / RECIPE}: is no recipe of parewell's; move it away, or make the folder again")
    return cast(list[dict[str, Any]], steps)


def _are_steps(found: Any) -> bool:
    parts = ("options", "data", "model", "versions", "quality")
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(step, dict)
            and "job" in step
            and all(isinstance(step.get(part), dict) for part in parts)
            and all(isinstance(step["model"].get(name), str) for name in ("name", "sha256"))
            and ("teacher" not in step or _are_steps(step["teacher"]))
            for step in found
        )
    )


def past_of(folder: Path) -> list[dict[str, Any]]:
    """The recipe of a folder; no steps where it has none, as models from elsewhere.  Raises BadInput."""
    return read_recipe(folder) if (folder / RECIPE).is_file() else []


def forgettings(folder: Path) -> list[dict[str, Any]]:
    """Steps of a folder's recipe, and of its teachers', in which rows were forgotten: what rounding may bring back.
    Raises BadInput."""
    found = list[dict[str, Any]]()
    for step in _with_teachers(past_of(folder)):
        if step["job"] == "unlearn" and isinstance(of := step["data"].get("forget"), dict) and of.get("rows"):
            found += [step] if step not in found else []  # what student and teacher both come from
    return found


def _with_teachers(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        yield from _with_teachers(step.get("teacher", []))
        yield step


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """None where the folder has no tokenizer."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds, from many places
        raise BadInput(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error
