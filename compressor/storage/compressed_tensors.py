"""compressed-tensors: packed integers, bytes, FP8 or FP4, scales beside them, a scheme in config.json.

Written with the keys that old and new readers share; `transformers` (with the compressed-tensors package) and vLLM
read it. A checkpoint that needs more than its weights at run time says a format that no reader knows, in each group and
above them: they would otherwise drop online rotations and answer wrongly without a word. A key of its own in a group
would not do, as vLLM and SGLang look at those alone that they know; and as vLLM picks FP4, MX and W4AFP8 by their
numbers, whatever the format, an unknown key stands among these: all read them with the library's own strict class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib.quant.floating import (
    codes_of_float8,
    exponents,
    float8_of_codes,
    of_exponents,
    pack_float4,
    unpack_float4,
)
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.storage.description import FormatDescription
from compressor.storage.quantized_linear import Rounded

REFUSED_BY_OTHERS = "load_with_parewell_compressor_load"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, n) int8 -> int32 words (rows, ceil(n * bits / 32)).

    Code i, plus 2^(bits-1), fills bits [i * bits, (i + 1) * bits) of a little-endian stream of words; codes of 3, 5, 6
    or 7 bits straddle words.
    """
    unsigned = (codes.cpu().to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).numpy()
    planes = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    stream = planes.reshape(len(unsigned), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view("<i4").astype(np.int32))


def unpack(words: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack`: words (rows, n') -> codes (rows, width) int8."""
    stream = np.unpackbits(words.contiguous().numpy().astype("<i4").view(np.uint8), axis=-1, bitorder="little")
    planes = stream[:, : width * bits].reshape(len(words), width, bits)
    unsigned = np.packbits(planes, axis=-1, bitorder="little")[..., 0]
    return (torch.from_numpy(unsigned).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def is_int_quantized(scheme: Scheme) -> bool:
    """Whether codes are stored as bytes: what readers expect of 8-bit weights with quantized activations only."""
    eight = scheme.weights.bits == 8 and not scheme.weights.is_float
    return eight and scheme.activations is not None and not scheme.activations.is_float and not scheme.mixed


def _is_one_tensor(scheme: Scheme) -> bool:
    """Whether a weight is stored as a tensor of its shape, of bytes or of FP8."""
    return scheme.weights.is_float8 or is_int_quantized(scheme)


def _form(scheme: Scheme) -> str:
    """What the library calls the layout."""
    forms = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
             "mxfp8": "mxfp8-quantized"}  # fmt: skip
    if scheme.weights.is_float:
        return forms[scheme.weights.kind]
    return "int-quantized" if is_int_quantized(scheme) else "pack-quantized"


_TABLES = "16 bits, or 2 to 8 bits in groups or by row"
_TRANSFORMERS = "transformers (with the compressed-tensors package)"
_IN_BFLOAT16 = "transformers (with the compressed-tensors package, in bfloat16)"
_NVFP4 = FormatDescription(
    title="compressed-tensors, nvfp4-pack-quantized",
    contents="FP4 (E2M1), FP8 scales",
    bits="4",
    groups="16",
    zero_points=False,
    mixed=False,
    activations="16, NVFP4; keys and values 16, FP8",
    tables="16 bits",
    readers=(_IN_BFLOAT16, "vLLM", "parewell.load"),
    hardware="GPUs from compute capability 10.0 on, from 7.5 on with activations in 16 bits; CPUs",
    bits_per_weight="b + 8/g",
)
_DESCRIPTIONS = {
    "pack-quantized": FormatDescription(
        title="compressed-tensors, pack-quantized",
        contents="integers in words",
        bits="2 to 8",
        groups="any that divide rows, channel",
        zero_points=True,
        mixed=True,
        activations="16, FP8 (of w4afp8), 2 to 8; keys and values 16, FP8",
        tables=_TABLES,
        readers=(
            "transformers (with the compressed-tensors package; zero points with dequantize=True)",
            "vLLM (zero points of 4 or 8 bits; activations of 16, 8 and 4 bits, FP8 beside 4 bits)",
            "parewell.load",
        ),
        hardware="GPUs from compute capability 7.5 on, FP8 activations on 9.0 alone; CPUs",
        bits_per_weight="b + 16/g",
        zero_bits="b/g",
    ),
    "int-quantized": FormatDescription(
        title="compressed-tensors, int-quantized",
        contents="bytes",
        bits="8",
        groups="any that divide rows, channel",
        zero_points=False,
        mixed=False,
        activations="2 to 8; keys and values 16, FP8",
        tables=_TABLES,
        readers=(_TRANSFORMERS, "vLLM (channel, activations of 8 bits)", "parewell.load"),
        hardware="GPUs from compute capability 7.5 on; CPUs",
        bits_per_weight="b + 16/g",
    ),
    "float-quantized": FormatDescription(
        title="compressed-tensors, float-quantized",
        contents="FP8 (E4M3)",
        bits="8",
        groups="channel, blocks of 128 x 128, whole weight",
        zero_points=False,
        mixed=False,
        activations="16, FP8; keys and values 16, FP8",
        tables=_TABLES,
        readers=(_TRANSFORMERS, "vLLM", "parewell.load"),
        hardware="GPUs from compute capability 8.9 on, from 7.5 on with activations in 16 bits; CPUs",
        bits_per_weight="b + 16/g",
    ),
    "nvfp4-pack-quantized": _NVFP4,
    "mxfp4-pack-quantized": replace(
        _NVFP4,
        title="compressed-tensors, mxfp4-pack-quantized",
        contents="FP4 (E2M1), powers of two as scales",
        groups="32",
        activations="16, MXFP4; keys and values 16, FP8",
        hardware="GPUs from compute capability 10.0 on, from 8.0 on with activations in 16 bits; CPUs",
    ),
    "mxfp8-quantized": replace(
        _NVFP4,
        title="compressed-tensors, mxfp8-quantized",
        contents="FP8 (E4M3), powers of two as scales",
        bits="8",
        groups="32",
        activations="16, MXFP8; keys and values 16, FP8",
    ),
}  # fmt: skip


class CompressedTensors:
    """The codec of compressed-tensors: packed integers, bytes where readers expect those, or FP8."""

    descriptions: ClassVar = _DESCRIPTIONS

    def encode(self, name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
        """Lay out a linear's packed codes, scales and zero points; see `Codec`."""
        scheme = scheme.of(name)
        grid, scale = rounded.grid, rounded.scale
        if grid.is_float:
            stored = {f"{name}.weight_scale": _stored_scale(rounded)}
            if grid.scales == "e4m3":
                assert rounded.outer is not None
                stored[f"{name}.weight_global_scale"] = rounded.outer.reciprocal()  # which readers divide by
            if rounded.inputs is not None and grid.scales == "tensor":
                stored[f"{name}.input_scale"] = rounded.inputs.clone()
            elif rounded.inputs is not None:
                stored[f"{name}.input_global_scale"] = rounded.inputs.reciprocal()
            if grid.is_float8:
                return stored | {f"{name}.weight": float8_of_codes(rounded.codes)}
            return stored | {f"{name}.weight_packed": pack_float4(rounded.codes)}
        if is_int_quantized(scheme):
            return {f"{name}.weight": rounded.codes, f"{name}.weight_scale": scale}
        stored = {
            f"{name}.weight_packed": pack(rounded.codes, grid.bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
        }
        if not grid.symmetric:
            stored[f"{name}.weight_zero_point"] = pack(rounded.zero.to(torch.int8).mT, grid.bits).mT.contiguous()
        return stored

    def names(self, name: str, scheme: Scheme) -> list[str]:
        """Names on disk of a linear's tensors; see `Codec`."""
        scheme = scheme.of(name)
        if _is_one_tensor(scheme):
            return [f"{name}.weight", f"{name}.weight_scale", *_input_scale(name, scheme)]
        if scheme.weights.is_float4:
            return [f"{name}.weight_packed", f"{name}.weight_scale", *_outer_names(name, scheme)]
        zero = [] if scheme.weights.symmetric else [f"{name}.weight_zero_point"]
        return [f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape", *zero]

    def shapes(self, name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shapes on disk of a linear's tensors, and which are codes; see `Codec`."""
        scheme = scheme.of(name)
        (out, width), bits = shape, scheme.grid(name).bits
        groups = scheme.weights.groups(width)
        rows = -(-out // scheme.weights.rows)
        whole = scheme.weights.scales == "e8m0"
        one = (1,) if scheme.weights.scales == "tensor" else (rows, groups)
        stored: dict[str, tuple[tuple[int, ...], bool]] = {f"{name}.weight_scale": (one, whole)}
        stored |= dict.fromkeys(_input_scale(name, scheme), ((1,), False))
        if scheme.weights.is_float4:
            outer = dict.fromkeys(_outer_names(name, scheme), ((1,), False))
            return stored | {f"{name}.weight_packed": ((out, width // 2), True), **outer}
        if _is_one_tensor(scheme):
            return stored | {f"{name}.weight": ((out, width), not scheme.weights.is_float)}
        stored |= {f"{name}.weight_packed": ((out, -(-width * bits // 32)), True), f"{name}.weight_shape": ((2,), True)}
        if not scheme.weights.symmetric:
            stored[f"{name}.weight_zero_point"] = ((-(-out * bits // 32), groups), True)
        return stored

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
        """Read a linear's codes, scales and zero points back; see `Codec`."""
        scheme, grid = scheme.of(name), scheme.grid(name)
        scale = stored[f"{name}.weight_scale"]
        if grid.is_float:
            return _float_of(name, stored, grid)
        if is_int_quantized(scheme):
            return Rounded(stored[f"{name}.weight"], scale, torch.zeros(scale.shape), grid)
        out, width = stored[f"{name}.weight_shape"].tolist()
        codes = unpack(stored[f"{name}.weight_packed"], grid.bits, width)
        if grid.symmetric:
            return Rounded(codes, scale, torch.zeros(scale.shape), grid)
        zero = unpack(stored[f"{name}.weight_zero_point"].mT, grid.bits, out).mT
        return Rounded(codes, scale, zero.float(), grid)

    def config(
        self, scheme: Scheme, *, plain: bool, dtype: str = "", ignore: Sequence[str] = ("lm_head",)
    ) -> dict[str, Any]:
        """The quantization_config of config.json; see `Codec`."""
        return compressed_tensors_config(scheme, plain=plain, ignore=ignore)


def _outer_names(name: str, scheme: Scheme) -> list[str]:
    """Names on disk of what scales are multiples of: a weight's, and its inputs'."""
    if scheme.weights.scales != "e4m3":
        return []
    inputs = [f"{name}.input_global_scale"] if scheme.has_fixed_inputs else []
    return [f"{name}.weight_global_scale", *inputs]


def _input_scale(name: str, scheme: Scheme) -> list[str]:
    """The name on disk of the one scale of a linear's inputs, where it has one."""
    return [f"{name}.input_scale"] if scheme.weights.scales == "tensor" and scheme.has_fixed_inputs else []


def input_scales(
    names: Sequence[str], scheme: Scheme, read: Callable[[list[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read, for linears by their `names`, the scale of their inputs, or what scales of these are multiples of, where
    calibration found it; none where it did not."""
    if not scheme.has_fixed_inputs:
        return {}
    if scheme.weights.scales == "tensor":
        stored = read([f"{name}.input_scale" for name in names])
        return {name: stored[f"{name}.input_scale"].float() for name in names}
    stored = read([f"{name}.input_global_scale" for name in names])
    return {name: stored[f"{name}.input_global_scale"].float().reciprocal() for name in names}


def _stored_scale(rounded: Rounded) -> Tensor:
    """Scales of floating point as they are kept: powers of two as bytes, FP8 ones without the outer scale."""
    grid, scale = rounded.grid, rounded.scale
    if grid.scales == "e8m0":
        return exponents(scale)
    if grid.scales == "tensor":
        return scale[0].clone()
    if rounded.outer is not None:
        return (scale / rounded.outer).to(torch.float8_e4m3fn)
    return scale[:: grid.rows].contiguous()


def _float_of(name: str, stored: Mapping[str, Tensor], grid: Grid) -> Rounded:
    """The inverse of `CompressedTensors.encode` for floating point.  Raises ValueError where something is NaN."""
    scale, outer = stored[f"{name}.weight_scale"], stored.get(f"{name}.weight_global_scale")
    if grid.is_float4:
        codes = unpack_float4(stored[f"{name}.weight_packed"])
    else:
        codes = codes_of_float8(stored[f"{name}.weight"])
        scale = scale.expand(len(codes), 1) if grid.scales == "tensor" else scale
        scale = scale.repeat_interleave(grid.rows, 0)[: len(codes)]
    nan = [scale, stored[f"{name}.weight"]] if grid.is_float8 else [scale]
    if any((x == 255 if x.dtype == torch.uint8 else x.float().isnan()).any() for x in nan):
        raise ValueError("NaN")
    if outer is not None:
        outer = outer.float().reciprocal()
        scale = scale.float() * outer
    scale = of_exponents(scale) if grid.scales == "e8m0" else scale
    inputs = stored.get(f"{name}.input_scale")
    if (divisor := stored.get(f"{name}.input_global_scale")) is not None:
        inputs = divisor.float().reciprocal()
    return Rounded(codes, scale, torch.zeros(scale.shape), grid, outer=outer, inputs=inputs)


def compressed_tensors_config(scheme: Scheme, *, plain: bool, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The value of config.json's `quantization_config`; `plain` is false where no other loader can run the model,
    `ignore` are the linears that stay as they are."""
    by_bits: dict[int, list[str]] = {}
    for linear, bits in scheme.mixed:
        assert isinstance(bits, int)
        by_bits.setdefault(bits, []).append(linear)
    groups = [_group(["Linear"], scheme.weights, scheme)]
    if scheme.mixed:
        groups = [_group(by_bits[bits], scheme.grid(by_bits[bits][0]), scheme) for bits in sorted(by_bits)]
    form, fixed = _form(scheme), scheme.has_fixed_keys
    if tables := _table_groups(scheme):
        # The widest first: transformers with dequantize=True takes the first group for all, and stops where words hold
        # fewer codes than that says; where they hold more it would answer wrongly.
        groups = [*tables, *({"format": form, **group} for group in groups)]
        groups.sort(key=lambda group: -group["weights"]["num_bits"])
    if not plain:
        form = REFUSED_BY_OTHERS
        refused = {"only": REFUSED_BY_OTHERS}
        groups = [{**group, "format": form, "weights": group["weights"] | refused} for group in groups]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": _args(scheme.kv, _of_keys(scheme.kv), dynamic=False) if scheme.kv and fixed else None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def _table_groups(scheme: Scheme) -> list[dict[str, Any]]:
    """The groups of embedding and head.  vLLM gives some embeddings no name, so that they are told by their class."""
    groups = (
        [] if scheme.embedding is None else [_group(["Embedding"], scheme.embedding[1], Scheme(scheme.embedding[1]))]
    )
    if scheme.head is not None:
        name, grid = scheme.head
        groups.append(_group([f"re:.*{name.rpartition('.')[2]}$"], grid, Scheme(grid)))
    return [{**group, "format": "pack-quantized"} for group in groups]


def _group(targets: list[str], grid: Grid, scheme: Scheme) -> dict[str, Any]:
    activations = scheme.activations
    fixed = activations is not None and activations.scales == "tensor"
    read = "tensor" if fixed else "group" if activations is not None and activations.group else "token"
    group: dict[str, Any] = {
        "targets": targets,
        "weights": _args(grid, _strategy(grid), dynamic=False),
        "input_activations": activations and _args(activations, read, dynamic=not fixed),
        "output_activations": None,
    }
    if activations is not None and not is_int_quantized(scheme):
        # Readers infer int8 storage for any integer weight with quantized inputs; vLLM has no 4-bit scheme for that.
        # The key is newer than the rest, but so is every reader that runs such a scheme.
        group["format"] = _form(scheme)
    return group


def _strategy(grid: Grid) -> str:
    """What the library calls how many weights share a scale."""
    if grid.scales == "tensor":
        return "tensor"
    return "block" if grid.rows > 1 else "group" if grid.group else "channel"


def _of_keys(grid: Grid | None) -> str:
    """What the library calls how many keys, or values, share a scale."""
    return "attn_head" if grid is not None and grid.scales == "head" else "tensor"


def _args(grid: Grid, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    few = {"e8m0": {"scale_dtype": "torch.uint8"}, "e4m3": {"scale_dtype": "torch.float8_e4m3fn"}}
    return few.get(grid.scales, {}) | {
        "num_bits": grid.bits,
        "type": "float" if grid.is_float else "int",
        "symmetric": grid.symmetric,
        "strategy": "tensor_group" if grid.scales == "e4m3" else strategy,
        "group_size": None if strategy == "block" else grid.group,
        "dynamic": "local" if dynamic and grid.scales == "e4m3" else dynamic,
        "actorder": None,
        "block_structure": [grid.rows, grid.group] if strategy == "block" else None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }
