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
from calib.jobs.output_folder import Shards, check_destination, write_described, write_json, writing
from calib.jobs.recipe import past_of
from calib.model.attention_hooks import as_configured
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.companions import copy_companions, is_companion
from calib.model.config import RECIPE, read_json
from calib.quant.codebooks import TABLES
from calib.runtime.memory import available
from calib.stats.perplexity import compare
from compressor.engine.damage import judged, of_export
from compressor.engine.evaluate import answers, vocabulary
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.engine.load import CAPPED, Opened, open_folder, stored_linears
from compressor.exporters import gguf, merged, onnx, runtimes
from compressor.exporters.options import BNB, LOADERS, Export
from compressor.report.export import exported_page
from compressor.storage import bitsandbytes

WRITERS = {"onnx": ("onnx", "onnxscript", "optimum"), "gguf": ("gguf",)}  # by format, which an extra is called after
WITH_CONFIG = "transformers (gguf_file='model.gguf', config=AutoConfig.from_pretrained(FOLDER))"
BUDGET = 2**31  # bytes of hidden states in RAM
COPIES = 2  # of its weights that a runtime may hold while it starts


def export(
    out: str | Path,
    dst: str | Path,
    how: Export | None = None,
    *,
    gate: Gate | None = None,
    allow_recovery: bool = False,
    allow_damage: bool = False,
) -> dict[str, Any]:
    """Store OUT (a folder or a hub name) as `how` says in the folder DST, and run it.  -> the report.

    A model that was made to forget and is rounded here wants a `gate`, or `allow_recovery`, as for `quantize`. Raises
    BadInput, before anything is written, where OUT does more than the format can say, or DST will not do; Damaged,
    leaving no DST, where what was written answers quite otherwise than OUT (`compressor.engine.damage.of_export`),
    unless `allow_damage`.
    """
    how, dst = how or Export(), Path(dst)
    folder = find_model(out, base_model=how.base_model, dequantize=how.dequantize)
    opened, dtype = checked(folder, dst, how)
    corpus = _held_out(folder, how)
    read_here = how.to in BNB and BNB[how.to] in TABLES and _rows_of_blocks(opened)
    if how.to in BNB and not allow_recovery and (gate is None or not read_here):
        check_unforgetting(folder, measured=read_here)
    stream = opened.stream
    float_model = opened.scheme is None
    sha256 = stream.weights.verify(stream.expected) if float_model else hash_of(folder.glob("*.safetensors"))
    identity = identity_of(how, folder_identity(out, folder, sha256), stream.device, None)
    data = {} if isinstance(corpus, str) else {"held_out": describe(corpus)}
    step = {"job": "export", **identity, "data": data}
    if read_here:
        step |= {"scheme": BNB[how.to], "hadamard_down": False}  # for our own loader
    steps = past_of(folder)
    with writing(dst, expected_bytes(opened, how, dtype)) as scratch:
        notes = _write(scratch, folder, opened, how, dtype)
        loaders = LOADERS[how.to]
        if how.to == "gguf" and gguf.has_rope_factors(opened):
            loaders = [*loaders[:-1], WITH_CONFIG]
            notes.append("transformers reads no rotary scaling from GGUF and answers wrongly without the config given")
        before = sum(entry.bytes for entry in stream.weights.entries.values())
        after = sum(f.stat().st_size for f in _model_files(scratch))
        figures = {"bytes": after, "bits_per_weight": _bits_per_weight(opened, how, dtype)}
        write_json(scratch / RECIPE, {"recipe": [*steps, step | {"quality": figures}]})  # which our loader reads
        ran = dict[str, Any](not_run=corpus) if isinstance(corpus, str) else _run(scratch, opened, corpus, how)
        if "quality" in ran:
            ran["damage"] = judged(
                f"to {how.to}", of_export(ran["quality"], rounds=how.to in BNB), allow=allow_damage,
                instead="try another --to or --dtype",
            )  # fmt: skip
        if gate is not None:
            if read_here:
                ran["recovery"] = gate(scratch)
            else:
                notes.append("not measured whether what was forgotten comes back, as parewell does not read this")
        report = {
            "job": "export",
            "to": how.to,
            "bytes": {"before": before, "after": after},
            "bits_per_weight": figures["bits_per_weight"],
            "loaders": {"loaders": loaders + (["compressor.load"] if read_here else []), "notes": notes},
            "data": data,
            **ran,
        }
        step["quality"] = figures | ran.get("quality", {})
        write_described(scratch, report, [*steps, step], exported_page)
    return report


def _write(scratch: Path, folder: Path, opened: Opened, how: Export, dtype: torch.dtype) -> list[str]:
    """Weights, tokenizer, config.json.  -> what to mind."""
    notes = list[str]()
    raw = {k: v for k, v in read_json(folder / "config.json").items() if k not in _NOT_COPIED}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    copy_companions(folder, scratch)
    if how.to == "onnx":
        onnx.write(scratch, folder, opened)
        if widened := onnx.widened(opened):
            notes.append(f"codes of {widened} bits take 4 or 8 there")
    elif how.to == "gguf":
        notes = gguf.write(scratch, folder, opened, dtype)
    else:
        shards = Shards(scratch)
        for tensors in _stored(opened, how, dtype):
            shards.add(tensors)
        shards.close()
    if as_configured(raw) and how.to not in ("onnx", "gguf"):
        notes.append(CAPPED)
    if how.to in BNB:
        raw["quantization_config"] = bitsandbytes.config(BNB[how.to], raw["dtype"])
        if BNB[how.to] in TABLES and not _rows_of_blocks(opened):
            notes.append("on CPUs with AVX-512 bitsandbytes 0.50 takes wrong scales for rows that 64 does not divide, "
                         "as some here are")  # fmt: skip
    write_json(scratch / "config.json", raw)
    return notes


def _model_files(scratch: Path) -> list[Path]:
    """Every file of a folder that holds weights or a graph, whatever its writer has called it."""
    return [
        file for file in scratch.iterdir()
        if file.is_file() and file.suffix != ".json" and not is_companion(Path(file.name))
    ]  # fmt: skip


def _held_out(folder: Path, how: Export) -> Corpus | str:
    """Rows to run, or why there are none: only rows that are asked for by --data must be there."""
    if not how.held_out:
        return "held-out is 0"
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    length = row_length(how.length, positions if isinstance(positions, int) else None)
    if length < 2:
        return f"the model has positions for {length} token"
    if how.data is not None:
        rows = load_corpus(
            Path(how.data), read_tokenizer(folder), vocab=vocabulary(folder), length=length, rows=how.held_out
        )
        return rows[: how.held_out]
    try:
        rows = embedded_corpus("held-out", folder, read_tokenizer(folder), vocab=vocabulary(folder), length=length)
    except BadInput as reason:
        return str(reason)
    return rows[: how.held_out]


def _run(scratch: Path, opened: Opened, corpus: Corpus, how: Export) -> dict[str, Any]:
    """How well what was written predicts, and how far it is from what it was made of: figures and what ran it, or why
    nothing did.  Raises Failed where its answers are no numbers."""
    vocab = opened.stream.sizes.vocab
    reference = answers(opened, corpus, BUDGET)
    try:
        if how.to == "safetensors":
            name, logits = "parewell", answers(open_folder(scratch, torch.device("cpu")), corpus, BUDGET)
        else:
            if (size := COPIES * _in_memory(opened, how)) > available():
                raise runtimes.NotRun(f"it would take {size / 1e9:.2f} GB of memory; {available() / 1e9:.2f} are free")
            runtime = runtimes.start(scratch, how.to)
            name, logits = runtime.name, runtime.logits(corpus, vocab)
        quality = compare(corpus, vocab, logits, reference).asdict()
    except runtimes.NotRun as reason:
        return {"not_run": str(reason)}
    if any(isinstance(value, float) and not isfinite(value) for value in quality.values()):
        raise Failed(f"to {how.to}: answers of {name} are no numbers; take another --dtype, or parewell evaluate OUT")
    return {"runtime": name, "quality": quality}


def _in_memory(opened: Opened, how: Export) -> int:
    """Bytes: weights as the runtime holds them; those of a GGUF file are read into floats."""
    return expected_bytes(opened, Export() if how.to == "gguf" else how, torch.float32)


_NOT_COPIED = ("quantization_config", "auto_map", "torch_dtype")


def checked(folder: Path, dst: Path, how: Export) -> tuple[Opened, torch.dtype]:
    """The model, and the dtype of what is not quantized.  Raises BadInput."""
    for package in WRITERS.get(how.to, ()):
        if find_spec(package) is None:
            raise BadInput(f"{package}: is not installed; pip install 'parewell[{how.to}]'")
    opened = open_folder(folder, torch.device("cpu"))
    stream, scheme = opened.stream, opened.scheme
    if scheme is not None:
        _check_scheme(folder, opened, how)
    if stream.anatomy.experts and how.to in BNB:
        raise BadInput(
            f"to {how.to}: bitsandbytes cannot hold the experts of {stream.config.model_type}, whose weights "
            "transformers stacks; export to safetensors"
        )
    dtype = getattr(torch, how.dtype) if how.dtype else _dtype_of(opened, how)
    if how.to == "onnx":
        onnx.check(opened)
    if how.to == "gguf":
        gguf.check(folder, opened)
    size = expected_bytes(opened, how, dtype)
    if how.to == "onnx" and size > onnx.LARGEST:
        raise BadInput(
            f"to onnx: {size / 1e9:.1f} GB of weights do not fit into one file of 2 GB; export to safetensors"
        )
    check_destination(dst, [folder], size)
    return opened, dtype


def _check_scheme(folder: Path, opened: Opened, how: Export) -> None:
    scheme = opened.scheme
    assert scheme is not None
    weights = scheme.table_name or f"w{scheme.weights.bits}a16"
    if scheme.activations or scheme.kv or any(o.hadamard_down or o.key_rotation is not None for o in opened.online):
        raise BadInput(
            f"{folder}: rounds or rotates as it runs ({scheme.name}), which {how.to} cannot say; compressor.load runs "
            f"it, and a folder of scheme {weights} can be exported"
        )
    if how.to in BNB and scheme.name == BNB[how.to]:
        raise BadInput(f"{folder}: is {scheme.name} as bitsandbytes has it already; transformers loads it as it is")
    if how.to in BNB:
        raise BadInput(
            f"{folder}: is rounded already ({scheme.name}), and would be a second time; quantize the float model with "
            "--scheme nf4, or with --rounding none and export that"
        )


def _dtype_of(opened: Opened, how: Export) -> torch.dtype:
    if how.to in ("onnx", "gguf"):
        return torch.float32 if how.to == "onnx" else torch.float16
    stored = opened.stream.weights.entries[f"{opened.stream.anatomy.embed}.weight"].dtype
    return stored if stored.itemsize == 2 else torch.bfloat16


def _linears(opened: Opened) -> set[str]:
    """Names on disk of the weights that formats quantize."""
    names = tuple(f".{name}.weight" for name in stored_linears(opened.stream.anatomy))
    return {name for name in opened.stream.expected if name.endswith(names)}


def _stored(opened: Opened, how: Export, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensor by tensor, under the names of DST."""
    linears = _linears(opened)
    for name in opened.stream.expected:
        value = merged.stored(name, opened.stream.read_stored([name])[name], dtype)
        if how.to not in BNB or name not in linears:
            yield {name: value}
        elif how.to == "bnb-int8":
            yield bitsandbytes.int8(name.removesuffix(".weight"), value)
        else:
            yield bitsandbytes.nearest(name.removesuffix(".weight"), value, BNB[how.to])


def _rows_of_blocks(opened: Opened) -> bool:
    shapes = (opened.stream.expected[name] for name in _linears(opened))
    return all(width % bitsandbytes.BLOCK == 0 for _, width in shapes)


def _bits(opened: Opened, how: Export, dtype: torch.dtype, name: str) -> float:
    """Of a weight in the linear that a tensor is of, scales and zero points included."""
    linear, width = name.removesuffix(".weight"), opened.stream.expected[name][1]
    if how.to == "onnx":
        return onnx.bits_per_weight(opened, linear, width)
    if how.to == "gguf":
        return gguf.bits_per_weight(opened, linear, dtype)
    return bitsandbytes.bits_per_weight(BNB[how.to], width) if how.to in BNB else 8.0 * dtype.itemsize


def _bits_per_weight(opened: Opened, how: Export, dtype: torch.dtype) -> float:
    """The mean over all linears of the blocks."""
    sizes = {name: torch.Size(opened.stream.expected[name]).numel() for name in _linears(opened)}
    return sum(size * _bits(opened, how, dtype, name) for name, size in sizes.items()) / sum(sizes.values())


def expected_bytes(opened: Opened, how: Export, dtype: torch.dtype) -> int:
    """What the weights in DST take, as the bits say."""
    linears = _linears(opened)
    bits = 0.0
    for name, shape in opened.stream.expected.items():
        of_each = _bits(opened, how, dtype, name) if name in linears else 8.0 * dtype.itemsize
        bits += torch.Size(shape).numel() * of_each
    return int(bits / 8)
