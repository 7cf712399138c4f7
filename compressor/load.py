"""Load what `quantize` wrote, with everything it does at run time, as a `transformers` model on CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from calib import BadInput, attention
from calib.anatomy import anatomy_of, sizes_of
from calib.checkpoint import RECIPE, find_model, read_json
from calib.weights import Weights
from compressor.formats import compressed_tensors
from compressor.formats.compressed_tensors import is_int_quantized
from compressor.online import Online, install
from compressor.scheme import Scheme

ONLINE_FILE = "parewell.safetensors"


def load(model: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal LM ready to run: OUT of a quantization job, or any float model `transformers` knows.

    Weights are dense in `dtype`: what is saved is disk, not memory. A quantized model rounds activations, keys and
    values as its scheme says. Raises BadInput where the folder is neither.
    """
    folder = find_model(model)
    raw = read_json(folder / "config.json")
    quantization = raw.pop("quantization_config", None)
    if quantization is None:
        Weights(folder)  # refuses what is incomplete, or leads outside the folder
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        return loaded.to(device).eval()
    if not (folder / RECIPE).is_file():
        raise BadInput(f"{folder}: was quantized by another tool; load it with transformers")
    recipe = read_json(folder / RECIPE)["recipe"][-1]
    scheme = Scheme.parse(recipe["options"]["scheme"])
    config = AutoConfig.for_model(**raw)
    anatomy, sizes = anatomy_of(config.model_type), sizes_of(config)
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype)
    weights = Weights(folder)
    linears = tuple(f".{name}.weight" for name in anatomy.linears)
    for name, parameter in built.named_parameters():
        value = (
            _restored(weights, name.removesuffix(".weight"), scheme)
            if name.endswith(linears)
            else weights.read([name])[name]
        )
        if value.shape != parameter.shape:
            raise BadInput(f"{folder}: tensor '{name}' has shape {list(value.shape)}, not {list(parameter.shape)}")
        parameter.data.copy_(value)
    run_time = load_online(folder, scheme, recipe["hadamard_down"], sizes.layers)
    for block, online in zip(built.get_submodule(anatomy.blocks).children(), run_time, strict=True):
        install(block, online.to(torch.device(device)), anatomy)
    return built.eval()


def _restored(weights: Weights, linear: str, scheme: Scheme) -> Tensor:
    names = compressed_tensors.names_of(linear, scheme)
    return compressed_tensors.restore(linear, weights.read(names), scheme).weight()


def save_online(folder: Path, run_time: Sequence[Online]) -> None:
    """The tensors of the run-time part; no file where there are none."""
    rotations = {f"{i}.key_rotation": o.key_rotation for i, o in enumerate(run_time) if o.key_rotation is not None}
    if rotations:
        save_file({name: r.float().cpu().contiguous() for name, r in rotations.items()}, folder / ONLINE_FILE)


def load_online(folder: Path, scheme: Scheme, hadamard_down: bool, layers: int) -> list[Online]:
    file = folder / ONLINE_FILE
    rotations = load_file(file) if file.is_file() else {}
    return [
        Online(scheme.activations, scheme.kv, hadamard_down, rotations.get(f"{i}.key_rotation")) for i in range(layers)
    ]


def serving_note(scheme: Scheme, *, online: bool) -> dict[str, Any]:
    """Which loaders run the result as it is measured, and what to mind."""
    loaders, notes = ["compressor.load"], []
    if scheme.kv:
        notes.append(f"{scheme.kv.bits}-bit keys and values: no file format serves them")
    if online:
        notes.append("online Hadamards: other loaders would ignore them, so they are made to refuse the folder")
    if notes:
        return {"loaders": loaders, "notes": notes}
    loaders.append("transformers (with the compressed-tensors package)")
    if not scheme.weights.symmetric:
        notes.append("transformers 5.23 reads zero points only with CompressedTensorsConfig(dequantize=True)")
    served = vllm(scheme)
    if served is not None:
        loaders.append("vLLM")
        notes += [served] if served else []
    return {"loaders": loaders, "notes": notes}


def vllm(scheme: Scheme) -> str | None:
    """None where no compressed-tensors scheme of vLLM's fits; else what to mind, or "".  By its rules, not tried."""
    weights, activations = scheme.weights, scheme.activations
    if activations is None:
        if weights.bits in (4, 8):
            return ""
        return "vLLM: only recent releases run weights of other than 4 or 8 bits" if weights.symmetric else None
    if not activations.symmetric or activations.bits not in (4, 8):
        return None
    if is_int_quantized(scheme):
        return "" if activations.bits == 8 and weights.group is None else None
    return "vLLM: needs its WNA8Int and WNA4Int schemes (mid-2026) and a GPU of compute capability 7.5"
