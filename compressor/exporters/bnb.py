"""bitsandbytes: weights rounded to nearest, in 4 or 8 bits, as transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from calib import BadInput
from calib.quant.codebooks import CODEBOOKS
from compressor.engine.load import only_here
from compressor.exporters.format import ExportJob, Format, in_dtype, write_shards
from compressor.exporters.runtimes import Runner, transformers_answers
from compressor.storage import bitsandbytes
from compressor.storage.bitsandbytes import bnb_description

KINDS = {"bnb-nf4": "nf4", "bnb-fp4": "fp4", "bnb-int8": "int8"}


def _check(job: ExportJob) -> None:
    scheme, kind, stream = job.checkpoint.scheme, KINDS[job.to], job.checkpoint.stream
    if scheme is not None and scheme.name == kind:
        raise BadInput(f"{job.folder}: is {kind} as bitsandbytes has it already; transformers loads it as it is")
    if scheme is not None:
        raise BadInput(
            f"{job.folder}: is rounded already ({scheme.name}), and would be a second time; quantize the float model "
            "with --scheme nf4, or with --rounding none and export that"
        )
    if any(linear.transposed for linear in job.checkpoint.linears()):
        raise BadInput(
            f"to {job.to}: the weights of {stream.config.model_type} are kept as (in, out), which bitsandbytes does "
            "not know; export to safetensors"
        )
    if any(linear.step for linear in job.checkpoint.linears()):
        raise BadInput(
            f"to {job.to}: bitsandbytes cannot hold the experts of {stream.config.model_type}, whose weights "
            "transformers stacks; export to safetensors"
        )
    if (why := only_here(stream)) is not None:
        raise BadInput(f"to {job.to}: {why}; export to safetensors")


def _whole_blocks(job: ExportJob) -> bool:
    """Whether no scale is shared by weights of two rows."""
    return all(job.width(name.removesuffix(".weight")) % bitsandbytes.BNB_BLOCK == 0 for name in job.linears)


def _tensors(job: ExportJob) -> Iterator[dict[str, Tensor]]:
    stream, linears, kind = job.checkpoint.stream, job.linears, KINDS[job.to]
    for name in stream.expected:
        value = in_dtype(name, stream.read_stored([name])[name], job.dtype)
        if name not in linears:
            yield {name: value}
        elif kind == "int8":
            yield bitsandbytes.int8(name.removesuffix(".weight"), value)
        else:
            yield bitsandbytes.nearest_on_table(name.removesuffix(".weight"), value, kind)


def _write(folder: Path, job: ExportJob) -> None:
    config, kind = job.config, KINDS[job.to]
    config["quantization_config"] = bitsandbytes.bnb_config(kind, config["dtype"], job.checkpoint.stream.left_alone())
    write_shards(folder, job, _tensors(job), config)
    if kind in CODEBOOKS and not _whole_blocks(job):
        job.notes.append(
            "on CPUs with AVX-512 bitsandbytes 0.50 takes wrong scales for rows that 64 does not divide, as some here "
            "are"
        )


def _bits(kind: str, job: ExportJob, linear: str) -> float:
    return bitsandbytes.bnb_bits_per_weight(kind, job.width(linear))


def _read_here(kind: str, job: ExportJob) -> str | None:
    return kind if kind in CODEBOOKS and _whole_blocks(job) else None


_RUNNER = Runner(("transformers", "bitsandbytes", "accelerate"), transformers_answers)
ENTRIES = {
    name: Format(
        _write,
        partial(_bits, kind),
        _check,
        read_here=partial(_read_here, kind),
        runner=_RUNNER,
        about=bnb_description(kind),
    )
    for name, kind in KINDS.items()
}
