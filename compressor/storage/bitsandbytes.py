"""bitsandbytes: NF4 and FP4 with a scale per 64 weights (arXiv:2305.14314), and int8 rows (arXiv:2208.07339), laid out
as `transformers` saves them.

The bitsandbytes package loads what is written here; nothing of it is needed to write. Embedding and head stay as they
are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.quant.codebooks import CODEBOOKS
from calib.quant.grid import encode, fit_weights
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.storage.description import WEIGHTS_ALONE, FormatDescription
from compressor.storage.quantized_linear import Rounded

BNB_BLOCK = 64  # weights that share a scale: those that follow each other, row after row
SCALE_BITS = 32

# How the library numbers the levels, from the lowest to the highest.
_MAGNITUDES = (0, 1, 6, 7, 4, 5, 2, 3)  # of FP4: exponent and mantissa of 0, 1/192, 1/6, .. 1
_NUMBERS = {"nf4": tuple(range(16)), "fp4": (*(8 + code for code in reversed(_MAGNITUDES)), *_MAGNITUDES)}


def nearest_on_table(name: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    """Round a weight (out, in) of any shape to nearest on the table `kind`, "nf4" or "fp4".  -> tensors by name on
    disk."""
    grid = Grid(4, group=BNB_BLOCK, table=CODEBOOKS[kind]())
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BNB_BLOCK)).view(-1, BNB_BLOCK)
    scale, zero = fit_weights(blocks, grid)
    codes = encode(blocks, scale, zero, grid).flatten()[: weight.numel()]
    return _stored(name, codes, scale, weight.shape, weight.dtype, kind)


def int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Round a weight (out, in) to int8 with a scale per row, found in half precision as the library finds it.  ->
    tensors by name on disk."""
    rows = weight.half().float()
    most = rows.abs().amax(1)
    codes = (rows * (127 / most.clamp(min=torch.finfo(torch.float32).tiny))[:, None]).round().to(torch.int8)
    return {
        f"{name}.weight": codes,
        f"{name}.SCB": most,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),  # rows as they are
    }


def bnb_description(kind: str) -> FormatDescription:
    """Describe a format of bitsandbytes'; kind is "nf4", "fp4" or "int8"."""
    whole = kind == "int8"
    return FormatDescription(
        title=f"bitsandbytes, {kind.upper()}",
        contents="a float model, rounded to nearest" + ("" if whole else f", or the codes of --scheme {kind}"),
        bits="8" if whole else f"4, levels of {kind.upper()}",
        groups="channel" if whole else str(BNB_BLOCK),
        zero_points=False,
        mixed=False,
        activations=f"{WEIGHTS_ALONE} (8 where it is run)" if whole else WEIGHTS_ALONE,
        tables="16 bits",
        readers=() if whole else ("parewell.load (where 64 divides rows)",),
        hardware="GPUs and CPUs",
        bits_per_weight=f"b + {SCALE_BITS}/g",
    )


class BitsAndBytes:
    """The codec of bitsandbytes: NF4 and FP4."""

    descriptions: ClassVar = {kind: bnb_description(kind) for kind in CODEBOOKS}

    def encode(self, name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
        """Lay out a linear whose width is a multiple of 64; see `Codec`."""
        kind = _kind(scheme)
        return _stored(name, rounded.codes.flatten(), rounded.scale, rounded.codes.shape, rounded.scale.dtype, kind)

    def names(self, name: str, scheme: Scheme) -> list[str]:
        """Names on disk of a linear's tensors; see `Codec`."""
        state = f"weight.quant_state.bitsandbytes__{scheme.table_name}"
        return [f"{name}.{part}" for part in ("weight", "weight.absmax", "weight.quant_map", state)]

    def shapes(self, name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], bool]]:
        """See `Codec`; the shape of the state, whose text gives its length, is checked as it is read."""
        count = shape[0] * shape[1]
        found = {f"{name}.weight": ((-(-count // 2), 1), True), f"{name}.weight.absmax": ((count // BNB_BLOCK,), False)}
        return found | {f"{name}.weight.quant_map": ((16,), False)}

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
        """Read a linear's codes and scales back; see `Codec`."""
        kind = _kind(scheme)
        state = json.loads(bytes(stored[f"{name}.weight.quant_state.bitsandbytes__{kind}"].tolist()))
        out, width = state["shape"]
        numbers = torch.cat([stored[f"{name}.weight"] >> 4, stored[f"{name}.weight"] & 15], 1).flatten().long()
        order = torch.empty(16, dtype=torch.int8)
        order[list(_NUMBERS[kind])] = torch.arange(-8, 8, dtype=torch.int8)
        scale = stored[f"{name}.weight.absmax"].view(out, -1)
        return Rounded(order[numbers].view(out, width), scale, torch.zeros(scale.shape), scheme.weights)

    def config(self, scheme: Scheme, *, plain: bool, dtype: str, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of config.json; see `Codec`."""
        return bnb_config(_kind(scheme), dtype, ignore)


def _kind(scheme: Scheme) -> str:
    assert scheme.table_name is not None
    return scheme.table_name


def _stored(
    name: str, codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, kind: str
) -> dict[str, Tensor]:
    """codes (n,) from -8 to 7; two numbers make a byte, the first in its upper half."""
    numbers = torch.tensor(_NUMBERS[kind], dtype=torch.uint8)[codes.cpu().long() + 8]
    pairs = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).view(-1, 2)
    state = {
        "quant_type": kind,
        "blocksize": BNB_BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return {
        f"{name}.weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        f"{name}.weight.absmax": scale.float().flatten(),
        f"{name}.weight.quant_map": _levels(kind),
        f"{name}.weight.quant_state.bitsandbytes__{kind}": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def _levels(kind: str) -> Tensor:
    """(16,), by the library's numbers."""
    levels = torch.empty(16)
    levels[list(_NUMBERS[kind])] = torch.tensor(CODEBOOKS[kind]())
    return levels


def bnb_config(kind: str, dtype: str, ignore: Sequence[str]) -> dict[str, Any]:
    """The value of config.json's `quantization_config`; kind is "nf4", "fp4" or "int8", products are in `dtype`, and
    `ignore` are the linears that stay as they are."""
    common = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
    skipped = {"llm_int8_skip_modules": list(ignore)}
    if kind == "int8":
        return {**common, **skipped, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
    return {
        **common,
        **skipped,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
    }


def bnb_bits_per_weight(kind: str, width: int) -> float:
    """Scales included, of a linear with `width` inputs."""
    return 8 + SCALE_BITS / width if kind == "int8" else 4 + SCALE_BITS / BNB_BLOCK
