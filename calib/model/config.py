"""A model folder's JSON files, read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import BadInput, first_line
from calib.model.task import WRITERS, Task, task_of_checkpoint

if TYPE_CHECKING:  # the libraries are imported where they read; a folder that is not there is refused before that
    from transformers import PretrainedConfig

RECIPE = "parewell.json"  # lies in every folder that parewell writes


def is_quantized(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json, as read, is of a model in few bits; null says that it is not."""
    return raw.get("quantization_config") is not None


def read_config(folder: Path, tasks: Collection[Task] = WRITERS) -> PretrainedConfig:
    """The config of a float model of one of these `tasks` that the library knows.  Raises BadInput."""
    raw = read_json(folder / "config.json")
    if is_quantized(raw):
        options = raw["quantization_config"]
        method = options.get("quant_method", "unknown") if isinstance(options, dict) else options
        raise BadInput(
            f"{folder}: is quantized already ({method}); give the model it was made from, or add --dequantize"
        )
    return config_for(folder, raw, tasks)


def config_for(folder: Path, raw: Mapping[str, Any], tasks: Collection[Task] = WRITERS) -> PretrainedConfig:
    """The library's config of a model, of its float weights.

    Args:
        folder: that holds config.json.
        raw: what was read from it.
        tasks: what the model may be for.

    Raises:
        BadInput: the library does not know the type, or cannot use the config, or the model is for another task.
    """
    kind = raw.get("model_type")
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " (code that comes with a model is never run)" if raw.get("auto_map") else ""
        raise BadInput(
            f"{folder / 'config.json'}: model_type {kind!r} is not known to transformers {__version__}{own}; a newer "
            "transformers may know it"
        )
    task = task_of_checkpoint(kind, raw.get("architectures"))
    if task not in tasks:
        named = raw.get("architectures")
        what = f"{task.described}s" if task else f"models of class {named[0]}" if named else f"models of type '{kind}'"
        raise BadInput(
            f"{folder / 'config.json'}: {what} are not taken here (transformers {__version__}, type '{kind}'); give a "
            + " or ".join(dict.fromkeys(one.described for one in Task if one in tasks))
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library validates in several ways and raises as many kinds
        raise BadInput(f"{folder / 'config.json'}: cannot be used ({first_line(error)})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises BadInput where the file is missing or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadInput(f"{file}: is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{file}: is not a JSON object")
    return value


def as_configured(config: Mapping[str, Any]) -> dict[str, str]:
    """Keyword arguments that `from_pretrained` needs so that a model computes what its config.json says: transformers
    before 5.21 runs Gemma 2 under sdpa, which leaves out the capping of attention scores."""
    return {} if config.get("attn_logit_softcapping") is None else {"attn_implementation": "eager"}
