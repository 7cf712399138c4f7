"""FP8 as DeepSeek stores it (`quant_method: fp8`): E4M3 weights, and in single precision a scale per 128 x 128 of them.

What multiplies is called `weight_scale_inv` all the same. Activations are rounded as the model runs, per token and 128
of its inputs. Readers take the sides of a block from those of weights and scales, so that 128 must divide all sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from calib import BadInput
from calib.quant.floating import float8_of_codes
from calib.quant.scheme import FP8_BLOCK, Scheme
from compressor.engine.load import splits_fused
from compressor.exporters.format import ExportJob, Format, write_shards
from compressor.exporters.repacked import check_linears, grids, repacked, scheme_of
from compressor.exporters.runtimes import Answer, Runner, transformers_answers
from compressor.storage.description import FormatDescription
from compressor.storage.quantized_linear import Rounded

SCHEME = "wfp8afp8-b128"


def _check(job: ExportJob) -> None:
    check_linears(job, SCHEME)
    scheme, stream, known = scheme_of(job), job.checkpoint.stream, Scheme.parse(SCHEME)
    if (scheme.weights, scheme.activations, scheme.kv) != (known.weights, known.activations, None) or scheme.tables:
        what = f"{scheme.name} with an embedding or a head in codes" if scheme.tables else scheme.name
        raise BadInput(f"to {job.to}: holds {SCHEME} alone, not {what}; quantize to that")
    if any(one.hadamard or one.key_rotation is not None for one in job.checkpoint.online):
        raise BadInput(f"to {job.to}: rotates as it runs, which the format cannot say; quantize with --no-online")
    for name in grids(job):
        out, width = stream.expected[f"{name}.weight"]
        if out % FP8_BLOCK or width % FP8_BLOCK:
            raise BadInput(
                f"to {job.to}: '{name}' is {out} x {width}, and readers know whole blocks of 128 x 128; vLLM and "
                "transformers load the folder as it is"
            )
    if not splits_fused(scheme.ignored):
        job.loaders.append("vLLM")
        job.notes.append("vLLM: below compute capability 8.9 activations stay in 16 bits")
    job.notes.append("transformers on a CPU turns codes into values, and leaves activations as they are")
    stored = str(job.dtype).removeprefix("torch.")
    job.notes.append(f"transformers 5.23 opens it with dtype=torch.{stored} only, in which all else is stored")


def _layout(name: str, rounded: Rounded) -> dict[str, Tensor]:
    return {
        f"{name}.weight": float8_of_codes(rounded.codes),
        f"{name}.weight_scale_inv": rounded.scale[::FP8_BLOCK].float().contiguous(),
    }


def _write(folder: Path, job: ExportJob) -> None:
    quantization: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": job.checkpoint.stream.left_alone(),
    }
    write_shards(folder, job, repacked(job, _layout), job.config | {"quantization_config": quantization})


def _answers(folder: Path) -> Answer:
    return transformers_answers(folder, dtype="auto", use_safetensors=True)


_RUNNER = Runner(("transformers", "accelerate"), _answers)
_ABOUT = FormatDescription(
    title="FP8 as DeepSeek stores it",
    contents="the codes and scales of wfp8afp8-b128, where 128 divides all sides (`quant_method: fp8`)",
    bits="8",
    groups=f"blocks of {FP8_BLOCK} x {FP8_BLOCK}",
    zero_points=False,
    mixed=False,
    activations="FP8",
    tables="16 bits",
    readers=("vLLM",),
    hardware="GPUs from compute capability 8.9 on; CPUs (as values, in the stored dtype)",
    bits_per_weight=f"b + 32/{FP8_BLOCK**2:,}",
)
ENTRIES = {
    "deepseek-fp8": Format(
        _write, lambda job, linear: 8 + 32 / FP8_BLOCK**2, _check, rounds_inputs=True, runner=_RUNNER, about=_ABOUT
    )
}
