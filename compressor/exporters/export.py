"""Store a model in the format of another runtime: what `quantize` wrote, codes and scales kept where the format can say
them, or a float model of a known architecture."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput, Failed
from calib.data.corpus import Corpus, describe, embedded_corpus, load_corpus
from calib.data.rows import row_length
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import Shards, atomic_folder, check_destination, write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.attention_hooks import as_configured
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.companions import copy_companions, is_companion
from calib.model.config import RECIPE, read_json
from calib.quant.codebooks import CODEBOOKS
from calib.runtime.memory import available_memory
from calib.stats.perplexity import compare
from compressor.engine.damage import export_damage, judge
from compressor.engine.evaluate import logits_function, vocabulary
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.engine.load import CAPPED, QuantizedCheckpoint, open_checkpoint, stored_linears
from compressor.exporters import gguf, merged, onnx, runtimes
from compressor.exporters.options import BNB, LOADERS, Export
from compressor.report.export import exported_page
from compressor.storage import bitsandbytes

WRITERS = {"onnx": ("onnx", "onnxscript", "optimum"), "gguf": ("gguf",)}  # by format, which an extra is called after
WITH_CONFIG = "transformers (gguf_file='model.gguf', config=AutoConfig.from_pretrained(FOLDER))"
BUDGET = 2**31  # bytes of hidden states in RAM
EXPORT_COPIES = 2  # of its weights that a runtime may hold while it starts


def export(
    out: str | Path,
    dst: str | Path,
    options: Export | None = None,
    *,
    gate: Gate | None = None,
    allow_recovery: bool = False,
    allow_damage: bool = False,
) -> dict[str, Any]:
    """Write a model in the format of another runtime, and run it there where that runtime is installed.

    Args:
        out: an output of parewell's or a float model of a known architecture: a directory or a name on the hub.
        dst: the directory to write; complete or absent.
        options: the format, and the rows on which the result is compared with `out`; default: `Export()`.
        gate: as for `quantize`, for a format that rounds, where the model was made to forget.
        allow_recovery: write such a format without a gate.
        allow_damage: write it even if it answers otherwise than `out`; the report says so.

    Returns:
        The report, as in report.json: sizes, what can load the result, and figures from its runtime.

    Raises:
        BadInput: the format cannot say what the model does, or the destination will not do; nothing was written.
        Damaged: what was written answers otherwise than `out`; nothing is left.
    """
    options, dst = options or Export(), Path(dst)
    folder = find_model(out, base_model=options.base_model, dequantize=options.dequantize)
    checkpoint, dtype = validate_export(folder, dst, options)
    corpus = _held_out(folder, options)
    read_here = options.to in BNB and BNB[options.to] in CODEBOOKS and _rows_of_blocks(checkpoint)
    if options.to in BNB and not allow_recovery and (gate is None or not read_here):
        check_unforgetting(folder, measured=read_here)
    stream = checkpoint.stream
    float_model = checkpoint.scheme is None
    sha256 = stream.weights.verify(stream.expected) if float_model else hash_of(folder.glob("*.safetensors"))
    identity = identity_of(options, folder_identity(out, folder, sha256), stream.device, None)
    data = {} if isinstance(corpus, str) else {"held_out": describe(corpus)}
    step = {"job": "export", **identity, "data": data}
    if read_here:
        step |= {"scheme": BNB[options.to], "hadamard_down": False}  # for our own loader
    steps = past_of(folder)
    with atomic_folder(dst, expected_bytes(checkpoint, options, dtype)) as scratch:
        notes = _write(scratch, folder, checkpoint, options, dtype)
        loaders = LOADERS[options.to]
        if options.to == "gguf" and gguf.has_rope_factors(checkpoint):
            loaders = [*loaders[:-1], WITH_CONFIG]
            notes.append("transformers reads no rotary scaling from GGUF and answers wrongly without the config given")
        before = sum(entry.bytes for entry in stream.weights.entries.values())
        after = sum(f.stat().st_size for f in _model_files(scratch))
        figures = {"bytes": after, "bits_per_weight": _bits_per_weight(checkpoint, options, dtype)}
        write_json(scratch / RECIPE, {"recipe": [*steps, step | {"quality": figures}]})  # which our loader reads
        ran = dict[str, Any](not_run=corpus) if isinstance(corpus, str) else _run(scratch, checkpoint, corpus, options)
        if "quality" in ran:
            ran["damage"] = judge(
                f"to {options.to}", export_damage(ran["quality"], rounds=options.to in BNB), allow=allow_damage,
                instead="try another --to or --dtype",
            )  # fmt: skip
        if gate is not None:
            if read_here:
                ran["recovery"] = gate(scratch)
            else:
                notes.append("not measured whether forgotten knowledge is recovered, as parewell does not read this")
        report = {
            "job": "export",
            "to": options.to,
            "bytes": {"before": before, "after": after},
            "bits_per_weight": figures["bits_per_weight"],
            "loaders": {"loaders": loaders + (["compressor.load"] if read_here else []), "notes": notes},
            "data": data,
            **ran,
        }
        step["quality"] = figures | ran.get("quality", {})
        write_described(scratch, report, [*steps, step], exported_page)
    return report


def _write(
    scratch: Path, folder: Path, checkpoint: QuantizedCheckpoint, options: Export, dtype: torch.dtype
) -> list[str]:
    """Weights, tokenizer, config.json.  -> what to mind."""
    notes = list[str]()
    raw = {k: v for k, v in read_json(folder / "config.json").items() if k not in _NOT_COPIED}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    copy_companions(folder, scratch)
    if options.to == "onnx":
        onnx.write_onnx(scratch, folder, checkpoint)
        if widened := onnx.upcast_params(checkpoint):
            notes.append(f"codes of {widened} bits take 4 or 8 there")
    elif options.to == "gguf":
        notes = gguf.write_gguf(scratch, folder, checkpoint, dtype)
    else:
        shards = Shards(scratch)
        for tensors in _stored(checkpoint, options, dtype):
            shards.add(tensors)
        shards.close()
    if as_configured(raw) and options.to not in ("onnx", "gguf"):
        notes.append(CAPPED)
    if options.to in BNB:
        raw["quantization_config"] = bitsandbytes.bnb_config(BNB[options.to], raw["dtype"])
        if BNB[options.to] in CODEBOOKS and not _rows_of_blocks(checkpoint):
            notes.append("on CPUs with AVX-512 bitsandbytes 0.50 takes wrong scales for rows that 64 does not divide, "
                         "as some here are")  # fmt: skip
    write_json(scratch / "config.json", raw)
    return notes


def _model_files(scratch: Path) -> list[Path]:
    """Every file of a folder that holds weights or a graph, whatever its writer has called it."""
    return [
        file for file in scratch.iterdir()
        if file.is_file() and file.suffix not in (".json", ".md") and not is_companion(Path(file.name))
    ]  # fmt: skip


def _held_out(folder: Path, options: Export) -> Corpus | str:
    """Rows to run, or why there are none: only rows that are asked for by --data must be there."""
    if not options.held_out:
        return "held-out is 0"
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    length = row_length(options.length, positions if isinstance(positions, int) else None)
    if length < 2:
        return f"the model has positions for {length} token"
    if options.data is not None:
        rows = load_corpus(
            Path(options.data), read_tokenizer(folder), vocab=vocabulary(folder), length=length, rows=options.held_out
        )
        return rows[: options.held_out]
    try:
        rows = embedded_corpus("held-out", folder, read_tokenizer(folder), vocab=vocabulary(folder), length=length)
    except BadInput as reason:
        return str(reason)
    return rows[: options.held_out]


def _run(scratch: Path, checkpoint: QuantizedCheckpoint, corpus: Corpus, options: Export) -> dict[str, Any]:
    """How well what was written predicts, and how far it is from what it was made of: figures and what ran it, or why
    nothing did.  Raises Failed where its answers are no numbers."""
    vocab = checkpoint.stream.sizes.vocab
    reference = logits_function(checkpoint, corpus, BUDGET)
    try:
        if options.to == "safetensors":
            name, logits = "parewell", logits_function(open_checkpoint(scratch, torch.device("cpu")), corpus, BUDGET)
        else:
            if (size := EXPORT_COPIES * _in_memory(checkpoint, options)) > available_memory():
                raise runtimes.NotRun(
                    f"it would take {size / 1e9:.2f} GB of memory; {available_memory() / 1e9:.2f} are free"
                )
            runtime = runtimes.start(scratch, options.to)
            name, logits = runtime.name, runtime.logits(corpus, vocab)
        quality = compare(corpus, vocab, logits, reference).asdict()
    except runtimes.NotRun as reason:
        return {"not_run": str(reason)}
    if any(isinstance(value, float) and not isfinite(value) for value in quality.values()):
        raise Failed(
            f"to {options.to}: answers of {name} are no numbers; take another --dtype, or parewell evaluate OUT"
        )
    return {"runtime": name, "quality": quality}


def _in_memory(checkpoint: QuantizedCheckpoint, options: Export) -> int:
    """Bytes: weights as the runtime holds them; those of a GGUF file are read into floats."""
    return expected_bytes(checkpoint, Export() if options.to == "gguf" else options, torch.float32)


_NOT_COPIED = ("quantization_config", "auto_map", "torch_dtype")


def validate_export(folder: Path, dst: Path, options: Export) -> tuple[QuantizedCheckpoint, torch.dtype]:
    """The model, and the dtype of what is not quantized.  Raises BadInput."""
    for package in WRITERS.get(options.to, ()):
        if find_spec(package) is None:
            raise BadInput(f"{package}: is not installed; pip install 'parewell[{options.to}]'")
    checkpoint = open_checkpoint(folder, torch.device("cpu"))
    stream, scheme = checkpoint.stream, checkpoint.scheme
    if scheme is not None:
        _check_scheme(folder, checkpoint, options)
    if stream.architecture.experts and options.to in BNB:
        raise BadInput(
            f"to {options.to}: bitsandbytes cannot hold the experts of {stream.config.model_type}, whose weights "
            "transformers stacks; export to safetensors"
        )
    dtype = getattr(torch, options.dtype) if options.dtype else _dtype_of(checkpoint, options)
    if options.to == "onnx":
        onnx.check_onnx(checkpoint)
    if options.to == "gguf":
        gguf.check_gguf(folder, checkpoint)
    size = expected_bytes(checkpoint, options, dtype)
    if options.to == "onnx" and size > onnx.MAX_ONNX_BYTES:
        raise BadInput(
            f"to onnx: {size / 1e9:.1f} GB of weights do not fit into one file of 2 GB; export to safetensors"
        )
    check_destination(dst, [folder], size)
    return checkpoint, dtype


def _check_scheme(folder: Path, checkpoint: QuantizedCheckpoint, options: Export) -> None:
    scheme = checkpoint.scheme
    assert scheme is not None
    weights = scheme.weights_only().name
    if scheme.activations or scheme.kv or any(o.hadamard_down or o.key_rotation is not None for o in checkpoint.online):
        raise BadInput(
            f"{folder}: rounds or rotates as it runs ({scheme.name}), which {options.to} cannot say; compressor.load "
            f"runs it, and a folder of scheme {weights} can be exported"
        )
    if options.to in BNB and scheme.name == BNB[options.to]:
        raise BadInput(f"{folder}: is {scheme.name} as bitsandbytes has it already; transformers loads it as it is")
    if options.to in BNB:
        raise BadInput(
            f"{folder}: is rounded already ({scheme.name}), and would be a second time; quantize the float model with "
            "--scheme nf4, or with --rounding none and export that"
        )


def _dtype_of(checkpoint: QuantizedCheckpoint, options: Export) -> torch.dtype:
    if options.to in ("onnx", "gguf"):
        return torch.float32 if options.to == "onnx" else torch.float16
    stored = checkpoint.stream.weights.entries[f"{checkpoint.stream.architecture.embed}.weight"].dtype
    return stored if stored.itemsize == 2 else torch.bfloat16


def _linears(checkpoint: QuantizedCheckpoint) -> set[str]:
    """Names on disk of the weights that formats quantize."""
    names = tuple(f".{name}.weight" for name in stored_linears(checkpoint.stream.architecture))
    return {name for name in checkpoint.stream.expected if name.endswith(names)}


def _stored(checkpoint: QuantizedCheckpoint, options: Export, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensor by tensor, under the names of DST."""
    linears = _linears(checkpoint)
    for name in checkpoint.stream.expected:
        value = merged.stored(name, checkpoint.stream.read_stored([name])[name], dtype)
        if options.to not in BNB or name not in linears:
            yield {name: value}
        elif options.to == "bnb-int8":
            yield bitsandbytes.int8(name.removesuffix(".weight"), value)
        else:
            yield bitsandbytes.nearest_on_table(name.removesuffix(".weight"), value, BNB[options.to])


def _rows_of_blocks(checkpoint: QuantizedCheckpoint) -> bool:
    shapes = (checkpoint.stream.expected[name] for name in _linears(checkpoint))
    return all(width % bitsandbytes.BNB_BLOCK == 0 for _, width in shapes)


def _bits(checkpoint: QuantizedCheckpoint, options: Export, dtype: torch.dtype, name: str) -> float:
    """Of a weight in the linear that a tensor is of, scales and zero points included."""
    linear, width = name.removesuffix(".weight"), checkpoint.stream.expected[name][1]
    if options.to == "onnx":
        return onnx.onnx_bits_per_weight(checkpoint, linear, width)
    if options.to == "gguf":
        return gguf.gguf_bits_per_weight(checkpoint, linear, dtype)
    return bitsandbytes.bnb_bits_per_weight(BNB[options.to], width) if options.to in BNB else 8.0 * dtype.itemsize


def _bits_per_weight(checkpoint: QuantizedCheckpoint, options: Export, dtype: torch.dtype) -> float:
    """The mean over all linears of the blocks."""
    sizes = {name: torch.Size(checkpoint.stream.expected[name]).numel() for name in _linears(checkpoint)}
    return sum(size * _bits(checkpoint, options, dtype, name) for name, size in sizes.items()) / sum(sizes.values())


def expected_bytes(checkpoint: QuantizedCheckpoint, options: Export, dtype: torch.dtype) -> int:
    """What the weights in DST take, as the bits say."""
    linears = _linears(checkpoint)
    bits = 0.0
    for name, shape in checkpoint.stream.expected.items():
        of_each = _bits(checkpoint, options, dtype, name) if name in linears else 8.0 * dtype.itemsize
        bits += torch.Size(shape).numel() * of_each
    return int(bits / 8)
