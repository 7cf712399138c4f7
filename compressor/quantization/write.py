"""What a quantization leaves in OUT: tensors under their stored names, config, recipe, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.jobs.cost import OF_STEP, OF_TENSOR
from calib.jobs.output_folder import write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.attention_hooks import as_configured
from calib.model.blockwise import BlockwiseModel
from calib.model.companions import companions, copy_companions
from calib.model.config import read_json
from calib.quant.scheme import Scheme
from compressor.engine.blockwise_runs import EmbeddingAndHead
from compressor.engine.load import plainly_loadable, save_runtime_transforms, serving_note, stored_linears
from compressor.quantization.options import UNROUNDED
from compressor.quantization.quantized_model import QuantizationResult, QuantizedModel
from compressor.quantization.rounding import RoundedBlock
from compressor.quantization.transforms import unsupported_transforms
from compressor.report.quantization import quantized_page
from compressor.storage.codecs import codec_of
from compressor.storage.quantized_linear import stacked


def stored_ends(stream: BlockwiseModel, ends: EmbeddingAndHead) -> dict[str, Tensor]:
    """Embedding, final norm and head under their names on disk."""
    a, weights = stream.architecture, stream.weights.entries
    gain = (ends.final_gain - a.gain_offset).to(weights[f"{a.final_norm}.weight"].dtype)
    stored = {f"{a.embed}.weight": ends.embedding, f"{a.final_norm}.weight": gain}
    return stored if ends.head is None else stored | {f"{a.head}.weight": ends.head}


def stored_block(stream: BlockwiseModel, index: int, block: RoundedBlock, scheme: Scheme) -> dict[str, Tensor]:
    """A block's tensors under their names on disk, linears that the checkpoint keeps together put together again."""
    a, prefix = stream.architecture, f"{stream.architecture.blocks}.{index}"
    rest, linears = dict(block.rest), dict(block.linears)
    for norm in a.norms if a.gain_offset else ():
        name = f"{norm}.weight"
        rest[name] = (rest[name] - a.gain_offset).to(stream.stored_dtype(index, name))
    for whole, parts in a.fused.items():
        if parts[0] in linears:
            linears[whole] = stacked([linears.pop(part) for part in parts])
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in rest:
                rest[f"{whole}.{kind}"] = torch.cat([rest.pop(f"{part}.{kind}") for part in parts])
    stored = {f"{prefix}.{name}": tensor for name, tensor in rest.items()}
    for name, rounded in linears.items():
        stored |= codec_of(scheme).encode(f"{prefix}.{name}", rounded, scheme)
    return stored


def bytes_in_out(stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool) -> int:
    """Codes with their scales and zero points, and everything else as it is; scheme None: there are no codes."""
    return sum(parts_in_out(stream, scheme, untied=untied).values())


def parts_in_out(
    stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool, mean_bits: float | None = None
) -> dict[str, int]:
    """Bytes of each part of the output: linears, embedding, head, and all else.  `mean_bits` of a code, where bits are
    allocated, instead of the scheme's."""
    architecture, linear = stream.architecture, 0.0
    ends = {f"{architecture.embed}.weight": "embedding", f"{architecture.head}.weight": "head"}
    found = {"linears": 0, "embedding": 0, "head": 0, "other": 0}
    linears = _stored_names(stream)
    for name, entry in stream.weights.entries.items():
        if scheme is not None and name.endswith(linears) and len(entry.shape) == 2:
            bits = scheme.bits_per_weight(name.removesuffix(".weight"), entry.shape[1], entry.dtype.itemsize * 8)
            bits += 0 if mean_bits is None else mean_bits - scheme.weights.bits
            linear += entry.shape[0] * entry.shape[1] * bits / 8
        else:
            found["linears" if name.endswith(linears) else ends.get(name, "other")] += entry.bytes
    if untied and stream.config.tie_word_embeddings:
        found["head"] = found["embedding"]
    return found | {"linears": found["linears"] + int(linear)}


DESCRIBED, OF_LINEAR, OF_PART = 40_000, 2_200, 2_600  # bytes of the report, its page and the recipe


def bytes_beside(
    folder: Path, stream: BlockwiseModel, scheme: Scheme | None, *, steps: int, parts: int, rotated_keys: bool
) -> int:
    """About what OUT holds beside its tensors: files of the model in `folder` that go with it, headers, config, recipe
    and report, those of a job of so many steps and of so many parts with bits of their own."""
    linears = {n.removesuffix(".weight") for n in stream.expected if n.endswith(_stored_names(stream))}
    names = list[str]()
    for name in stream.expected:
        linear = name.removesuffix(".weight")
        names += [name] if scheme is None or linear not in linears else codec_of(scheme).names(linear, scheme)
    files = [Path("config.json"), *companions(folder)]
    sizes = stream.sizes
    keys = sizes.layers * sizes.kv_heads * sizes.head_dim**2 * 4 if rotated_keys else 0
    described = DESCRIBED + OF_LINEAR * len(linears) + OF_STEP * steps + OF_PART * parts
    return (
        sum((folder / file).stat().st_size for file in files)
        + sum(len(n) + OF_TENSOR for n in names)
        + keys
        + described
    )


def _stored_names(stream: BlockwiseModel) -> tuple[str, ...]:
    return tuple(f".{name}.weight" for name in stored_linears(stream.architecture))


def report_of(
    result: QuantizationResult, identity: Mapping[str, Any], stored_bytes: int, *, rounded: bool
) -> dict[str, Any]:
    """The report, as JSON values, of a job with this `identity`.  Where not `rounded`, the output is a plain model."""
    stream, scheme, ends = result.model.stream, result.model.scheme, result.model.ends
    before, after = result.before, result.after
    layers = [
        {
            "name": f"{stream.architecture.blocks}.{i}.{name}",
            "output_error": after[i][name]["output_error"],
            "tokens": after[i][name]["tokens"],
            "before": before[i][name],
            "after": {part: after[i][name][part] for part in ("activations", "weights")},
        }
        for i in range(stream.sizes.layers)
        for name in stream.architecture.linears
    ]
    experts = [after[i][up]["tokens"] for i in range(stream.sizes.layers) for up in stream.architecture.ups]
    reached = {"experts": {"all": len(experts), "unreached": experts.count(0), "fewest_tokens": min(experts)}}
    return {
        "job": "quantize",
        "scheme": scheme.name if rounded else f"{scheme.name}, transformed but not rounded",
        "quality": result.final,
        "quality_by_stage": result.figures,
        "bytes": {"before": sum(e.bytes for e in stream.weights.entries.values()), "after": stored_bytes},
        "left_out": unsupported_transforms(stream.architecture),
        "untied": bool(stream.config.tie_word_embeddings) and ends.head is not None,
        "loaders": serving_note(
            scheme if rounded else None,
            online=any(o.hadamard_down or o.key_rotation is not None for o in result.model.online),
            experts=stream.architecture.experts is not None,
            capped=bool(as_configured(stream.config.to_dict())),
        ),
        "data": identity["data"],
        **(reached if stream.architecture.experts else {}),
        "curves": {name: one.curve for name, one in result.learning.items()},
        "layers": layers,
    }


def write_descriptions(
    scratch: Path, folder: Path, model: QuantizedModel, identity: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """Write everything in the output that is no weight: config, tokenizer, run-time transforms, recipe, report."""
    stream, scheme = model.stream, model.scheme
    config = read_json(folder / "config.json")
    hadamard_down = any(o.hadamard_down for o in model.online)
    config["tie_word_embeddings"] = model.ends.head is None
    config.pop("auto_map", None)
    rounded = identity["options"]["rounding"] != UNROUNDED
    if rounded:
        config["quantization_config"] = codec_of(scheme).config(
            scheme,
            plain=plainly_loadable(scheme, stream.architecture, hadamard_down=hadamard_down),
            dtype=str(stream.stored_dtype(0, f"{stream.architecture.q}.weight")).removeprefix("torch."),
        )
    write_json(scratch / "config.json", config)
    copy_companions(folder, scratch)
    save_runtime_transforms(scratch, model.online)
    step = {
        "job": "quantize",
        **identity,
        **({**scheme.recorded, "hadamard_down": hadamard_down} if rounded else {}),
        "quality": report["quality"],
    }
    write_described(scratch, report, [*past_of(folder), step], quantized_page)
