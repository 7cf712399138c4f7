"""What a quantized model weighs, before it is written: by its parts, and by what becomes of embedding and head."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.jobs.cost import OF_STEP, OF_TENSOR
from calib.model.companions import companions
from calib.probe.find import found_parts
from calib.quant.scheme import Scheme
from compressor.quantization.embedding.tables import with_tables
from compressor.quantization.options import NO_TABLE
from compressor.storage.codecs import codec_of
from compressor.storage.key_value_scales import scale_dtype, scale_names, scale_shape


def bytes_in_out(stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool, mean_bits: float | None = None) -> int:
    """Bytes of the output's tensors; see `parts_in_out`."""
    return sum(parts_in_out(stream, scheme, untied=untied, mean_bits=mean_bits).values())


def parts_in_out(
    stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool, mean_bits: float | None = None
) -> dict[str, int]:
    """Bytes of each part of the output: linears, embedding, head, and all else.

    Codes count with their scales and zero points, everything else as it is.

    Args:
        stream: the model.
        scheme: in which it is stored; None: there are no codes.
        untied: whether embedding and head, which were one table, are stored as two for a rotation.
        mean_bits: of a linear's code, or of a weight in its block type, where bits are allocated, instead of the
            scheme's.
    """
    keys = 0
    if scheme is not None and (scales := scale_names(stream, scheme)):
        keys = len(scales) * math.prod(scale_shape(stream, scheme)) * scale_dtype(stream).itemsize
    linear, found = 0.0, {"linears": 0, "embedding": 0, "head": 0, "other": 0}
    shapes, tables = _linear_shapes(stream), {} if scheme is None else scheme.tables
    ends = {stream.entry(name): "embedding" for name in stream.walk.entering}
    ends |= {stream.entry(name): "head" for name in stream.walk.leaving if name not in stream.tied}
    for name, entry in stream.weights.entries.items():
        matrix, is_table = name.removesuffix(".weight"), len(entry.shape) == 2  # not a norm on the way
        part = "linears" if name in shapes or matrix in stream.ignored else ends.get(entry, "other")
        if scheme is not None and name in shapes:
            weights, size = math.prod(shapes[name]), stored_bytes(matrix, shapes[name], scheme, entry.dtype)
            if mean_bits is not None and scheme.weights.is_block_type:
                size = weights * mean_bits / 8
            elif mean_bits is not None:
                size += weights * (mean_bits - scheme.weights.bits) / 8
            linear += size
        elif scheme is not None and matrix in tables:
            found[part] += int(stored_bytes(matrix, (entry.shape[0], entry.shape[1]), scheme, entry.dtype))
        else:
            found[part if is_table or part == "linears" else "other"] += entry.bytes
    if scheme is not None and stream.tied and scheme.head is not None:
        table = stream.entry(stream.head[0])
        found["head"] = int(stored_bytes(scheme.head[0], (table.shape[0], table.shape[1]), scheme, table.dtype))
    elif untied and stream.tied:
        found["head"] = sum(stream.entry(first).bytes for first in stream.tied.values())
    return found | {"linears": found["linears"] + int(linear), "other": found["other"] + keys}


def stored_bytes(name: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> float:
    """Bytes on disk of a matrix (out, in) in codes, with its scales, which are kept in `dtype`, and zero points."""
    if scheme.table_name:
        return math.prod(shape) * scheme.bits_per_weight(name, shape[1], dtype.itemsize * 8) / 8
    grid = scheme.grid(name)
    scale, packed = dtype.itemsize if grid.scales in ("any", "tensor") else 1, 1 if grid.is_float4 else 4
    each = {"weight": 1, "weight_blocks": 1, "weight_packed": packed, "weight_scale": scale, "weight_shape": 8,
            "input_scale": scale}  # fmt: skip
    sizes = {f"{name}.{part}": size for part, size in each.items()}  # else words
    parts = codec_of(scheme).shapes(name, shape, scheme)
    return sum(math.prod(size) * sizes.get(part, 4) for part, (size, _) in parts.items())


def _linear_shapes(stream: BlockwiseModel) -> dict[str, tuple[int, int]]:
    """Names on disk of the weights that are quantized -> (out, in)."""
    return {f"{one.name}.weight": one.shape for i in range(stream.layers) for one in stream.linears(i)}


DESCRIBED, OF_LINEAR, OF_PART = 40_000, 2_200, 2_600  # bytes of the report, its page and the recipe


def bytes_beside(
    folder: Path, stream: BlockwiseModel, scheme: Scheme | None, *, steps: int, parts: int, rotated_keys: bool
) -> int:
    """About what OUT holds beside its tensors: files of the model in `folder` that go with it, headers, config, recipe
    and report, those of a job of so many steps and of so many parts with bits of their own."""
    linears = {name.removesuffix(".weight") for name in _linear_shapes(stream)}
    names = [] if scheme is None or scheme.head is None or not stream.tied else codec_of(scheme).names("head", scheme)
    names += [] if scheme is None else scale_names(stream, scheme)
    for name in stream.expected:
        linear = name.removesuffix(".weight")
        coded = scheme is not None and (linear in linears or linear in scheme.tables)
        names += codec_of(scheme).names(linear, scheme) if scheme is not None and coded else [name]
    files = [Path("config.json"), *companions(folder)]
    keys = 0
    if rotated_keys:
        layers = [layer for found in found_parts(stream).blocks for layer in found.attention]
        keys = sum(layer.kv_heads * layer.width**2 * 4 for layer in layers)
    described = DESCRIBED + OF_LINEAR * len(linears) + OF_STEP * steps + OF_PART * parts
    return (
        sum((folder / file).stat().st_size for file in files)
        + sum(len(n) + OF_TENSOR for n in names)
        + keys
        + described
    )


def sizes_of_choices(
    stream: BlockwiseModel, scheme: Scheme | None, *, rotates: bool, mean_bits: float | None = None
) -> dict[str, int]:
    """Bytes of the output's tensors by what becomes of embedding and head, as options ask for it; `rotates`: whether
    the model admits a rotation; `scheme` and `mean_bits` as `parts_in_out` takes them."""
    plain = None if scheme is None else replace(scheme, embedding=None, head=None)

    def size(scheme: Scheme | None, *, untied: bool = False) -> int:
        return bytes_in_out(stream, scheme, untied=untied, mean_bits=mean_bits)

    if plain is not None and plain.mixture:  # whose types of embedding and head are what nobody has to ask for
        return {"--embedding none --lm-head none": size(plain)}
    found = {"--tied keep": size(plain)} if stream.tied else {}
    found |= {"--tied untie": size(plain, untied=True)} if stream.tied and rotates else {}
    if plain is None or plain.table_name or plain.weights.scales in ("e8m0", "e4m3") or stream.encoder_blocks:
        return found
    eight = "q8_0" if plain.weights.is_block_type else "w8"
    if not stream.tied:
        found["--embedding none"] = size(plain)
    for head in (NO_TABLE, eight):
        try:
            rounded = with_tables(plain, stream, eight, head)
        except BadInput:  # such a model's tables stay in 16 bits
            continue
        one = "--tied keep " if stream.tied and head == NO_TABLE else ""
        found[f"{one}--embedding {eight}{f' --lm-head {head}' if head != NO_TABLE else ''}"] = size(rounded)
    return found
