"""Become the model that never saw the data."""

from __future__ import annotations

from unlearn.unlearn import unlearn
from unlearn.wanted import Unlearn

__all__ = ["Unlearn", "unlearn"]
