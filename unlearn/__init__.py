"""Become the model that never saw the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.runtime.lazy_imports import import_lazily

if TYPE_CHECKING:
    from unlearn.datamodels.attribute import attribute
    from unlearn.options.attribution import Attribute
    from unlearn.options.audit import Audit
    from unlearn.options.unlearning import Unlearn
    from unlearn.unlearn import unlearn

__all__ = ["Attribute", "Audit", "Unlearn", "attribute", "unlearn"]

import_lazily(
    __name__,
    {
        "Attribute": "unlearn.options.attribution", "Audit": "unlearn.options.audit",
        "Unlearn": "unlearn.options.unlearning", "attribute": "unlearn.datamodels.attribute",
        "unlearn": "unlearn.unlearn",
    },
)  # fmt: skip
