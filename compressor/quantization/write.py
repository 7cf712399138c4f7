"""What a quantization leaves in OUT: tensors under their stored names, config, recipe, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.blockwise.linears import put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.jobs.cost import OF_STEP, OF_TENSOR
from calib.jobs.output_folder import write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.companions import companions, copy_companions
from calib.model.config import as_configured, read_json
from calib.model.task import WRITERS, Task
from calib.probe.find import found_parts
from calib.quant.scheme import Scheme
from compressor.engine.load import only_here, plainly_loadable, save_runtime_transforms, serving_note
from compressor.quantization.options import UNROUNDED
from compressor.quantization.quantized_model import Profile, QuantizationResult, QuantizedModel
from compressor.quantization.rounding import RoundedBlock
from compressor.report.quantization import quantized_page
from compressor.storage.codecs import codec_of

# Types whose loader in vLLM skips a stored head, or wants the two to be one, whatever the config says (its commandr.py,
# opt.py, gemma.py, gemma2.py and mpt.py): with two tables it would answer wrongly.
ONE_TABLE_SERVED = {"cohere", "cohere2", "opt", "gemma", "gemma2", "mpt"}


def stored_outer(stream: BlockwiseModel, outer: Params) -> dict[str, Tensor]:
    """Name what is no block's as on disk; one tensor under two names is stored once, under the first."""
    stored, seen = dict[str, Tensor](), set[int]()
    for name, tensor in sorted(outer.items(), key=lambda item: item[0] in stream.tied):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            stored |= stream.as_stored(name, tensor)
    return stored


def stored_block(stream: BlockwiseModel, index: int, block: RoundedBlock, scheme: Scheme) -> dict[str, Tensor]:
    """A block's tensors under their names on disk."""
    stored = dict[str, Tensor]()
    for name, tensor in (block.rest | put_together(stream.linears(index), block.unrounded)).items():
        stored |= stream.as_stored(f"{stream.block_name(index)}.{name}", tensor)
    for name, rounded in block.linears.items():
        stored |= codec_of(scheme).encode(name, rounded, scheme)
    return stored


def bytes_in_out(stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool) -> int:
    """Codes with their scales and zero points, and everything else as it is; scheme None: there are no codes."""
    return sum(parts_in_out(stream, scheme, untied=untied).values())


def parts_in_out(
    stream: BlockwiseModel, scheme: Scheme | None, *, untied: bool, mean_bits: float | None = None
) -> dict[str, int]:
    """Bytes of each part of the output: linears, embedding, head, and all else.  `mean_bits` of a code, where bits are
    allocated, instead of the scheme's."""
    linear, found = 0.0, {"linears": 0, "embedding": 0, "head": 0, "other": 0}
    shapes = _linear_shapes(stream)
    ends = {stream.entry(name): "embedding" for name in stream.walk.entering}
    ends |= {stream.entry(name): "head" for name in stream.walk.leaving if name not in stream.tied}
    for name, entry in stream.weights.entries.items():
        if scheme is not None and name in shapes:
            out, width = shapes[name]
            bits = scheme.bits_per_weight(name.removesuffix(".weight"), width, entry.dtype.itemsize * 8)
            bits += 0 if mean_bits is None else mean_bits - scheme.weights.bits
            linear += out * width * bits / 8 + 4 * _numbers_apart(scheme)
        else:
            table = len(entry.shape) == 2  # not a norm on the way
            found["linears" if name in shapes else ends.get(entry, "other") if table else "other"] += entry.bytes
    if untied and stream.tied:
        found["head"] = found["embedding"]
    return found | {"linears": found["linears"] + int(linear)}


def _numbers_apart(scheme: Scheme) -> int:
    """Numbers that a linear has beside its scales: what those, or its inputs', are multiples of."""
    return (scheme.weights.scales == "e4m3") + scheme.has_fixed_inputs


def _linear_shapes(stream: BlockwiseModel) -> dict[str, tuple[int, int]]:
    """Names on disk of the weights that are quantized -> (out, in)."""
    return {f"{one.name}.weight": one.shape for i in range(stream.layers) for one in stream.linears(i)}


DESCRIBED, OF_LINEAR, OF_PART = 40_000, 2_200, 2_600  # bytes of the report, its page and the recipe


def bytes_beside(
    folder: Path, stream: BlockwiseModel, scheme: Scheme | None, *, steps: int, parts: int, rotated_keys: bool
) -> int:
    """About what OUT holds beside its tensors: files of the model in `folder` that go with it, headers, config, recipe
    and report, those of a job of so many steps and of so many parts with bits of their own."""
    linears = {name.removesuffix(".weight") for name in _linear_shapes(stream)}
    names = list[str]()
    for name in stream.expected:
        linear = name.removesuffix(".weight")
        names += [name] if scheme is None or linear not in linears else codec_of(scheme).names(linear, scheme)
    files = [Path("config.json"), *companions(folder)]
    keys = 0
    if rotated_keys:
        layers = [layer for found in found_parts(stream).blocks for layer in found.attention]
        keys = sum(layer.kv_heads * layer.width**2 * 4 for layer in layers)
    described = DESCRIBED + OF_LINEAR * len(linears) + OF_STEP * steps + OF_PART * parts
    return (
        sum((folder / file).stat().st_size for file in files)
        + sum(len(n) + OF_TENSOR for n in names)
        + keys
        + described
    )


def report_of(
    result: QuantizationResult, identity: Mapping[str, Any], stored_bytes: int, *, rounded: bool
) -> dict[str, Any]:
    """The report, as JSON values, of a job with this `identity`.  Where not `rounded`, the output is a plain model."""
    stream, scheme, outer = result.model.stream, result.model.scheme, result.model.outer
    before, after = result.before, result.after
    layers, experts = list[dict[str, Any]](), list[int]()
    for i in range(stream.layers):
        for one in stream.linears(i):
            notes = after[i][one.name]
            layers.append(
                {
                    "name": one.name,
                    "output_error": notes["output_error"],
                    "tokens": notes["tokens"],
                    "before": before[i][one.name],
                    "after": {part: notes[part] for part in ("activations", "weights")},
                }
            )
            experts += [notes["tokens"]] if one.step == "down" else []
    reached = {}
    if experts:
        reached = {"experts": {"all": len(experts), "unreached": experts.count(0), "fewest_tokens": min(experts)}}
    return {
        "job": "quantize",
        "scheme": scheme.name if rounded else f"{scheme.name}, transformed but not rounded",
        "quality": result.final,
        "quality_by_stage": result.figures,
        "bytes": {"before": sum(e.bytes for e in stream.weights.entries.values()), "after": stored_bytes},
        "untied": is_untied(stream, outer),
        "loaders": _loaders(result, experts=bool(experts), rounded=rounded),
        "data": identity["data"],
        **reached,
        **_tuned_blocks(after),
        "curves": {name: one.curve for name, one in result.learning.items()},
        "layers": layers,
    }


def _tuned_blocks(after: Sequence[Profile]) -> dict[str, Any]:
    """What tuning of blocks on their own outputs did to each; nothing where there was none."""
    notes = [next(iter(of.values()), {}).get("block") for of in after]
    return {"blocks": notes} if any(notes) else {}


def _loaders(result: QuantizationResult, *, experts: bool, rounded: bool) -> dict[str, Any]:
    """List the loaders that run the output as it was measured, with notes."""
    model, stream = result.model, result.model.stream
    found = serving_note(
        model.scheme if rounded else None,
        online=any(o.hadamard or o.key_rotation is not None for o in model.online),
        experts=experts,
        capped=bool(as_configured(stream.config.to_dict())),
        only=only_here(stream),
    )
    if stream.task is not Task.CAUSAL_LM:
        found["class"] = stream.task.value
    if stream.task not in WRITERS:
        found["loaders"] = [loader for loader in found["loaders"] if loader != "vLLM"]
        found["notes"] = [note for note in found["notes"] if not note.startswith("vLLM")]
    if is_untied(stream, model.outer) and stream.config.model_type in ONE_TABLE_SERVED:
        found["loaders"] = [loader for loader in found["loaders"] if loader != "vLLM"]
        found["notes"].append("vLLM knows one table alone for embedding and head of such models, and these are two")
    return found


def write_descriptions(
    scratch: Path, folder: Path, model: QuantizedModel, identity: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """Write everything in the output that is no weight: config, tokenizer, run-time transforms, recipe, report."""
    stream, scheme = model.stream, model.scheme
    linears = [one for i in range(stream.layers) for one in stream.linears(i)]
    config = read_json(folder / "config.json")
    hadamard_down = any(o.hadamard for o in model.online)
    if stream.tied:
        config["tie_word_embeddings"] = not is_untied(stream, model.outer)
    config.pop("auto_map", None)
    rounded = identity["options"]["rounding"] != UNROUNDED
    if rounded:
        config["quantization_config"] = codec_of(scheme).config(
            scheme,
            plain=plainly_loadable(
                scheme,
                experts=any(one.step for one in linears),
                elsewhere=only_here(stream) is None,
                hadamard_down=hadamard_down,
            ),
            ignore=stream.left_alone(),
            dtype=str(stream.entry(f"{stream.block_name(0)}.{linears[0].parameter}").dtype).removeprefix("torch."),
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


def is_untied(stream: BlockwiseModel, outer: Params) -> bool:
    """Whether embedding and head were one table, and are two in the output."""
    return any(outer[second] is not outer[first] for second, first in stream.tied.items())
