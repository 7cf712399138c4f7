"""A plain checkpoint: transforms are in the weights already, and codes become the values that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from compressor.exporters.format import ExportJob, Format, in_dtype, write_shards


def _tensors(job: ExportJob) -> Iterator[dict[str, Tensor]]:
    stream = job.checkpoint.stream
    ours = {f"{linear.name}.weight" for linear in job.checkpoint.linears() if linear.named_here}
    for name in stream.expected:
        if name not in ours:
            yield {name: in_dtype(name, stream.read_stored([name])[name], job.dtype)}
    for name, source in stream.names.sources.items():  # experts that only we tell apart, in one tensor again
        if not ours.isdisjoint(source.names) and name not in stream.expected:
            yield {name: in_dtype(name, stream.read_parameters([name])[name], job.dtype)}


def _write(folder: Path, job: ExportJob) -> None:
    write_shards(folder, job, _tensors(job), job.config)


ENTRIES = {"safetensors": Format(_write, lambda job, linear: 8.0 * job.dtype.itemsize, runs_here=True)}
