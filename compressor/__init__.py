"""Make models smaller: quantization today."""

from compressor.evaluate import Evaluate, evaluate
from compressor.load import load
from compressor.quantize import Quantize, quantize

__all__ = ["Evaluate", "Quantize", "evaluate", "load", "quantize"]
