"""llama.cpp's blocks of 256 or 32 weights, byte for byte as GGUF files have them, in safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.quant.block_types import BLOCK_TYPES, BlockType
from calib.quant.floating import exponents, nibbles_of_float4
from calib.quant.grid import as_stored
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.storage.compressed_tensors import compressed_tensors_config
from compressor.storage.description import ANY_GPU, WEIGHTS_ALONE, FormatDescription
from compressor.storage.quantized_linear import Rounded

# Of codes, from the lowest bits on: how many bits a plane has, and how many neighbours lie in bytes that follow each
# other, before the next ones fill these bytes' higher bits.
_PLANES = {
    "q2_k": ((2, 32),), "q3_k": ((2, 32), (1, 32)), "q4_k": ((4, 32),), "q5_k": ((4, 32), (1, 32)),
    "q6_k": ((4, 64), (2, 32)), "iq4_xs": ((4, 16),), "iq4_nl": ((4, 16),), "q4_0": ((4, 16),),
    "q5_0": ((4, 16), (1, 1)), "q8_0": ((8, 1),), "q4_1": ((4, 16),), "q5_1": ((4, 16), (1, 1)),
}  # fmt: skip
# What a block holds, in order: d and m, numbers in half precision; s, whole numbers of groups; 0 and 1, planes.
_ORDER = {
    "q2_k": "s0dm", "q3_k": "10sd", "q4_k": "dms0", "q5_k": "dms10", "q6_k": "01sd", "iq4_xs": "ds0", "iq4_nl": "d0",
    "q4_0": "d0", "q5_0": "d10", "q8_0": "d0", "q4_1": "dm0", "q5_1": "dm10",
}  # fmt: skip
_WHOLE_BYTES = {"q2_k": 16, "q3_k": 12, "q4_k": 12, "q5_k": 12, "q6_k": 16, "iq4_xs": 6}


def pack_bits(numbers: Tensor, bits: int, run: int) -> Tensor:
    """Numbers (..., n) uint8 of so many bits -> (..., n * bits / 8): `run` neighbours lie in bytes that follow each
    other, and the next ones in these bytes' higher bits."""
    parts = numbers.unflatten(-1, (-1, 8 // bits, run))
    made = torch.zeros_like(parts[..., 0, :])
    for i in range(8 // bits):
        made |= parts[..., i, :] << bits * i
    return made.flatten(-2)


def unpack_bits(packed: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `pack_bits`."""
    parts = packed.unflatten(-1, (-1, run))
    return torch.stack([parts >> bits * i & 2**bits - 1 for i in range(8 // bits)], -2).flatten(-3)


def pack_blocks(rounded: Rounded) -> Tensor:
    """Bytes (out, b) of a linear whose grid is a block type's."""
    name = rounded.grid.scales
    kind = BLOCK_TYPES[name]
    codes = rounded.codes.unflatten(1, (-1, kind.weights))
    numbers = (codes.to(torch.int16) - (0 if name == "q8_0" else kind.grid.low)).to(torch.uint8)
    fields, shift = dict[str, Tensor](), 0
    for i, (bits, run) in enumerate(_PLANES[name]):
        fields[str(i)] = pack_bits(numbers >> shift & 2**bits - 1, bits, run)
        shift += bits
    least = (rounded.zero - kind.grid.low) * rounded.scale if kind.least else None
    fields["d"], scales = _apart(rounded.scale, kind)
    if least is not None:
        fields["m"], leasts = _apart(least if kind.top else -least, kind)  # of 32 the least value itself is kept
    if kind.top:
        fields["s"] = _pack_whole(name, scales, leasts if least is not None else None)
    return torch.cat([fields[part] for part in _ORDER[name]], -1).flatten(1)


def _apart(found: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Scales, or least values (out, n/g), of a block type -> the number in half precision of each block, as bytes
    (out, n/w, 2), and the whole numbers (out, n/w, w/g) that they are of it."""
    together = found.float().unflatten(1, (-1, kind.weights // (kind.grid.group or 1)))
    if not kind.top:
        return together.half().contiguous().view(torch.uint8), together
    unit = (together.abs().amax(-1, keepdim=True) / kind.top).half().clamp(min=2.0**-24)
    whole = (together / unit.float()).round().to(torch.int16)
    return unit.contiguous().view(torch.uint8), whole


def _pack_whole(name: str, scales: Tensor, leasts: Tensor | None) -> Tensor:
    if name == "q6_k":
        return scales.to(torch.int8).view(torch.uint8)
    if name in ("q3_k", "iq4_xs"):
        numbers = (scales + 32).to(torch.uint8)
        if name == "q3_k":
            return torch.cat([pack_bits(numbers & 15, 4, 8), pack_bits(numbers >> 4, 2, 4)], -1)
        return torch.cat([pack_bits(numbers >> 4, 2, 1), pack_bits(numbers & 15, 4, 1)], -1)
    assert leasts is not None
    c, m = scales.to(torch.uint8), leasts.to(torch.uint8)
    if name == "q2_k":
        return c | m << 4
    (c_first, c_last), (m_first, m_last) = (x.chunk(2, -1) for x in (c, m))
    return torch.cat([c_first | c_last >> 4 << 6, m_first | m_last >> 4 << 6, c_last & 15 | (m_last & 15) << 4], -1)


def _unpack_whole(name: str, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack_whole`; least values, where there are none, mean nothing."""
    if name == "q6_k":
        return packed.view(torch.int8), packed
    if name == "q3_k":
        return _signed(unpack_bits(packed[..., :8], 4, 8), unpack_bits(packed[..., 8:], 2, 4)), packed
    if name == "iq4_xs":
        return _signed(unpack_bits(packed[..., 2:], 4, 1), unpack_bits(packed[..., :2], 2, 1)), packed
    if name == "q2_k":
        return packed & 15, packed >> 4
    first, second, last = packed.chunk(3, -1)
    c = torch.cat([first & 63, last & 15 | first >> 6 << 4], -1)
    return c, torch.cat([second & 63, last >> 4 | second >> 6 << 4], -1)


def _signed(low: Tensor, high: Tensor) -> Tensor:
    return (low | high << 4).to(torch.int8) - 32


def unpack_blocks(blocks: Tensor, kind: str) -> Rounded:
    """The inverse of `pack_blocks`: bytes (out, b) of a block type, by its name."""
    of = BLOCK_TYPES[kind]
    planes = _PLANES[kind]
    sizes = {"d": 2, "m": 2, "s": _WHOLE_BYTES.get(kind, 0)}
    sizes |= {str(i): of.weights * bits // 8 for i, (bits, _) in enumerate(planes)}
    parts = blocks.unflatten(1, (-1, of.bytes)).split([sizes[part] for part in _ORDER[kind]], -1)
    fields = {part: x.contiguous() for part, x in zip(_ORDER[kind], parts, strict=True)}
    numbers, shift = torch.zeros((), dtype=torch.uint8), 0
    for i, (bits, run) in enumerate(planes):
        numbers = numbers | unpack_bits(fields[str(i)], bits, run) << shift
        shift += bits
    codes = numbers.view(torch.int8) if kind == "q8_0" else (numbers.to(torch.int16) + of.grid.low).to(torch.int8)
    scale, least = (fields[part].view(torch.half).float() if part in fields else None for part in "dm")
    assert scale is not None
    if of.top:
        c, m = _unpack_whole(kind, fields["s"])
        scale, least = scale * c.float(), None if least is None else least * m.float()
    elif least is not None:
        least = -least
    scale = scale.flatten(1)
    zero = torch.zeros_like(scale) if least is None else of.grid.low + least.flatten(1) / scale
    return Rounded(codes.flatten(1), scale, zero, of.grid)


# Bits of a weight in types that a quantized model can be stored in, scales included.
GGUF_TYPES = {name.upper(): kind.bits_per_weight for name, kind in BLOCK_TYPES.items()} | {"MXFP4": 4.25}
_ALIKE = {Grid(4, True, 32): "q4_0", Grid(5, True, 32): "q5_0", Grid(8, True, 32): "q8_0"}


def gguf_type(grid: Grid) -> str | None:
    """GGUF's name of the type that holds a grid's codes as they are; None where there is none."""
    if grid.kind == "mxfp4":
        return "MXFP4"
    name = grid.scales if grid.is_block_type else _ALIKE.get(grid)
    return name and name.upper()


def packed(rounded: Rounded) -> Tensor:
    """Bytes (out, b) of a linear in the type that `gguf_type` names; scales that are not in half precision become
    that."""
    if rounded.grid.kind == "mxfp4":
        nibbles = nibbles_of_float4(rounded.grid.split(rounded.codes))
        return torch.cat([exponents(rounded.scale)[..., None], pack_bits(nibbles, 4, 16)], -1).flatten(1)
    if not rounded.grid.is_block_type:
        half = as_stored(rounded.scale, torch.float16)
        rounded = replace(rounded, scale=half, grid=BLOCK_TYPES[_ALIKE[rounded.grid]].grid)
    return pack_blocks(rounded)


class GgufBlocks:
    """The codec of llama.cpp's block types, which parewell alone reads in safetensors: `export --to gguf` stores them
    where llama.cpp does."""

    descriptions: ClassVar = {
        "GGUF blocks": FormatDescription(
            title="GGUF's blocks in safetensors",
            contents="what `--scheme q4_k` and the like become without `--format gguf`, which holds the same bytes",
            bits="2 to 8, levels of the type",
            groups="those of the type",
            zero_points=True,
            mixed=True,
            activations=WEIGHTS_ALONE,
            tables="the same types, tied too; else 16 bits",
            readers=("parewell.load",),
            hardware=ANY_GPU,
            bits_per_weight="those of GGUF",
        )
    }

    def encode(self, name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
        """Lay out a linear as blocks; see `Codec`."""
        return {f"{name}.weight_blocks": pack_blocks(rounded)}

    def names(self, name: str, scheme: Scheme) -> list[str]:
        """Names on disk of a linear's tensors; see `Codec`."""
        return [f"{name}.weight_blocks"]

    def shapes(self, name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shapes on disk of a linear's tensors, and which are codes; see `Codec`."""
        kind = BLOCK_TYPES[scheme.grid(name).scales]
        return {f"{name}.weight_blocks": ((shape[0], shape[1] // kind.weights * kind.bytes), True)}

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
        """Read a linear's codes and scales back; see `Codec`.  Raises ValueError where a scale is no number."""
        rounded = unpack_blocks(stored[f"{name}.weight_blocks"], scheme.grid(name).scales)
        if not (rounded.scale.isfinite().all() and rounded.zero.isfinite().all()):
            raise ValueError("NaN")
        return rounded

    def config(self, scheme: Scheme, *, plain: bool, dtype: str, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of config.json, which other readers refuse; see `Codec`."""
        return compressed_tensors_config(replace(scheme, mixed=()), plain=False, ignore=ignore)
