"""A plain checkpoint: transforms are in the weights already, and codes become the values that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from compressor.exporters.format import ExportJob, Format, in_dtype, write_shards
from compressor.storage.description import ANY_GPU, WEIGHTS_ALONE, FormatDescription


def _tensors(job: ExportJob) -> Iterator[dict[str, Tensor]]:
    stream, seen = job.checkpoint.stream, set[str]()
    for name, source in stream.names.sources.items():
        if source.converter is None and len(source.names) > 1:  # experts that only we tell apart: in one tensor again
            yield {name: in_dtype(name, stream.read_parameters([name])[name], job.dtype)}
            continue
        for stored in source.names:
            if stored not in seen:
                seen.add(stored)
                yield {stored: in_dtype(stored, stream.read_stored([stored])[stored], job.dtype)}


def _write(folder: Path, job: ExportJob) -> None:
    write_shards(folder, job, _tensors(job), job.config)


_ABOUT = FormatDescription(
    title="plain safetensors",
    contents="a plain checkpoint, codes turned into 16-bit values (`--dtype`)",
    bits="any, as values",
    groups="any",
    zero_points=True,
    mixed=True,
    activations=WEIGHTS_ALONE,
    tables="any, as values",
    readers=(),
    hardware=ANY_GPU,
    bits_per_weight="16",
)
ENTRIES = {"safetensors": Format(_write, lambda job, linear: 8.0 * job.dtype.itemsize, runs_here=True, about=_ABOUT)}
