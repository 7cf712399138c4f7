"""MLX: affine codes of 2 to 8 bits in groups of 32, 64 or 128 inputs, as mlx-lm loads them.

x^ = q scale + bias with unsigned codes q: a symmetric grid has the bias -2^(bits-1) scale, which no dtype rounds, and
zero points that times a scale, which 16 bits would round. mlx-lm reads the names that rotary settings had in a
config.json before transformers 5, and takes its own default where it finds none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput
from calib.quant.grid_types import Grid
from compressor.engine.load import QuantizedCheckpoint
from compressor.exporters.format import ExportJob, Format, in_dtype, stored_in_16_bits, write_shards
from compressor.exporters.repacked import check_codes, grids, repacked, scale_in, scheme_of, usual
from compressor.exporters.runtimes import Runner, mlx_answers
from compressor.storage.compressed_tensors import pack
from compressor.storage.description import WEIGHTS_ALONE, FormatDescription, number_list
from compressor.storage.quantized_linear import Rounded

MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
# Types that mlx-lm 0.32.2 answered alike on tiny models whose rotary base and epsilon are not its defaults: WINDOWED
# ones with a sliding window too, which it drops in the others, SCALED ones with each rotary scaling of ROPES.
MLX_TYPES = {
    "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm4", "gptj", "granite", "helium",
    "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "ministral3", "mistral", "nemotron", "olmo2", "olmo3",
    "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
WINDOWED = {"cohere2", "gemma3_text", "olmo3"}
SCALED = {"gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"}
ROPES = {"default", "linear", "llama3", "yarn"}


def group_of(grid: Grid, width: int) -> int | None:
    """Inputs that share a scale in the result: scales of larger groups, and of whole rows, are repeated.  None where
    no group that MLX knows fits."""
    return next((group for group in MLX_GROUPS if (grid.group or width) % group == 0), None)


def _check(job: ExportJob) -> None:
    check_codes(job, MLX_BITS, "w4a16-g64")
    _check_architecture(job.checkpoint.stream.config)
    for name, grid in grids(job).items():
        if group_of(grid, job.width(name)) is None:
            what = f"groups of {grid.group}" if grid.group else f"rows of {job.width(name)} weights"
            raise BadInput(f"to mlx: its groups are 32, 64 or 128 weights, which {what} ('{name}') are not made of; "
                           "quantize with -g32, or export to gptq or safetensors")  # fmt: skip
    scheme = scheme_of(job)
    if not scheme.weights.symmetric and job.dtype.itemsize == 2:
        raise BadInput(f"to mlx: zero points become biases, which {str(job.dtype).removeprefix('torch.')} would round; "
                       "add --dtype float32, or quantize to a scheme without -asym")  # fmt: skip


def _check_architecture(config: PretrainedConfig) -> None:
    """Raises BadInput where mlx-lm does not know the type, or drops what the config says."""
    kind = config.model_type
    if kind not in MLX_TYPES:
        raise BadInput(f"to mlx: {kind} has not been tried with mlx-lm, only {', '.join(sorted(MLX_TYPES))}; export to "
                       "safetensors and use mlx_lm.convert")  # fmt: skip
    usual_config, window, period = type(config)(), getattr(config, "sliding_window", None), _period(config)
    ropes = {layers: str(rope.get("rope_type", "default")) for layers, rope in _ropes(config).items()}
    unread = {
        rope for layers, rope in ropes.items()
        if rope not in (ROPES if kind in SCALED and layers != "sliding_attention" else {"default"})
    }  # fmt: skip
    dropped = {
        "a sliding window": kind not in WINDOWED and window is not None and window < config.max_position_embeddings,
        "windows in blocks at uneven distances": kind in WINDOWED
        and any(
            (layer == "full_attention") is not (number % period == 0)
            for number, layer in enumerate(config.layer_types, 1)
        ),
        f"rope type '{', '.join(sorted(unread))}'": bool(unread),
        "another activation than most of its type": any(
            getattr(config, name, None) != getattr(usual_config, name, None)
            for name in ("hidden_act", "hidden_activation")
        ),
    }
    for what, there in dropped.items():
        if there:
            raise BadInput(f"to mlx: the model has {what}, which mlx-lm drops or reads otherwise for {kind}; export to "
                           "safetensors")  # fmt: skip


def _ropes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer, "" where one goes for all."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    by_layer = {kind: rope for kind, rope in found.items() if isinstance(rope, dict)}
    return by_layer or {"": found}


def _period(config: PretrainedConfig) -> int:
    """The number of the first block without a window, and so how many there are to each, where they alternate."""
    layers = [*(getattr(config, "layer_types", None) or ()), "full_attention"]
    return layers.index("full_attention") + 1


def _older_names(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of rotary embeddings and of windows under the names of before transformers 5."""
    ropes = _ropes(config)
    rope = dict(ropes.get("", ropes.get("full_attention", {})))
    found: dict[str, Any] = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope
    if "sliding_attention" in ropes:
        found["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    if config.model_type in WINDOWED:
        found["sliding_window_pattern"] = _period(config)
    return found


def _layout(job: ExportJob, name: str, rounded: Rounded) -> dict[str, Tensor]:
    grid, width = rounded.grid, rounded.codes.shape[1]
    scale = scale_in(job, name, rounded.scale, job.dtype)
    bias = in_dtype(f"{name}.biases", -(rounded.zero + 2 ** (grid.bits - 1)) * scale.float(), job.dtype)
    repeats = width // (group_of(grid, width) or width) // scale.shape[1]
    return {
        f"{name}.weight": pack(rounded.codes, grid.bits).view(torch.uint32),
        f"{name}.scales": scale.repeat_interleave(repeats, 1),
        f"{name}.biases": bias.repeat_interleave(repeats, 1),
    }


def _quantization(job: ExportJob) -> dict[str, Any]:
    """The config's `quantization`: what most linears have, and by name what others have, and tables that have none."""
    linears = {name: (group_of(grid, job.width(name)), grid.bits) for name, grid in grids(job).items()}
    most = usual(linears.values())
    keys = ("group_size", "bits")
    others = {name: dict(zip(keys, one, strict=True)) for name, one in linears.items() if one != most}
    shapes = job.checkpoint.stream.expected.items()
    tables = [name.removesuffix(".weight") for name, shape in shapes if len(shape) == 2 and name not in job.linears]
    return {**dict(zip(keys, most, strict=True)), "mode": "affine", **others, **dict.fromkeys(tables, False)}


def _write(folder: Path, job: ExportJob) -> None:
    quantization = _quantization(job)
    config = job.config | _older_names(job.checkpoint.stream.config)
    config |= {"quantization": quantization, "quantization_config": quantization}
    write_shards(folder, job, repacked(job, lambda name, rounded: _layout(job, name, rounded)), config)


def _bits(job: ExportJob, linear: str) -> float:
    grid, width = scheme_of(job).grid(linear), job.width(linear)
    return grid.bits + 2 * 8 * job.dtype.itemsize / (group_of(grid, width) or width)


def _dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """That of the scales, so that none is rounded."""
    entries, name = checkpoint.stream.weights.entries, checkpoint.linears()[0].name
    found = entries.get(f"{name}.weight_scale", entries.get(f"{name}.weight"))  # floats yet, whose scales have theirs
    if checkpoint.scheme is None or found is None or not found.dtype.is_floating_point or found.dtype.itemsize == 1:
        return stored_in_16_bits(checkpoint)
    return found.dtype


_ABOUT = FormatDescription(
    title="MLX, affine",
    contents="the codes and scales as they are; scales of larger groups and of channels are repeated",
    bits=number_list(MLX_BITS),
    groups=f"{number_list(MLX_GROUPS[::-1])}, multiples of these, channel",
    zero_points=True,
    mixed=True,
    activations=WEIGHTS_ALONE,
    tables="16 bits",
    readers=(),
    hardware="Apple silicon; CPUs",
    bits_per_weight="b + 32/g",
)
ENTRIES = {
    "mlx": Format(
        _write,
        _bits,
        _check,
        dtype=_dtype,
        in_memory=lambda job, of: 2 * job.expected_bytes(of),  # single precision where it is run
        runner=Runner(("mlx", "mlx_lm"), mlx_answers),
        about=_ABOUT,
    )
}
