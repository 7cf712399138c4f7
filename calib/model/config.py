"""A model folder's JSON files, read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import BadInput, first_line

if TYPE_CHECKING:  # the libraries are imported where they read; a folder that is not there is refused before that
    from transformers import PretrainedConfig

RECIPE = "parewell.json"  # lies in every folder that parewell writes


def is_quantized(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json, as read, is of a model in few bits; null says that it is not."""
    return raw.get("quantization_config") is not None


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a float causal language model that the library knows.  Raises BadInput."""
    raw = read_json(folder / "config.json")
    if is_quantized(raw):
        options = raw["quantization_config"]
        method = options.get("quant_method", "unknown") if isinstance(options, dict) else options
        raise BadInput(
            f"{folder}: is quantized already ({method}); give the model it was made from, or add --dequantize"
        )
    return config_for(folder, raw)


def config_for(folder: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The library's config of a causal language model, of its float weights.

    Args:
        folder: that holds config.json.
        raw: what was read from it.

    Raises:
        BadInput: the library does not know the type, or cannot use the config.
    """
    kind = raw.get("model_type")
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " (code that comes with a model is never run)" if raw.get("auto_map") else ""
        raise BadInput(
            f"{folder / 'config.json'}: model_type {kind!r} is not known to transformers {__version__}{own}; a newer "
            "transformers may know it"
        )
    if auto_class(kind, raw.get("architectures")) is None:
        raise BadInput(
            f"{folder / 'config.json'}: transformers {__version__} has no causal language model of type '{kind}'; give "
            "a model that has one"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library validates in several ways and raises as many kinds
        raise BadInput(f"{folder / 'config.json'}: cannot be used ({first_line(error)})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def auto_class(model_type: str, architectures: object = None) -> str | None:
    """Name the library's class that models of a type are opened with: of causal language models, or of those that see
    images and write text, where there is no other or the checkpoint names it.

    Args:
        model_type: as config.json has it.
        architectures: what config.json says of the checkpoint's class.

    Returns:
        "AutoModelForCausalLM" or "AutoModelForImageTextToText"; None where the library has neither.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    causal, seeing = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type), None
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    named = isinstance(architectures, list | tuple) and seeing in architectures and causal not in architectures
    if seeing is not None and (causal is None or named):
        return "AutoModelForImageTextToText"
    return None if causal is None else "AutoModelForCausalLM"


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
