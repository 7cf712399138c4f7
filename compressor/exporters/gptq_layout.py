"""GPTQ checkpoints, as GPTQModel, vLLM and transformers load them: x^ = (q - z) scale with unsigned codes q.

Codes run down the inputs, zero points along the outputs, each a little-endian stream of bits in 32-bit words. Version
1 (`gptq`) stores z - 1, which older readers expect, and holds symmetric grids here. Zero points go into version 2
(`gptq_v2`), which stores z: z = 0, of a group without negative weights, has no place in version 1, and GPTQModel loads
zero points of that version only from what it has written itself. Which inputs share a scale is written out, and is
sequential.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.jobs.output_folder import write_json
from compressor.engine.load import splits_fused
from compressor.exporters.format import ExportJob, Format, write_shards
from compressor.exporters.repacked import check_codes, grids, repacked, scale_in, scheme_of, usual
from compressor.storage.compressed_tensors import pack
from compressor.storage.description import ANY_GPU, WEIGHTS_ALONE, FormatDescription, number_list
from compressor.storage.quantized_linear import Rounded

GPTQ_BITS = (2, 3, 4, 8)
GPTQ_GROUPS = (None, 16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel's kernels know; None: one per output
SERVED_BITS, SERVED_GROUPS = (4, 8), (None, 32, 64, 128)  # symmetric ones, by vLLM's rules


def _check(job: ExportJob) -> None:
    check_codes(job, GPTQ_BITS, "w4a16-g128")
    scheme = scheme_of(job)
    if scheme.weights.group not in GPTQ_GROUPS:
        raise BadInput(f"to gptq: no reader knows groups of {scheme.weights.group}; quantize with -g16, -g32, -g64 or "
                       "-g128, or with -channel")  # fmt: skip
    for name, grid in grids(job).items():
        whole, (out, width) = 32 // gcd(grid.bits, 32), job.checkpoint.stream.expected[f"{name}.weight"]
        if out % whole or width % whole:
            raise BadInput(
                f"to gptq: '{name}' has {width} inputs and {out} outputs, and {whole} codes of {grid.bits} bits fill "
                "a word, of which there must be whole ones; export to safetensors"
            )
    if scheme.mixed:
        job.loaders[:] = ["GPTQModel"]
        job.notes.append("transformers takes all linears for ones of the same bits; GPTQModel reads those that differ")
    served = scheme.weights.symmetric and not scheme.mixed and scheme.weights.group in SERVED_GROUPS
    if served and not splits_fused(scheme.ignored) and scheme.weights.bits in SERVED_BITS:
        job.loaders.append("vLLM")


def _layout(job: ExportJob, name: str, rounded: Rounded) -> dict[str, Tensor]:
    bits, groups = rounded.grid.bits, rounded.scale.shape[1]
    stored_less = 1 if rounded.grid.symmetric else 0  # than the zero point, in version 1
    return {
        f"{name}.qweight": pack(rounded.codes, bits).mT,
        f"{name}.qzeros": pack((rounded.zero - stored_less).to(torch.int8).mT, bits),
        f"{name}.scales": scale_in(job, name, rounded.scale, torch.float16).mT,
        f"{name}.g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(rounded.codes.shape[1] // groups),
    }


def _quantization(job: ExportJob) -> dict[str, Any]:
    """The config's `quantization_config`; `dynamic` has linears of other bits than most, and modules of blocks that
    have none, by regular expressions."""
    scheme, stream = scheme_of(job), job.checkpoint.stream
    bits = usual(grid.bits for grid in grids(job).values())
    modules = {
        f"{stream.block_name(i)}.{one.module}": one.name for i in range(stream.layers) for one in stream.linears(i)
    }
    others = {module: scheme.grid(name).bits for module, name in modules.items() if scheme.grid(name).bits != bits}
    blocks = tuple(f"{stream.block_name(i)}." for i in range(stream.layers))
    left = [module for module in stream.left_alone() if module.startswith(blocks)]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": scheme.weights.group or -1,
        "desc_act": False,
        "sym": scheme.weights.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.weights.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(module)}$": {} for module in left}
        | {f"+:^{re.escape(module)}$": {"bits": other} for module, other in others.items()},
        "meta": {"quantizer": [f"parewell:{version('parewell')}"]},
    }


def _write(folder: Path, job: ExportJob) -> None:
    quantization = _quantization(job)
    config = job.config | {"quantization_config": quantization}
    write_shards(folder, job, repacked(job, lambda name, rounded: _layout(job, name, rounded)), config)
    write_json(folder / "quantize_config.json", quantization)  # where older readers look


def _bits(job: ExportJob, linear: str) -> float:
    grid, (out, width) = scheme_of(job).grid(linear), job.checkpoint.stream.expected[f"{linear}.weight"]
    return grid.bits + (16 + grid.bits) * grid.groups(width) / width + 32 / out


_ABOUT = FormatDescription(
    title="GPTQ",
    contents="the codes and scales as they are: version 1 (`gptq`), with zero points version 2 (`gptq_v2`); bits that "
    "differ are read by GPTQModel alone",
    bits=number_list(GPTQ_BITS),
    groups=number_list(GPTQ_GROUPS),
    zero_points=True,
    mixed=True,
    activations=WEIGHTS_ALONE,
    tables="16 bits",
    readers=(f"vLLM (symmetric {number_list(SERVED_BITS)} bits, groups of {number_list(SERVED_GROUPS)}, not mixed)",),
    hardware=ANY_GPU,
    bits_per_weight="b + (16 + b)/g + 32/n",
)
ENTRIES = {"gptq": Format(_write, _bits, _check, about=_ABOUT)}
