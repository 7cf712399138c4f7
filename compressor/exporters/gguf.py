"""GGUF, for llama.cpp: Q4_0 and Q8_0 from symmetric grids of 32 weights, code for code, else 16 or 32 bits.

Norms and biases are kept in single precision, as the runtime wants them. For `llama` it turns neighbouring channels of
a head, not the two halves: rows of queries and keys change places. Llama 3's rotary scaling is a tensor of factors,
by which the runtime divides each frequency. A tokenizer goes in where its kind is known.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput
from calib.jobs.output_folder import write_json
from calib.quant.grid import as_stored
from calib.quant.scheme import Grid
from compressor.engine.load import QuantizedCheckpoint
from compressor.exporters.format import ExportJob, Format, in_dtype
from compressor.exporters.gguf_tokenizer import add_tokenizer
from compressor.exporters.runtimes import Runner, transformers_answers
from compressor.storage.quantized_linear import Rounded

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Types whose parts are called alike, and what the runtime calls them.
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
GGUF_GRIDS = {Grid(4, True, 32): ("Q4_0", 4.5), Grid(8, True, 32): ("Q8_0", 8.5)}  # -> type, bits per weight
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "F16": 1, "BF16": 32, "F32": 0}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


WITH_CONFIG = "transformers (gguf_file='model.gguf', config=AutoConfig.from_pretrained(FOLDER))"


def _check(job: ExportJob) -> None:
    """Raises BadInput where the format, or those who read it, would change what the model says."""
    folder, checkpoint = job.folder, job.checkpoint
    config, kind = checkpoint.stream.config, checkpoint.stream.config.model_type
    if kind not in GGUF_ARCHITECTURES:
        raise BadInput(
            f"to gguf: {kind} is not known here, only {', '.join(GGUF_ARCHITECTURES)}; export to safetensors and "
            "use llama.cpp's own converter"
        )
    refused = {
        "a sliding window": getattr(config, "sliding_window", None) is not None,
        f"rope scaling '{_rope_type(checkpoint)}'": _rope_type(checkpoint) != "default"
        and not has_rope_factors(checkpoint),
        "biases": kind != "qwen2" and any(name.endswith(".bias") for name in checkpoint.stream.expected),
    }
    for what, there in refused.items():
        if there:
            raise BadInput(f"{folder}: has {what}, which GGUF readers drop or read otherwise for {kind}; export to "
                           "safetensors")  # fmt: skip
    if any(grid not in GGUF_GRIDS for grid in _grids(checkpoint)):
        assert checkpoint.scheme is not None
        if checkpoint.scheme.mixed:
            found = ", ".join(str(bits) for bits in sorted(set(checkpoint.scheme.bits.values())))
            raise BadInput(f"to gguf: has linears of {found} bits, and 4 (Q4_0) and 8 (Q8_0) alone can be said, in "
                           "groups of 32; quantize with --scheme w4a16-g32 --candidate-bits 4,8")  # fmt: skip
        raise BadInput(
            f"to gguf: {checkpoint.scheme.name} cannot be said in it; quantize to w4a16-g32 (Q4_0) or w8a16-g32 "
            "(Q8_0), or export to safetensors first and give that folder"
        )


def _rope_type(checkpoint: QuantizedCheckpoint) -> str:
    return str((checkpoint.stream.config.rope_parameters or {}).get("rope_type", "default"))


def has_rope_factors(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether the rotary embedding is Llama 3's, which the runtime knows for `llama` alone and transformers does not
    read from GGUF."""
    return _rope_type(checkpoint) == "llama3" and GGUF_ARCHITECTURES[checkpoint.stream.config.model_type] == "llama"


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_dim(config: PretrainedConfig) -> int:
    """Leading channels of a head that the rotary embedding turns."""
    return int(_head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def rope_factors(checkpoint: QuantizedCheckpoint) -> Tensor:
    """(r/2,) float32: what each frequency of the plain embedding, theta^(-2i/r), is divided by.

    1 for waves that fit `high_freq_factor` times into the old context, `factor` for those that fit less than
    `low_freq_factor` times, and between them what mixes the frequencies linearly (Llama 3.1).
    """
    options, width = checkpoint.stream.config.rope_parameters, _rotary_dim(checkpoint.stream.config)
    frequency = options["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    fits = options["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    share = ((fits - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / options["factor"])).float()


def _grids(checkpoint: QuantizedCheckpoint) -> list[Grid]:
    """Of all linears, where they are quantized."""
    scheme = checkpoint.scheme
    if scheme is None:
        return []
    return [scheme.grid(name) for name in scheme.bits] if scheme.mixed else [scheme.weights]


def _bits(job: ExportJob, linear: str) -> float:
    scheme = job.checkpoint.scheme
    return 8.0 * job.dtype.itemsize if scheme is None else GGUF_GRIDS[scheme.grid(linear)][1]


def _add_header(writer: GGUFWriter, job: ExportJob) -> None:
    """What the model is, and its tokenizer."""
    config = job.checkpoint.stream.config
    kinds = [GGUF_GRIDS[grid][0] for grid in _grids(job.checkpoint)] or [FLOATS[job.dtype]]
    writer.add_name(job.folder.resolve().name)
    writer.add_file_type(FILE_TYPES[max(kinds, key=kinds.count)])
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_rotary_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    job.notes.extend(add_tokenizer(writer, job.folder, config.vocab_size))


def write_gguf(scratch: Path, job: ExportJob) -> None:
    """Write model.gguf and config.json."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    checkpoint, dtype = job.checkpoint, job.dtype
    stream, arch = checkpoint.stream, GGUF_ARCHITECTURES[checkpoint.stream.config.model_type]
    writer = GGUFWriter(scratch / "model.gguf", arch)
    _add_header(writer, job)
    number = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, stream.layers)
    linears = {f"{linear.name}.weight": linear for linear in checkpoint.linears()}

    def made(name: str) -> tuple[np.ndarray[Any, Any], str]:
        """What is stored of a tensor, as bytes, and its type."""
        order = _order(name, checkpoint) if arch == "llama" else None
        if checkpoint.scheme is not None and name in linears:
            rounded = checkpoint.rounded(linears[name])
            kind = GGUF_GRIDS[rounded.grid][0]
            return _blocks(rounded, order, kind), kind
        value = stream.read_stored([name])[name]
        stored = in_dtype(name, value, dtype if value.ndim == 2 else torch.float32)
        stored = stored if order is None else stored[order]
        return stored.contiguous().view(torch.uint8).numpy(), FLOATS[stored.dtype]

    factors = rope_factors(checkpoint).numpy() if has_rope_factors(checkpoint) else None
    # Twice over all tensors: what they are comes before their values, and all of them are not held at once.
    for values in (False, True):
        if values:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        if factors is not None and values:
            writer.write_tensor_data(factors)
        elif factors is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes, GGMLQuantizationType.F32
            )
        for name in stream.expected:
            data, of_type = made(name)
            if values:
                writer.write_tensor_data(data)
            else:
                title = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor_info(title, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[of_type])
    writer.close()
    write_json(scratch / "config.json", job.config)
    if has_rope_factors(checkpoint):
        job.loaders[-1:] = [WITH_CONFIG]
        job.notes.append("transformers reads no rotary scaling from GGUF and answers wrongly without the config given")


def _order(name: str, checkpoint: QuantizedCheckpoint) -> Tensor | None:
    """Where each row of a query or key projection comes from: pairs (i, i + h/2) of a head become neighbours."""
    config = checkpoint.stream.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if name.endswith(f".self_attn.{part}.weight")), None)
    if count is None:
        return None
    return torch.arange(count * _head_dim(config)).view(count, 2, -1).transpose(1, 2).flatten()


def _blocks(rounded: Rounded, order: Tensor | None, kind: str) -> np.ndarray[Any, Any]:
    """(out, bytes): of each 32 weights a scale in half precision, then their codes."""
    codes, scale = rounded.codes, as_stored(rounded.scale, torch.float16)
    if order is not None:
        codes, scale = codes[order], scale[order]
    groups = codes.unflatten(1, (-1, 32))
    if kind == "Q4_0":
        numbers = (groups + 8).to(torch.uint8)
        groups = numbers[..., :16] | (numbers[..., 16:] << 4)
    scales = scale[..., None].contiguous().view(torch.uint8)
    return torch.cat([scales, groups.contiguous().view(torch.uint8)], 2).flatten(1).numpy()


def _in_memory(job: ExportJob, of: Format) -> int:
    """transformers reads the weights into floats."""
    return 4 * sum(torch.Size(shape).numel() for shape in job.checkpoint.stream.expected.values())


ENTRIES = {
    "gguf": Format(
        write_gguf,
        _bits,
        _check,
        dtype=lambda checkpoint: torch.float16,
        in_memory=_in_memory,
        runner=Runner(("transformers", "gguf"), partial(transformers_answers, gguf=True)),
    )
}
