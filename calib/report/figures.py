"""What a report's figures say, whichever job they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def distance(figures: Mapping[str, Any]) -> float:
    """Tell how far a model is from its reference by its figures: the KL in nats, or of embeddings 1 - cosine."""
    return float(1 - figures["cosine"] if "cosine" in figures else figures["kl"])
