"""AWQ checkpoints in the GEMM layout, as vLLM, GPTQModel and transformers load them: x^ = (q - z) scale with unsigned
codes q of 4 bits.

Eight codes of neighbouring outputs fill a 32-bit word, from its lowest bits on those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
Zero points lie alike and are stored as they are; a symmetric grid has z = 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from compressor.engine.load import splits_fused
from compressor.exporters.format import ExportJob, Format, write_shards
from compressor.exporters.repacked import check_codes, grids, repacked, scale_in, scheme_of
from compressor.storage.compressed_tensors import pack
from compressor.storage.description import WEIGHTS_ALONE, FormatDescription, number_list
from compressor.storage.quantized_linear import Rounded

AWQ_GROUPS = (16, 32, 64, 128)  # that GPTQModel's kernels know
SERVED_GROUPS = (32, 64, 128)  # by vLLM's rules
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of each eight, from the lowest bits of a word on


def _check(job: ExportJob) -> None:
    check_codes(job, (4,), "w4a16-g128")
    group = scheme_of(job).weights.group
    if group not in AWQ_GROUPS:
        what = f"groups of {group}" if group else "one scale per output channel"
        raise BadInput(f"to awq: readers know groups of 16, 32, 64 and 128, not {what}; quantize with one of these, or "
                       "export to gptq or safetensors")  # fmt: skip
    for name in grids(job):
        out = job.checkpoint.stream.expected[f"{name}.weight"][0]
        if out % len(ORDER):
            raise BadInput(f"to awq: '{name}' has {out} outputs, and words hold 8 of them; export to safetensors")
    if group in SERVED_GROUPS and not splits_fused(scheme_of(job).ignored):
        job.loaders.append("vLLM")


def pack_outputs(codes: Tensor) -> Tensor:
    """Signed codes (rows, out) int8 -> int32 words (rows, out / 8)."""
    return pack(codes.unflatten(1, (-1, len(ORDER)))[..., list(ORDER)].flatten(1), 4)


def _layout(job: ExportJob, name: str, rounded: Rounded) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": pack_outputs(rounded.codes.mT),
        f"{name}.qzeros": pack_outputs(rounded.zero.to(torch.int8).mT),
        f"{name}.scales": scale_in(job, name, rounded.scale, torch.float16).mT,
    }


def _write(folder: Path, job: ExportJob) -> None:
    quantization: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme_of(job).weights.group,
        "zero_point": True,  # which readers of a symmetric grid find as well
        "version": "gemm",
        "modules_to_not_convert": job.checkpoint.stream.left_alone(),
    }
    config = job.config | {"quantization_config": quantization}
    write_shards(folder, job, repacked(job, lambda name, rounded: _layout(job, name, rounded)), config)


def _bits(job: ExportJob, linear: str) -> float:
    group = scheme_of(job).weights.group
    assert group is not None
    return 4 + 20 / group


_ABOUT = FormatDescription(
    title="AWQ, GEMM layout",
    contents="the codes and scales as they are",
    bits="4",
    groups=number_list(AWQ_GROUPS),
    zero_points=True,
    mixed=False,
    activations=WEIGHTS_ALONE,
    tables="16 bits",
    readers=(f"vLLM (groups of {number_list(SERVED_GROUPS)})",),
    hardware="GPUs, in vLLM from compute capability 7.5 on; CPUs",
    bits_per_weight="b + 20/g",
)
ENTRIES = {"awq": Format(_write, _bits, _check, about=_ABOUT)}
