"""How an embedding model makes one vector of the states of a text's tokens, as sentence-transformers keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from calib import BadInput
from calib.model.config import read_json

POOLINGS = ("mean", "cls", "max", "lasttoken")


def pooling_of(folder: Path) -> str:
    """Name the pooling of the model in `folder`: "mean" (also where nothing says so), "cls", "max" or "lasttoken".

    Raises:
        BadInput: the folder's own files ask for a pooling that is not known here.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return "mean"
    try:
        listed: list[dict[str, Any]] = json.loads(modules.read_text(encoding="utf-8"))
        places = [module["path"] for module in listed if str(module["type"]).endswith(".Pooling")]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{modules}: is no list of modules ({error}); mend it, or remove it for the mean") from error
    if not places:
        return "mean"
    file = folder / places[0] / "config.json"
    raw = read_json(file)
    named = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
    asked = [kind for key, kind in named.items() if raw.get(f"pooling_mode_{key}")]
    asked = [str(raw["pooling_mode"])] if "pooling_mode" in raw else asked
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise BadInput(f"{file}: asks for a pooling that is not known here; known are {', '.join(POOLINGS)}")
    return asked[0]


def pooled(states: Tensor, kind: str) -> Tensor:
    """Pool the last hidden states (t, d) of a text's t real tokens -> (d,)."""
    if kind == "cls":
        return states[0]
    if kind == "lasttoken":
        return states[-1]
    return states.amax(0) if kind == "max" else states.mean(0)
