"""Names of devices and precisions that options choose among, importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options are declared before anything heavy is imported
    pass


DEVICES = ("auto", "cpu", "cuda")


PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw8bit")
BALANCES = ("none", "gradient", "recap")  # how several losses are weighed against each other
