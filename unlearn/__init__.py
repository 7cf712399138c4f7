"""Become the model that never saw the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.lazy import imported_when_used

if TYPE_CHECKING:
    from unlearn.unlearn import unlearn
    from unlearn.wanted import Audit, Unlearn

__all__ = ["Audit", "Unlearn", "unlearn"]

imported_when_used(
    __name__, {"Audit": "unlearn.wanted", "Unlearn": "unlearn.wanted", "unlearn": "unlearn.unlearn"}
)  # fmt: skip
