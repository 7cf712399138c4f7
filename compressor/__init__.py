"""Make models smaller: quantization and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.lazy import imported_when_used

if TYPE_CHECKING:
    from compressor.distill import distill
    from compressor.evaluate import evaluate
    from compressor.export import export
    from compressor.load import load
    from compressor.quantize import quantize
    from compressor.wanted import Distill, Evaluate, Export, Quantize

__all__ = ["Distill", "Evaluate", "Export", "Quantize", "distill", "evaluate", "export", "load", "quantize"]

imported_when_used(
    __name__, {name: f"compressor.{name if name.islower() else 'wanted'}" for name in __all__}
)  # fmt: skip
