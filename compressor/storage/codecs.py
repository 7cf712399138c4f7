"""Which format a quantization scheme is stored in."""

from __future__ import annotations

from collections.abc import Iterable

from calib.quant.scheme import Scheme
from compressor.storage.bitsandbytes import BitsAndBytes
from compressor.storage.codec import Codec
from compressor.storage.compressed_tensors import CompressedTensors


def codec_of(scheme: Scheme) -> Codec:
    """compressed-tensors, or bitsandbytes where the levels of a grid are not evenly spaced (NF4, FP4)."""
    return BitsAndBytes() if scheme.table_name else CompressedTensors()


def linears_in(names: Iterable[str], scheme: Scheme) -> list[str]:
    """Find the linears that are stored in few bits, by the names of all tensors that are stored."""
    scales = codec_of(scheme).names("", scheme)[1]
    return [name.removesuffix(scales) for name in names if name.endswith(scales)]
