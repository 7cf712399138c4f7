"""Make models smaller: quantization and distillation."""

from compressor.distill import distill
from compressor.evaluate import Evaluate, evaluate
from compressor.export import Export, export
from compressor.load import load
from compressor.quantize import quantize
from compressor.wanted import Distill, Quantize

__all__ = ["Distill", "Evaluate", "Export", "Quantize", "distill", "evaluate", "export", "load", "quantize"]
