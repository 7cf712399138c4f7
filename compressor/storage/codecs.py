"""Which format a quantization scheme is stored in."""

from __future__ import annotations

from collections.abc import Iterable

from calib.quant.scheme import Scheme
from compressor.storage.bitsandbytes import BitsAndBytes
from compressor.storage.codec import Codec
from compressor.storage.compressed_tensors import CompressedTensors
from compressor.storage.gguf_blocks import GgufBlocks


def codec_of(scheme: Scheme) -> Codec:
    """compressed-tensors; bitsandbytes for NF4 and FP4, whose levels are not evenly spaced; GGUF's blocks."""
    if scheme.weights.is_block_type:
        return GgufBlocks()
    return BitsAndBytes() if scheme.table_name else CompressedTensors()


def linears_in(names: Iterable[str], scheme: Scheme) -> list[str]:
    """Find the linears that are stored in few bits, by the names of all tensors that are stored."""
    *_, scales = codec_of(scheme).names("", scheme)[:2]  # of the first, a weight that is no code can have the name
    return [name.removesuffix(scales) for name in names if name.endswith(scales)]
