"""Formats that keep the codes and scales of a quantized model and lay them out otherwise: what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from calib import BadInput
from calib.model.task import Task
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.engine.load import only_here
from compressor.exporters.format import ExportJob, in_dtype
from compressor.storage.quantized_linear import Rounded

Layout = Callable[[str, Rounded], Mapping[str, Tensor]]  # a linear's name and its codes -> what is stored of it
_Value = TypeVar("_Value")


def scheme_of(job: ExportJob) -> Scheme:
    """The scheme of a model that is quantized, as `check_codes` saw to."""
    assert job.checkpoint.scheme is not None
    return job.checkpoint.scheme


def check_linears(job: ExportJob, instead: str) -> None:
    """Raises BadInput where a format of codes has no place for those of the model's linears; it names the scheme
    `instead`."""
    stream = job.checkpoint.stream
    if job.checkpoint.scheme is None:
        raise BadInput(
            f"to {job.to}: {job.folder} is not quantized, and the format is one of codes; make them with parewell "
            f"quantize --scheme {instead}"
        )
    if stream.task is not Task.CAUSAL_LM:
        raise BadInput(f"to {job.to}: a model that sees images has not been tried in it; export to safetensors")
    if any(linear.step for linear in job.checkpoint.linears()):
        raise BadInput(f"to {job.to}: readers name and stack the experts of {stream.config.model_type} each in its own "
                       "way; export to safetensors")  # fmt: skip
    if (why := only_here(stream)) is not None:
        raise BadInput(f"to {job.to}: {why}; export to safetensors")


def check_codes(job: ExportJob, bits: Collection[int], instead: str) -> None:
    """Raises BadInput where a format of integer codes of these `bits` cannot hold the model; it names the scheme
    `instead`."""
    check_linears(job, instead)
    scheme = scheme_of(job)
    if not scheme.weights.is_even:
        raise BadInput(f"to {job.to}: holds even grids only, not {scheme.name}; quantize to another scheme, such as "
                       f"{instead}")  # fmt: skip
    found = {scheme.grid(name).bits for name in scheme.bits} or {scheme.weights.bits}
    if not found.issubset(bits):
        raise BadInput(
            f"to {job.to}: holds codes of {_listed(bits)} bits, and here are some of {_listed(found - set(bits))}; "
            f"quantize to another scheme, such as {instead}"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def repacked(job: ExportJob, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """All tensors of the result, some at a time: linears as `layout` has them, all else as floats."""
    stream, linears = job.checkpoint.stream, {f"{one.name}.weight": one for one in job.checkpoint.linears()}
    for name in stream.expected:
        if name in linears:
            yield dict(layout(linears[name].name, job.checkpoint.rounded(linears[name])))
        else:
            yield {name: in_dtype(name, stream.read_stored([name])[name], job.dtype)}


def scale_in(job: ExportJob, linear: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales of a linear in the dtype that a format keeps them in; a note of the job tells of those that it rounds.

    Raises BadInput where a scale is changed by more than rounding the linear's largest would change that: it is too
    large for the dtype, or all of them too small.
    """
    short, exact = scale.to(dtype), scale.double()
    if torch.equal(short.double(), exact):
        return short
    name, stored = (str(kind).removeprefix("torch.") for kind in (dtype, scale.dtype))
    if not (short.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps / 2:
        raise BadInput(
            f"to {job.to}: scales of '{linear}' go from {float(exact.min()):.1e} to {float(exact.max()):.1e}, which "
            f"{name} cannot hold; export to safetensors"
        )
    note = f"scales are {stored} in what was exported and rounded to {name} here; codes are as they were"
    if note not in job.notes:
        job.notes.append(note)
    return short


def usual(values: Iterable[_Value]) -> _Value:
    """The most common value, of equally common ones the first."""
    return Counter(values).most_common(1)[0][0]


def grids(job: ExportJob) -> dict[str, Grid]:
    """The grid of each linear, by its name on disk."""
    return {
        name.removesuffix(".weight"): scheme_of(job).grid(name.removesuffix(".weight")) for name in sorted(job.linears)
    }
