"""Which format a quantization scheme is stored in."""

from __future__ import annotations

from collections.abc import Iterable

from calib.quant.scheme import Scheme
from compressor.storage.bitsandbytes import BitsAndBytes
from compressor.storage.codec import Codec
from compressor.storage.compressed_tensors import CompressedTensors
from compressor.storage.gguf_blocks import GgufBlocks

# To add a storage format: a class with the methods of `Codec`, its place in `codec_of`, and here.
CODECS: dict[str, Codec] = {
    "compressed-tensors": CompressedTensors(), "bitsandbytes": BitsAndBytes(), "GGUF blocks": GgufBlocks(),
}  # fmt: skip


def codec_of(scheme: Scheme) -> Codec:
    """compressed-tensors; bitsandbytes for NF4 and FP4, whose levels are not evenly spaced; GGUF's blocks."""
    return CODECS[codec_name(scheme)]


def codec_name(scheme: Scheme) -> str:
    """The key of CODECS that a scheme is stored by."""
    if scheme.weights.is_block_type:
        return "GGUF blocks"
    return "bitsandbytes" if scheme.table_name else "compressed-tensors"


def linears_in(names: Iterable[str], scheme: Scheme) -> list[str]:
    """Find the linears that are stored in few bits, by the names of all tensors that are stored."""
    *_, scales = codec_of(scheme).names("", scheme)[:2]  # of the first, a weight that is no code can have the name
    return [name.removesuffix(scales) for name in names if name.endswith(scales)]
