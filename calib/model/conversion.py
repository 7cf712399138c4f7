"""Plain folders out of what else people have: adapters with their base, GGUF files, checkpoints in few bits.

The library, and peft, do the work; what comes out is checked, so that nothing is half there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from calib import BadInput, first_line
from calib.model.config import as_configured, is_quantized, read_json
from calib.model.weights import WRAPPERS, Weights
from calib.runtime.memory import is_out_of_memory

HEAD_CLASSES = {  # how an architecture's name ends -> the library's class for it
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
DEQUANTIZING_CONFIGS = {  # how a checkpoint was quantized -> the library's config that undoes it
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "mxfp4": "Mxfp4Config",
}
_KINDS = {"SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


def pretrained(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A folder as the library opens it, and what it says of names.  Names that torch.compile, DataParallel or peft have
    wrapped are unwrapped, as `calib.model.weights` does.  Raises BadInput where it cannot be opened."""
    options = as_configured(read_json(folder / "config.json")) | options
    try:
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            key_mapping=dict(WRAPPERS),
            **options,
        )
    except Exception as error:  # the library says it in many ways
        if is_out_of_memory(error):
            raise
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise BadInput(f"{folder}: cannot be opened as a model ({reason.strip()})") from error
    return model, info


def merge_adapters(folder: Path, base: Path, into: Path) -> None:
    """Write the model in the folder `base` with the adapters in `folder` merged into its weights.  Raises BadInput."""
    if find_spec("peft") is None:
        raise BadInput(f"{folder}: holds adapters, which peft merges; pip install 'parewell[lora]'")
    import peft  # not everyone has it

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise BadInput(f"{folder}: has no adapter_model.safetensors; save the adapters as safetensors")
    options = read_json(folder / "adapter_config.json")
    config = read_json(base / "config.json")
    if is_quantized(config):
        raise BadInput(
            f"{base}: is quantized, and adapters are merged into floats; give --base-model of the float model"
        )
    kind = _KINDS.get(str(options.get("task_type"))) or _class_of(config)
    stored = next(iter(Weights(base).entries.values())).dtype
    more = {"num_labels": _labels(file)} if kind == "AutoModelForSequenceClassification" else {}
    model, _ = pretrained(
        getattr(transformers, kind), base, dtype=torch.float32, **{k: v for k, v in more.items() if v}
    )
    try:
        if rows := _vocabulary(file, model):
            model.resize_token_embeddings(rows, mean_resizing=False)  # all of them are then read from the adapters
        with warnings.catch_warnings(action="ignore"):  # that a head of its own is no longer tied: it is written so
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
        with safe_open(file, framework="pt") as shard:
            given = set(shard.keys())
        own = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if strange := sorted((given ^ own) - {name for name in given ^ own if "embed" in name or "lm_head" in name}):
            raise BadInput(f"{folder}: its adapters do not fit {base} ('{strange[0]}'); give --base-model")
        if not hasattr(adapted, "merge_and_unload"):
            raise BadInput(f"{folder}: has {options.get('peft_type')} adapters, which cannot be merged; give a LoRA")
        with warnings.catch_warnings(action="ignore"):  # as above
            merged = adapted.merge_and_unload(safe_merge=True)
    except BadInput:
        raise
    except (Exception, SafetensorError) as error:  # peft says it in many ways
        if is_out_of_memory(error):
            raise
        raise BadInput(
            f"{folder}: its adapters cannot be merged into {base} ({first_line(error)}); give --base-model"
        ) from error
    merged.to(stored).save_pretrained(into)


def _vocabulary(file: Path, model: Any) -> int | None:
    """Rows of embeddings that are kept whole among the adapters, where those are of another number than the model's: it
    was trained with tokens added."""
    with safe_open(file, framework="pt") as shard:
        ends = ("embed_tokens.weight", "lm_head.weight")
        shapes = [shard.get_slice(n).get_shape() for n in shard.keys() if n.endswith(ends)]  # noqa: SIM118
    found = {int(shape[0]) for shape in shapes} - {model.get_input_embeddings().num_embeddings}
    return found.pop() if len(found) == 1 else None


def _labels(file: Path) -> int | None:
    """Classes of a head that stands among the adapters."""
    with safe_open(file, framework="pt") as shard:
        heads = [n for n in shard.keys() if n.endswith(("classifier.weight", "score.weight", "out_proj.weight"))]  # noqa: SIM118
        return int(shard.get_slice(heads[0]).get_shape()[0]) if heads else None


def dequantize(source: Path, into: Path) -> None:
    """Write the floats that a GGUF file, or a folder in few bits, stands for.  Raises BadInput."""
    options: dict[str, Any] = {}
    if source.is_file():
        folder = source.parent
        if find_spec("gguf") is None:
            raise BadInput(f"{source}: is a GGUF file, which the gguf package reads; pip install 'parewell[gguf]'")
        options |= {"gguf_file": source.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        kind = "AutoModelForCausalLM"
    else:
        folder, config = source, read_json(source / "config.json")
        method = str(config["quantization_config"].get("quant_method"))
        kind = _class_of(config)
        configs = {
            "fp8": "FineGrainedFP8Config",
            "compressed-tensors": "CompressedTensorsConfig",
            "mxfp4": "Mxfp4Config",
        }
        if method in configs:
            options["quantization_config"] = getattr(transformers, configs[method])(dequantize=True)
        elif method != "bitsandbytes":
            raise BadInput(
                f"{source}: is quantized by {method}, of which the library makes no floats; give the model it was made "
                "from"
            )
    try:
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, **options
        )
        if hasattr(model, "dequantize") and "quantization_config" not in options:
            model = model.dequantize()
        floats = dict(model.state_dict())
    except Exception as error:  # the library says it in many ways
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{source}: the library cannot make floats of it ({first_line(error)})") from error
    _write_plain(model, floats, into, source)
    if source.is_file():
        try:
            transformers.AutoTokenizer.from_pretrained(folder, gguf_file=source.name).save_pretrained(into)
        except Exception as error:  # as above
            raise BadInput(f"{source}: its tokenizer cannot be read ({first_line(error)})") from error


def _write_plain(model: Any, floats: Mapping[str, torch.Tensor], into: Path, source: Path) -> None:
    """A fresh model of the same class with these weights: a loaded one remembers that it was quantized."""
    config = model.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        fresh = type(model)(config)
    expected = {name: t.shape for name, t in fresh.state_dict().items()}
    for name, shape in expected.items():
        found = floats.get(name)
        if found is None or found.shape != shape or not found.is_floating_point() or found.element_size() < 2:
            raise BadInput(f"{source}: the library does not make floats of all its weights ('{name}')")
    fresh.load_state_dict({name: floats[name].bfloat16() for name in expected}, assign=True)
    fresh.save_pretrained(into)


def _class_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return next((kind for ending, kind in HEAD_CLASSES.items() if name.endswith(ending)), "AutoModelForCausalLM")
