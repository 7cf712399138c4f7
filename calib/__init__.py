"""The calibration engine: text in, a model walked block by block, statistics and gradients out."""

from __future__ import annotations


class BadInput(ValueError):
    """What the user gave cannot be used.  One line: what is wrong, where, what to do about it."""
