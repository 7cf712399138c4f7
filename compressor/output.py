"""What a quantization leaves in OUT: tensors under their stored names, config, recipe, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.checkpoint import RECIPE, read_json
from calib.corpus import Corpus, describe
from calib.evaluate import Quality
from calib.report import page
from calib.stream import Stream
from calib.writing import copy_tokenizer, write_json
from compressor.formats import compressed_tensors
from compressor.load import save_online, serving_note
from compressor.online import Online
from compressor.rounding import RoundedBlock
from compressor.scheme import Scheme
from compressor.walks import After, Before, Ends


def stored_ends(stream: Stream, ends: Ends) -> dict[str, Tensor]:
    a = stream.anatomy
    stored = {f"{a.embed}.weight": ends.embedding, f"{a.final_norm}.weight": ends.final_gain}
    return stored if ends.head is None else stored | {f"{a.head}.weight": ends.head}


def stored_block(stream: Stream, index: int, block: RoundedBlock, scheme: Scheme) -> dict[str, Tensor]:
    prefix = f"{stream.anatomy.blocks}.{index}"
    stored = {f"{prefix}.{name}": tensor for name, tensor in block.rest.items()}
    for name, rounded in block.linears.items():
        stored |= compressed_tensors.tensors(f"{prefix}.{name}", rounded, scheme)
    return stored


def bytes_in_out(stream: Stream, scheme: Scheme, *, untied: bool) -> int:
    """Codes with their scales and zero points, and everything else as it is."""
    linear, other = 0.0, 0
    linears = tuple(f".{name}.weight" for name in stream.anatomy.linears)
    for name, entry in stream.weights.entries.items():
        if name.endswith(linears) and len(entry.shape) == 2:
            linear += (
                entry.shape[0] * entry.shape[1] * scheme.bits_per_weight(entry.shape[1], entry.dtype.itemsize * 8) / 8
            )
        else:
            other += entry.bytes
    if untied and stream.config.tie_word_embeddings:
        other += stream.weights.entries[f"{stream.anatomy.embed}.weight"].bytes
    return int(linear) + other


def report_of(
    stream: Stream,
    scheme: Scheme,
    run_time: Sequence[Online],
    data: Mapping[str, Corpus],
    before: Before,
    after: After,
    ends: Ends,
    figures: Mapping[str, Quality],
    curves: Mapping[str, list[float]],
    stored_bytes: int,
) -> dict[str, Any]:
    """The report, as JSON values.  `figures` are by stage; the last of them is what the folder in OUT does."""
    layers = [
        {
            "name": f"{stream.anatomy.blocks}.{i}.{name}",
            "output_error": after.errors[i][name],
            "before": before.profiles[i][name],
            "after": after.profiles[i][name],
        }
        for i in range(stream.sizes.layers)
        for name in stream.anatomy.linears
    ]
    by_stage = {stage: quality.asdict() for stage, quality in figures.items()}
    return {
        "job": "quantize",
        "scheme": scheme.name,
        "quality": list(by_stage.values())[-1],
        "quality_by_stage": by_stage,
        "bytes": {"before": sum(e.bytes for e in stream.weights.entries.values()), "after": stored_bytes},
        "untied": bool(stream.config.tie_word_embeddings) and ends.head is not None,
        "loaders": serving_note(scheme, online=any(o.hadamard_down or o.key_rotation is not None for o in run_time)),
        "data": {part: describe(corpus) for part, corpus in data.items()},
        "curves": dict(curves),
        "layers": layers,
    }


def write_descriptions(
    scratch: Path,
    folder: Path,
    stream: Stream,
    scheme: Scheme,
    run_time: Sequence[Online],
    ends: Ends,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    """Everything in OUT that is no weight: config, tokenizer, run-time part, recipe, report."""
    config = read_json(folder / "config.json")
    hadamard_down = any(o.hadamard_down for o in run_time)
    config["tie_word_embeddings"] = ends.head is None
    config.pop("auto_map", None)
    config["quantization_config"] = compressed_tensors.config(scheme, plain=scheme.kv is None and not hadamard_down)
    write_json(scratch / "config.json", config)
    copy_tokenizer(folder, scratch)
    save_online(scratch, run_time)
    step = {
        "job": "quantize",
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in options.items()},
        "model": {"name": folder.resolve().name, "sha256": stream.weights.fingerprint()},
        "data": report["data"],
        "versions": {name: version(name) for name in ("parewell", "torch", "transformers", "safetensors", "numpy")},
        "hadamard_down": hadamard_down,
        "quality": report["quality"],
    }
    write_json(scratch / RECIPE, {"recipe": [step]})
    write_json(scratch / "report.json", report)
    (scratch / "report.html").write_text(page(report), encoding="utf-8")
