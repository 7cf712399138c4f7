"""What a quantization leaves in OUT: tensors under their stored names, config, recipe, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calib.blockwise.linears import put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.jobs.output_folder import write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.companions import copy_companions
from calib.model.config import as_configured, read_json
from calib.model.task import WRITERS, Task
from calib.quant.scheme import Scheme, table_grid_name
from compressor.engine.load import only_here, plainly_loadable, save_runtime_transforms, serving_note
from compressor.formats.served import SERVED_NOTES
from compressor.quantization.embedding.sizes import parts_in_out, sizes_of_choices
from compressor.quantization.embedding.tables import parameters_of
from compressor.quantization.embedding.tied_embedding import ONE_TABLE_SERVED
from compressor.quantization.options import UNROUNDED
from compressor.quantization.quantized_model import Profile, QuantizationResult, QuantizedModel
from compressor.quantization.rounding import RoundedBlock
from compressor.report.quantization import quantized_page
from compressor.storage.codecs import codec_of
from compressor.storage.key_value_scales import stored_scales
from compressor.storage.transform_config import with_hadamard


def stored_outer(model: QuantizedModel) -> dict[str, Tensor]:
    """Name what is no block's as on disk; one tensor under two names is stored once, under the first."""
    stream, scheme, stored, seen = model.stream, model.scheme, dict[str, Tensor](), set[int]()
    tables = parameters_of(stream, scheme)
    for name, tensor in sorted(model.outer.items(), key=lambda item: item[0] in stream.tied):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in tables:
            stored |= codec_of(scheme).encode(tables[name], model.tables[tables[name]], scheme)
        else:
            stored |= stream.as_stored(name, tensor)
    return stored


def stored_block(stream: BlockwiseModel, index: int, block: RoundedBlock, scheme: Scheme) -> dict[str, Tensor]:
    """A block's tensors under their names on disk."""
    stored = dict[str, Tensor]()
    for name, tensor in (block.rest | put_together(stream.linears(index), block.unrounded)).items():
        stored |= stream.as_stored(f"{stream.block_name(index)}.{name}", tensor)
    for name, rounded in block.linears.items():
        stored |= codec_of(scheme).encode(name, rounded, scheme)
    return stored | stored_scales(stream, index, block.keys, scheme)


def report_of(
    result: QuantizationResult, identity: Mapping[str, Any], stored_bytes: int, *, rounded: bool
) -> dict[str, Any]:
    """The report, as JSON values, of a job with this `identity`.  Where not `rounded`, the output is a plain model."""
    stream, scheme, outer = result.model.stream, result.model.scheme, result.model.outer
    stored = scheme if rounded else None
    before, after = result.before, result.after
    layers, experts = list[dict[str, Any]](), list[int]()
    for i in range(stream.layers):
        for one in stream.linears(i):
            notes = after[i][one.name]
            profile = {part: notes[part] for part in ("activations", "weights")}
            layers.append(
                {
                    "name": one.name,
                    "output_error": notes["output_error"],
                    "tokens": notes["tokens"],
                    "before": before[i][one.name] if before else profile,
                    "after": profile,
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
        "parts": parts_in_out(stream, stored, untied=is_untied(stream, outer)),
        "choices": sizes_of_choices(stream, stored, rotates=result.parts.obstacle is None),
        "tables": {
            role: {"name": table[0], "scheme": table_grid_name(table[1]), "error": result.table_errors[role]}
            for role, table in (("embedding", scheme.embedding), ("head", scheme.head))
            if table is not None
        },
        "untied": is_untied(stream, outer),
        "loaders": _loaders(
            result, experts=bool(experts), rounded=rounded, served=identity["options"].get("serve") is not None
        ),
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


def _loaders(result: QuantizationResult, *, experts: bool, rounded: bool, served: bool) -> dict[str, Any]:
    """List the loaders that run the output as it was measured, with notes.  `served`: Hadamards at run time are written
    for vLLM."""
    model, stream = result.model, result.model.stream
    found = serving_note(
        model.scheme if rounded else None,
        online=not served and any(o.hadamard or o.key_rotation is not None for o in model.online),
        experts=experts,
        capped=bool(as_configured(stream.config.to_dict())),
        only=only_here(stream),
        one_table=stream.is_tied and not is_untied(stream, model.outer),
    )
    if served:
        found["loaders"] = [loader for loader in found["loaders"] if not loader.startswith("transformers")]
        found["notes"] = [note for note in found["notes"] if not note.startswith("transformers")] + [*SERVED_NOTES]
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
    hadamard_down, served = any(o.hadamard for o in model.online), identity["options"].get("serve") is not None
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
                hadamard_down=hadamard_down and not served,
            ),
            ignore=_left_in_16_bits(stream, scheme),
            dtype=str(stream.entry(f"{stream.block_name(0)}.{linears[0].parameter}").dtype).removeprefix("torch."),
        )
    if served:
        modules = [one.module for one in linears if any(one.name in online.hadamard for online in model.online)]
        config["quantization_config"] = with_hadamard(config["quantization_config"], modules)
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


def _left_in_16_bits(stream: BlockwiseModel, scheme: Scheme) -> list[str]:
    """Names of the modules that a loader would take for quantized by their class, and that are not."""
    head = None if scheme.head is None else stream.head[0].removesuffix(".weight")
    found = [name for name in stream.left_alone() if name != head]
    if scheme.embedding is not None:  # whose group is of all embeddings, as vLLM knows it by its class alone
        every = stream.skeleton.named_modules()
        found += [
            name for name, module in every if isinstance(module, nn.Embedding) and module is not stream.embedding[1]
        ]
    return found


def is_untied(stream: BlockwiseModel, outer: Params) -> bool:
    """Whether embedding and head were one table, and are two in the output."""
    return any(outer[second] is not outer[first] for second, first in stream.tied.items())
