"""Make models smaller: quantization and distillation."""

from compressor.distill import distill
from compressor.evaluate import Evaluate, evaluate
from compressor.load import load
from compressor.quantize import Quantize, quantize
from compressor.wanted import Distill

__all__ = ["Distill", "Evaluate", "Quantize", "distill", "evaluate", "load", "quantize"]
