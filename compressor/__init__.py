"""Make models smaller: quantization and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.runtime.lazy_imports import import_lazily

if TYPE_CHECKING:
    from compressor.distillation.distill import distill
    from compressor.distillation.options import Distill
    from compressor.engine.evaluate import evaluate
    from compressor.engine.load import load
    from compressor.engine.options import Evaluate, EvaluateTasks
    from compressor.engine.task_scores import evaluate_tasks
    from compressor.exporters.export import export
    from compressor.exporters.options import Export
    from compressor.merging.options import Soup
    from compressor.merging.soup import soup
    from compressor.quantization.options import Quantize
    from compressor.quantization.quantize import quantize

__all__ = [
    "Distill", "Evaluate", "EvaluateTasks", "Export", "Quantize", "Soup", "distill", "evaluate", "evaluate_tasks",
    "export", "load", "quantize", "soup",
]  # fmt: skip

import_lazily(
    __name__,
    {
        "Distill": "compressor.distillation.options",
        "Evaluate": "compressor.engine.options",
        "EvaluateTasks": "compressor.engine.options",
        "Export": "compressor.exporters.options",
        "Quantize": "compressor.quantization.options",
        "Soup": "compressor.merging.options",
        "distill": "compressor.distillation.distill",
        "evaluate": "compressor.engine.evaluate",
        "evaluate_tasks": "compressor.engine.task_scores",
        "export": "compressor.exporters.export",
        "load": "compressor.engine.load",
        "quantize": "compressor.quantization.quantize",
        "soup": "compressor.merging.soup",
    },
)
