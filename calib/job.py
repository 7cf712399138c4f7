"""What every job's options share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch

from calib import BadInput

DEVICES = ("auto", "cpu", "cuda")


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A field of a job's dataclass: its default, and what the command line says of it."""
    return field(default=default, metadata={"help": help} | ({"choices": tuple(choices)} if choices else {}))


def pick_device(name: str) -> torch.device:
    """One of DEVICES; auto takes CUDA if there is one."""
    if name not in DEVICES:
        raise BadInput(f"device '{name}' is unknown; choose from {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
