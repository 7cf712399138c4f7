"""What an export format is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput, Failed
from calib.jobs.output_folder import Shards, write_json
from calib.model.config import as_configured, read_json
from compressor.engine.load import CAPPED, QuantizedCheckpoint
from compressor.exporters.runtimes import Runner
from compressor.storage.description import FormatDescription


@dataclass
class ExportJob:
    """The model in `folder`, opened; the dtype of what is not quantized; the format's name.

    Weights are the names in `checkpoint.stream.expected`, read one by one with `checkpoint.stream.read_stored([name])`.

    notes: what the user is to know, which a format adds to; loaders: what can load the result.
    """

    folder: Path
    checkpoint: QuantizedCheckpoint
    dtype: torch.dtype
    to: str
    loaders: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def linears(self) -> set[str]:
        """Names on disk of the weights that formats quantize."""
        return {f"{linear.name}.weight" for linear in self.checkpoint.linears()}

    def width(self, linear: str) -> int:
        """Inputs of a linear."""
        return self.checkpoint.stream.expected[f"{linear}.weight"][1]

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the result, as it is but for what the result does not have."""
        config = {k: v for k, v in read_json(self.folder / "config.json").items() if k not in _NOT_COPIED}
        return config | {"dtype": str(self.dtype).removeprefix("torch.")}

    def bits_per_weight(self, of: Format) -> float:
        """The mean over all linears of the blocks, scales and zero points included."""
        expected = self.checkpoint.stream.expected
        sizes = {name: torch.Size(expected[name]).numel() for name in self.linears}
        return sum(n * of.bits(self, name.removesuffix(".weight")) for name, n in sizes.items()) / sum(sizes.values())

    def expected_bytes(self, of: Format) -> int:
        """Bytes of the result's weights."""
        coded, scheme, bits = self.linears, self.checkpoint.scheme, 0.0
        if of.codes_tables and scheme is not None:
            coded = coded | {f"{name}.weight" for name in scheme.tables}
        for name, shape in self.checkpoint.stream.expected.items():
            each = of.bits(self, name.removesuffix(".weight")) if name in coded else 8.0 * self.dtype.itemsize
            bits += torch.Size(shape).numel() * each
        return int(bits / 8)


_NOT_COPIED = ("quantization_config", "auto_map", "torch_dtype")


def stored_in_16_bits(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """The dtype that a model is stored in, or bfloat16 where that is wider: its embedding's, or, where that is
    quantized, that of the scales; of blocks, which have none of their own, that of what is not quantized."""
    stream, scheme = checkpoint.stream, checkpoint.scheme
    if scheme is not None and scheme.embedding is not None:
        entries = stream.weights.entries
        scale = entries.get(f"{scheme.embedding[0]}.weight_scale")
        stored = next(one.dtype for one in [scale, *entries.values()] if one and one.dtype.is_floating_point)
    else:
        stored = stream.entry(stream.walk.entering[0]).dtype
    return stored if stored.itemsize == 2 else torch.bfloat16


def _nothing_to_check(job: ExportJob) -> None:
    """Every model can be said in it."""


@dataclass(frozen=True)
class Format:
    """An export format.

    about: what it can say and who reads it, for the table of all formats.
    write: writes weights and config.json into a directory.
    bits: a weight of a linear takes, scales and zero points included.
    check: raises BadInput where the format cannot say what the model does.
    dtype: of what is not quantized, where none is asked for.
    in_memory: bytes that a runtime holds of the result.
    read_here: the scheme by which parewell reads rounded weights of the result; None where it does not.
    rounds_inputs: it says that activations are rounded as the model runs; `check` sees to what it cannot say.
    codes_tables: embedding and head may be codes, too; else they become floats.
    runs_here: parewell itself runs the result, not another runtime.
    runner: what else runs it; None: nothing here does, and it is not measured.
    """

    write: Callable[[Path, ExportJob], None]
    bits: Callable[[ExportJob, str], float]
    check: Callable[[ExportJob], None] = _nothing_to_check
    dtype: Callable[[QuantizedCheckpoint], torch.dtype] = stored_in_16_bits
    in_memory: Callable[[ExportJob, Format], int] = lambda job, of: job.expected_bytes(of)
    read_here: Callable[[ExportJob], str | None] = lambda job: None
    rounds_inputs: bool = False
    codes_tables: bool = False
    runs_here: bool = False
    runner: Runner | None = None
    about: FormatDescription = field(kw_only=True)


def in_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`.  Raises Failed where that cannot hold it."""
    short = value.to(dtype)
    if not short.isfinite().all():
        raise Failed(f"tensor '{name}': has values up to {float(value.abs().max()):.3g}, which "
                     f"{str(dtype).removeprefix('torch.')} cannot hold; take --dtype bfloat16")  # fmt: skip
    return short


def write_shards(folder: Path, job: ExportJob, tensors: Iterator[dict[str, Tensor]], config: dict[str, Any]) -> None:
    """Write safetensors as tensors come, and a config.json."""
    shards = Shards(folder)
    for some in tensors:
        shards.add(some)
    shards.close()
    if as_configured(config):
        job.notes.append(CAPPED)
    write_json(folder / "config.json", config)


def refuse_online(job: ExportJob) -> None:
    """Raises BadInput where the model rounds activations, or rotates, as it runs."""
    checkpoint, scheme = job.checkpoint, job.checkpoint.scheme
    if scheme is None:
        return
    online = any(o.hadamard or o.key_rotation is not None for o in checkpoint.online)
    if scheme.activations or scheme.kv or online:
        raise BadInput(
            f"{job.folder}: rounds or rotates as it runs ({scheme.name}), which {job.to} cannot say; parewell.load "
            f"runs it, and a folder of scheme {scheme.weights_only().name} can be exported"
        )
