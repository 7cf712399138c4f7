"""The calibration engine: text in, a model walked block by block, statistics and gradients out."""

from __future__ import annotations


class BadInput(ValueError):
    """What the user gave cannot be used.  One line: what is wrong, where, what to do about it."""


class Failed(RuntimeError):
    """A job cannot go on, and would come to the same point again."""


class NoSpace(OSError):
    """The disk is full; the job can go on once there is room."""
