"""Make models smaller: quantization today."""

from compressor.load import load
from compressor.quantize import Quantize, quantize

__all__ = ["Quantize", "load", "quantize"]
