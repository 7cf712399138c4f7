"""Quantize a checkpoint: fold, calibrate, learn, round, save (OSTQuant, OpenReview rAcgDBdKnP; GPTQ, arXiv:2210.17323).

Two walks over the blocks with learning between them. The first runs the float model: statistics before, the teacher's
top-k, the float model's own answers on held-out rows. The second transforms, rounds and writes one block at a time,
each fed by the already rounded blocks before it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from calib import BadInput, embedded
from calib.checkpoint import (
    RECIPE,
    Shards,
    check_destination,
    copy_tokenizer,
    find_model,
    read_config,
    read_json,
    read_tokenizer,
    write_json,
    writing,
)
from calib.corpus import Corpus, checked, describe, from_documents, load_corpus, padded, sample
from calib.divergence import KL_TOP
from calib.evaluate import Quality
from calib.job import option, pick_device
from calib.progress import stage
from calib.report import page
from calib.stream import Stream
from calib.weights import Weights
from compressor.formats import compressed_tensors
from compressor.learn import Transforms, initial, learn
from compressor.load import save_online, serving_note
from compressor.match import Objective
from compressor.rotate import INITS
from compressor.rounding import ROUNDINGS, RoundedBlock
from compressor.scheme import Scheme
from compressor.tune import tune
from compressor.walks import (
    After,
    Before,
    Ends,
    float_walk,
    quality,
    rounding_walk,
    run_rounded,
    run_time,
    transformed_ends,
)


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Options of a quantization job; also what its recipe records."""

    scheme: str = option("w4a16-g64", "what gets how many bits")
    data: Path | None = option(None, "calibration text, .jsonl or .safetensors token ids; default: the embedded text")
    samples: int = option(128, "calibration rows")
    length: int = option(512, "tokens per row")
    by_document: bool = option(False, "one document per row, padded, instead of packed rows")
    held_out: int = option(16, "further rows of the same data, not calibrated on, that the figures are measured on")
    held_out_data: Path | None = option(None, "measure the figures on all rows of this file instead")
    init: str = option("hadamard", "where rotations start; none: no transforms at all", choices=INITS)
    learn: bool = option(True, "learn the transforms")
    steps: int = option(100, "steps of learning")
    batch: int = option(4, "rows per step")
    lr_rotation: float = option(0.1, "learning rate of rotations, about radians per step")
    lr_scale: float = option(0.02, "learning rate of the scales' logarithms")
    loss: str = option("tail", "which KL-Top is learned", choices=tuple(KL_TOP))
    top_k: int = option(256, "tokens kept of each of the float model's distributions")
    cross_entropy: float = option(0.0, "weight of plain cross-entropy beside the loss")
    tune_steps: int = option(0, "steps of tuning scales and norm gains after rounding, codes fixed")
    lr_tune: float = option(0.01, "learning rate of tuning")
    rounding: str = option("gptq", "how codes are chosen", choices=ROUNDINGS)
    damp: float = option(0.01, "GPTQ's ridge, as a fraction of the mean diagonal of X^T X")
    online: bool | None = option(
        None, "run-time Hadamards, which only compressor.load can run; default: where activations or keys have < 8 bits"
    )
    memory_budget: float = option(2.0, "GiB of hidden states held in RAM before they go to disk")
    seed: int = option(0, "seed of rotations, rows and batches")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        Scheme.parse(self.scheme)
        at_least = {"samples": 1, "length": 2, "held_out": 1, "steps": 1, "batch": 1, "top_k": 1, "tune_steps": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr_rotation", "lr_scale", "lr_tune", "cross_entropy", "damp", "memory_budget"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name, allowed in (("init", INITS), ("loss", tuple(KL_TOP)), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(allowed)}")
        if self.init == "none" and self.learn:
            raise BadInput("init none leaves nothing to learn; add --no-learn or choose another init")
        if self.init == "none" and self.online:
            raise BadInput("init none means no transforms, online ones included; leave out --online")


def quantize(model: str | Path, out: str | Path, how: Quantize | None = None) -> dict[str, Any]:
    """Quantize MODEL (a folder or a hub name) into the folder OUT.  -> the report, as in OUT/report.json.

    Raises BadInput, before anything is written, where MODEL, the data or OUT will not do.
    """
    how, out = how or Quantize(), Path(out)
    scheme = Scheme.parse(how.scheme)
    folder = find_model(model)
    config = read_config(folder)
    stream = Stream(config, Weights(folder), pick_device(how.device))
    scheme.check_widths(stream.sizes.inputs(stream.anatomy))
    calibration, held_out = _rows(folder, stream, how)
    check_destination(out, folder, _bytes_needed(stream, scheme, how, len(calibration.ids) + len(held_out.ids)))
    stream.weights.verify(dict(stream.skeleton.named_parameters()))
    with writing(out) as scratch:
        budget = int(how.memory_budget * 2**30)
        learning = how.learn and how.init != "none"
        before = float_walk(
            stream, calibration, held_out, how.top_k if learning or how.tune_steps else 0, budget, scratch
        )
        curves: dict[str, list[float]] = {}
        transforms = None
        if how.init != "none":
            transforms = initial(stream, how.init, scheme, online=_online(how, scheme), seed=how.seed)
        if transforms and before.top and learning:
            with stage("learn", how.steps, "steps") as done:
                transforms, curves["learn"] = learn(
                    stream,
                    calibration,
                    before.top,
                    transforms,
                    scheme.weights,
                    _objective(how, how.steps),
                    lr_rotation=how.lr_rotation,
                    lr_scale=how.lr_scale,
                    after_step=lambda _, loss: done(f"loss {loss:.4f}"),
                )
        ends, shards = transformed_ends(stream, transforms), Shards(scratch)
        shards.add(_stored_ends(stream, ends))
        rounded: list[RoundedBlock] = []

        def store(index: int, block: RoundedBlock) -> None:
            shards.add(_stored_block(stream, index, block, scheme))

        after = rounding_walk(
            stream,
            calibration,
            held_out,
            ends,
            transforms,
            scheme,
            (lambda _, block: rounded.append(block)) if how.tune_steps else store,
            rounding=how.rounding,
            damp=how.damp,
            budget=budget,
            folder=scratch,
        )
        figures = {"rounded": quality(stream, held_out, ends, after.held_out, before)}
        if how.tune_steps and before.top:
            online = [run_time(scheme, transforms, i) for i in range(stream.sizes.layers)]
            with stage("tune", how.tune_steps, "steps") as done:
                tuned, curves["tune"] = tune(
                    stream,
                    calibration,
                    before.top,
                    ends,
                    rounded,
                    online,
                    _objective(how, how.tune_steps),
                    lr=how.lr_tune,
                    after_step=lambda _, loss: done(f"loss {loss:.4f}"),
                )
            states = run_rounded(stream, held_out, ends, tuned, online)
            figures["tuned"] = quality(stream, held_out, ends, states, before)
            for i, block in enumerate(tuned):
                store(i, block)
        shards.close()
        report = _report(stream, scheme, how, calibration, held_out, before, after, figures, curves, shards.bytes)
        _describe(scratch, folder, stream, scheme, transforms, how, report)
    return report


def _objective(how: Quantize, steps: int) -> Objective:
    return Objective(steps=steps, batch=how.batch, loss=how.loss, cross_entropy=how.cross_entropy, seed=how.seed)


def _stored_ends(stream: Stream, ends: Ends) -> dict[str, Tensor]:
    a = stream.anatomy
    stored = {f"{a.embed}.weight": ends.embedding, f"{a.final_norm}.weight": ends.final_gain}
    return stored if ends.head is None else stored | {f"{a.head}.weight": ends.head}


def _stored_block(stream: Stream, index: int, block: RoundedBlock, scheme: Scheme) -> dict[str, Tensor]:
    prefix = f"{stream.anatomy.blocks}.{index}"
    stored = {f"{prefix}.{name}": tensor for name, tensor in block.rest.items()}
    for name, rounded in block.linears.items():
        dtype = stream.weights.entries[f"{prefix}.{name}.weight"].dtype
        stored |= compressed_tensors.tensors(f"{prefix}.{name}", rounded, scheme, dtype)
    return stored


def _rows(folder: Path, stream: Stream, how: Quantize) -> tuple[Corpus, Corpus]:
    """Calibration rows and held-out rows, of one length."""
    tokenizer, vocab = read_tokenizer(folder), stream.sizes.vocab
    read = partial(load_corpus, tokenizer=tokenizer, vocab=vocab, length=how.length, by_document=how.by_document)
    if how.data is not None:
        corpus = read(how.data)
    elif tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer for the embedded text; give token ids with --data")
    else:
        source, documents = "embedded text (Python's language reference)", embedded.python_topics("train")
        corpus = from_documents(documents, tokenizer, length=how.length, source=source, by_document=how.by_document)
        corpus = checked(corpus, vocab)
    if how.held_out_data is None:
        rows = sample(corpus, how.samples + how.held_out, how.seed)
        return rows[: how.samples], rows[how.samples :]
    calibration, held_out = sample(corpus, how.samples, how.seed), read(how.held_out_data)
    length = max(calibration.ids.shape[1], held_out.ids.shape[1])
    return padded(calibration, length), padded(held_out, length)


def _online(how: Quantize, scheme: Scheme) -> bool:
    if how.online is not None:
        return how.online
    return any(grid is not None and grid.bits < 8 for grid in (scheme.activations, scheme.kv))


def _sizes_in_bytes(stream: Stream, scheme: Scheme, *, untied: bool) -> tuple[int, int]:
    """(the linears as codes with scales and zero points, everything else) in OUT."""
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
    return int(linear), other


def _bytes_needed(stream: Stream, scheme: Scheme, how: Quantize, rows: int) -> int:
    hidden = rows * how.length * stream.sizes.hidden * stream.dtype.itemsize
    spilled = 2 * hidden if hidden > how.memory_budget * 2**30 else 0
    return sum(_sizes_in_bytes(stream, scheme, untied=how.init != "none")) + spilled + 2**20


def _report(
    stream: Stream,
    scheme: Scheme,
    how: Quantize,
    calibration: Corpus,
    held_out: Corpus,
    before: Before,
    after: After,
    figures: dict[str, Quality],
    curves: dict[str, list[float]],
    stored_bytes: int,
) -> dict[str, Any]:
    untied = how.init != "none" and bool(stream.config.tie_word_embeddings)
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
    return {
        "job": "quantize",
        "scheme": scheme.name,
        "quality": list(figures.values())[-1].asdict(),
        "quality_by_stage": {name: figure.asdict() for name, figure in figures.items()},
        "bytes": {"before": sum(e.bytes for e in stream.weights.entries.values()), "after": stored_bytes},
        "untied": untied,
        "loaders": serving_note(scheme, online=_online(how, scheme) and how.init != "none"),
        "data": {"calibration": describe(calibration), "held_out": describe(held_out)},
        "curves": curves,
        "layers": layers,
    }


def _describe(
    scratch: Path,
    folder: Path,
    stream: Stream,
    scheme: Scheme,
    transforms: Transforms | None,
    how: Quantize,
    report: dict[str, Any],
) -> None:
    """Everything in OUT that is no weight: config, tokenizer, online part, recipe, report."""
    config = read_json(folder / "config.json")
    online = transforms.online if transforms else []
    plain = scheme.kv is None and not any(o.hadamard_down for o in online)
    if transforms:
        config["tie_word_embeddings"] = False
    config.pop("auto_map", None)
    config["quantization_config"] = compressed_tensors.config(scheme, plain=plain)
    write_json(scratch / "config.json", config)
    copy_tokenizer(folder, scratch)
    save_online(scratch, online)
    recipe = {
        "job": "quantize",
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(how).items()},
        "model": {"name": folder.name, "sha256": stream.weights.fingerprint()},
        "data": report["data"],
        "versions": {name: version(name) for name in ("parewell", "torch", "transformers", "safetensors", "numpy")},
        "hadamard_down": any(o.hadamard_down for o in online),
        "quality": report["quality"],
    }
    parent = folder / RECIPE
    write_json(scratch / RECIPE, {"recipe": [*(read_json(parent)["recipe"] if parent.is_file() else []), recipe]})
    write_json(scratch / "report.json", report)
    (scratch / "report.html").write_text(page(report), encoding="utf-8")
