"""GGUF, for llama.cpp: its block types as they were chosen; Q4_0, Q5_0, Q8_0 and MXFP4 also from grids that are the
same, code for code; else 16 or 32 bits.

`gguf_architectures` has what differs between architectures, `gguf_tokenizer` the vocabulary. Vectors, routers and
positions are kept in single precision, as the runtime wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from calib import BadInput
from calib.jobs.output_folder import write_json
from calib.quant.grid_types import Grid
from calib.quant.mixtures import MIXTURES
from compressor.engine.load import QuantizedCheckpoint
from compressor.exporters.format import ExportJob, Format, in_dtype
from compressor.exporters.gguf_tokenizer import add_tokenizer
from compressor.exporters.runtimes import Answer, NotRun, Runner, transformers_answers
from compressor.storage.description import ANY_GPU, WEIGHTS_ALONE, FormatDescription
from compressor.storage.gguf_architectures import (
    GGUF_ARCHITECTURES,
    StoredTensor,
    architecture_of,
    header_of,
    rope_factors,
    rope_of,
    row_order,
    stored_value,
    unsaid_window,
)
from compressor.storage.gguf_blocks import GGUF_TYPES, gguf_type, packed
from compressor.storage.gguf_names import NAMED_HERE, gguf_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_TYPES = {  # of its mixtures the small ones, which have one type almost throughout
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
WITH_CONFIG = "transformers (gguf_file='model.gguf', config=AutoConfig.from_pretrained(FOLDER))"


def _check(job: ExportJob) -> None:
    """Raises BadInput where the format, or the runtime, would change what the model says."""
    checkpoint = job.checkpoint
    config = checkpoint.stream.config
    architecture_of(config)
    if any(linear.named_here for linear in checkpoint.linears()):
        raise BadInput(f"to gguf: {NAMED_HERE}; save the model with the library's usual names")
    gguf_tensors(checkpoint.stream)
    if any(gguf_type(grid) is None for grid in _grids(checkpoint)):
        assert checkpoint.scheme is not None
        if checkpoint.scheme.mixed:
            found = ", ".join(str(bits) for bits in sorted({grid.bits for grid in _grids(checkpoint)}))
            raise BadInput(f"to gguf: has linears of {found} bits, and 4 (Q4_0), 5 (Q5_0) and 8 (Q8_0) alone can be "
                           "said, in groups of 32; take --scheme w4a16-g32 --candidate-bits 4,5,8")  # fmt: skip
        raise BadInput(
            f"to gguf: {checkpoint.scheme.name} cannot be said in it; quantize to a block type such as q4_k, or to "
            "w4a16-g32 (Q4_0), or export to safetensors first and give that folder"
        )


def _grids(checkpoint: QuantizedCheckpoint) -> list[Grid]:
    """Of all linears, where they are quantized."""
    scheme = checkpoint.scheme
    if scheme is None:
        return []
    return [scheme.grid(name) for name in scheme.bits] if scheme.mixed else [scheme.weights]


def _bits(job: ExportJob, linear: str) -> float:
    scheme = job.checkpoint.scheme
    found = None if scheme is None else gguf_type(scheme.grid(linear))
    return 8.0 * job.dtype.itemsize if found is None else GGUF_TYPES[found]


def _type_of(grid: Grid) -> str:
    found = gguf_type(grid)
    assert found is not None, "the job was checked"
    return found


def _table(checkpoint: QuantizedCheckpoint, name: str) -> Grid | None:
    """The grid of an embedding or a head, by the name of its weight; None where it is stored as floats."""
    grid = None if checkpoint.scheme is None else checkpoint.scheme.tables.get(name.removesuffix(".weight"))
    return grid if grid is not None and gguf_type(grid) is not None else None


def add_values(writer: GGUFWriter, header: Iterable[tuple[str, Any]]) -> None:
    """Add keys to a file's header: numbers in 32 bits, truth values, strings."""
    for key, value in header:
        add: Callable[[str, Any], None] = writer.add_string
        if isinstance(value, bool):
            add = writer.add_bool
        elif isinstance(value, int):
            add = writer.add_uint32
        elif isinstance(value, float):
            add = writer.add_float32
        add(key, value)


def _file_type(job: ExportJob) -> int:
    """The number by which llama.cpp names a file's types: of a mixture, of the type that was asked for whatever rows it
    divides, or of the one that most linears have."""
    scheme = job.checkpoint.scheme
    if scheme is not None and scheme.mixture:
        return MIXTURES[scheme.mixture].file_type
    if scheme is not None and scheme.weights.is_block_type:
        return FILE_TYPES[_type_of(scheme.weights)]
    kinds = [_type_of(grid) for grid in _grids(job.checkpoint)] or [FLOATS[job.dtype]]
    return FILE_TYPES[max(kinds, key=kinds.count)]


def _add_header(writer: GGUFWriter, job: ExportJob) -> None:
    """What the model is, and its tokenizer."""
    config = job.checkpoint.stream.config
    arch = GGUF_ARCHITECTURES[config.model_type].name
    writer.add_type("model")
    writer.add_name(job.folder.resolve().name)
    writer.add_file_type(_file_type(job))
    writer.add_quantization_version(2)
    add_values(writer, ((f"{arch}.{key}", value) for key, value in header_of(config).items()))
    job.notes.extend(add_tokenizer(writer, job.folder, config.vocab_size))


def write_gguf(scratch: Path, job: ExportJob) -> None:
    """Write model.gguf and config.json."""
    from gguf import GGMLQuantizationType, GGUFWriter

    checkpoint = job.checkpoint
    stream, config = checkpoint.stream, checkpoint.stream.config
    writer = GGUFWriter(scratch / "model.gguf", GGUF_ARCHITECTURES[config.model_type].name)
    _add_header(writer, job)
    linears = {f"{linear.name}.weight": linear for linear in checkpoint.linears()}

    def type_of(tensor: StoredTensor) -> str:
        if checkpoint.scheme is not None and tensor.sources[0] in linears:
            return _type_of(checkpoint.scheme.grid(linears[tensor.sources[0]].name))
        if (table := _table(checkpoint, tensor.sources[0])) is not None:
            return _type_of(table)
        return "F32" if tensor.in_float32 else FLOATS[job.dtype]

    def made(tensor: StoredTensor, source: str, of_type: str) -> np.ndarray[Any, Any]:
        """One of a tensor's sources, as bytes."""
        linear = linears.get(source)
        if of_type in GGUF_TYPES:
            table = source.removesuffix(".weight")
            rounded = checkpoint.rounded_table(table) if linear is None else checkpoint.rounded(linear)
            order, blocks = row_order(tensor.name, config), packed(rounded).numpy()
            return blocks if order is None else blocks[order.numpy()]
        value = stream.read_stored([source])[source]
        value = stored_value(tensor.name, value.mT if linear is not None and linear.transposed else value, config)
        stored = in_dtype(source, value, {of: dtype for dtype, of in FLOATS.items()}[of_type])
        return stored.contiguous().view(torch.uint8).numpy()

    tensors, factors = gguf_tensors(stream), rope_factors(config)
    # Twice over all tensors: what they are comes before their values, and all of them are not held at once.
    for values in (False, True):
        if values:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for name, factor in factors.items():
            data = factor.numpy()
            if values:
                writer.write_tensor_data(data)
            else:
                writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType.F32)
        for tensor in tensors:
            of_type = type_of(tensor)
            parts = [made(tensor, source, of_type) for source in tensor.sources]
            data = np.stack(parts) if tensor.stacked else parts[0]
            if values:
                writer.write_tensor_data(data)
            else:
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[of_type])
    writer.close()
    write_json(scratch / "config.json", job.config)
    _say_loaders(job)


def _say_loaders(job: ExportJob) -> None:
    """What reads the file beside llama.cpp, and up to which length."""
    config = job.checkpoint.stream.config
    read_by = _read_by(config)
    if read_by == "config":
        job.loaders[-1:] = [WITH_CONFIG]
        job.notes.append("transformers takes what it does not read from GGUF for granted, and answers wrongly without "
                         "the config given")  # fmt: skip
    elif not read_by:
        del job.loaders[-1:]
    if rope_of(config).get("rope_type") == "longrope":
        old = rope_of(config)["original_max_position_embeddings"]
        job.notes.append(f"LongRoPE: with a context (-c) of over {old} tokens llama.cpp takes the long factors for "
                         "texts of any length, the model for longer ones alone")  # fmt: skip
    if (window := unsaid_window(config)) is not None:
        job.notes.append(f"llama.cpp attends to everything, the model to {window} tokens: they are alike up to that "
                         "length, which the file gives as its context")  # fmt: skip


def _read_by(config: PretrainedConfig) -> str:
    """How transformers reads the file: "alone", with the "config" given, or not at all ("")."""
    entry = GGUF_ARCHITECTURES[config.model_type]
    default = rope_of(config).get("rope_type", "default") == "default"
    if entry.read_by == "alone" and config.model_type == "mistral":  # read as a llama, whose config is another
        return "alone" if default and unsaid_window(config) is None else ""
    plain = default and not getattr(config, "attention_bias", False) and not getattr(config, "mlp_bias", False)
    return "config" if entry.read_by == "alone" and not plain else entry.read_by


def gguf_answers(folder: Path) -> Answer:
    """Open model.gguf in transformers.  Raises NotRun where that does not read the architecture."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    read_by = _read_by(config)
    if not read_by:
        raise NotRun(f"transformers does not read {config.model_type} of this kind from GGUF; llama.cpp does")
    given = {"config": config} if read_by == "config" else {}
    return transformers_answers(folder, gguf_file="model.gguf", **given)


def _in_memory(job: ExportJob, of: Format) -> int:
    """transformers reads the weights into floats."""
    return 4 * sum(torch.Size(shape).numel() for shape in job.checkpoint.stream.expected.values())


_ABOUT = FormatDescription(
    title="GGUF",
    contents="block types as they were chosen, byte for byte; Q4_0, Q5_0, Q8_0 and MXFP4 of grids that are the same, "
    "code for code; a float model in 16 bits",
    bits="2 to 8, levels of the type",
    groups="those of the type; 32 of w4a16-g32, w5a16-g32, w8a16-g32 and wmxfp4a16",
    zero_points=True,
    mixed=True,
    activations=WEIGHTS_ALONE,
    tables="the same types, tied too; else 16 bits",
    readers=(),
    hardware=ANY_GPU,
    bits_per_weight=", ".join(f"{bits:g} ({name})" for name, bits in sorted(GGUF_TYPES.items(), key=itemgetter(1))),
)
ENTRIES = {
    "gguf": Format(
        write_gguf,
        _bits,
        _check,
        dtype=lambda checkpoint: torch.float16,
        in_memory=_in_memory,
        codes_tables=True,
        runner=Runner(("transformers", "gguf"), gguf_answers),
        about=_ABOUT,
    )
}
