"""Become the model that never saw the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.runtime.lazy_imports import import_lazily

if TYPE_CHECKING:
    from unlearn.datamodels.attribute import attribute
    from unlearn.datamodels.attribution_options import Attribute
    from unlearn.options import Audit, Unlearn
    from unlearn.unlearn import unlearn

__all__ = ["Attribute", "Audit", "Unlearn", "attribute", "unlearn"]

import_lazily(
    __name__,
    {
        "Attribute": "unlearn.datamodels.attribution_options", "Audit": "unlearn.options", "Unlearn": "unlearn.options",
        "attribute": "unlearn.datamodels.attribute", "unlearn": "unlearn.unlearn",
    },
)  # fmt: skip
