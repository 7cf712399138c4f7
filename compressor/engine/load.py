"""Open what `quantize` wrote, with everything it does at run time: block by block, or as a `transformers` model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from calib import BadInput, first_line
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel, Composed
from calib.blockwise.skeleton import empty_model
from calib.jobs.recipe import read_recipe
from calib.model.checkpoint import find_model
from calib.model.config import RECIPE, config_for, is_quantized, read_config, read_json
from calib.model.conversion import pretrained
from calib.model.task import ALL_TASKS, Task, task_of_checkpoint
from calib.model.weights import Weights, read_file
from calib.probe.find import found_parts
from calib.quant.scheme import Scheme
from compressor.engine.runtime_transforms import RuntimeTransforms, downs, install
from compressor.storage.codecs import codec_of, linears_in
from compressor.storage.compressed_tensors import input_scales, is_int_quantized
from compressor.storage.key_value_scales import ENDINGS, key_value_names, scale_names, scale_shape
from compressor.storage.quantized_linear import Rounded

RUNTIME_TRANSFORMS_FILE = "parewell.safetensors"
FP8_CACHE = "vLLM: keeps its cache in FP8 by these scales; where its attention computes in FP8 it rounds queries, too"
FP8_HEADS = "vLLM: a scale for each head of keys and values takes FlashAttention 3 or newer"
CAPPED = "transformers before 5.21 caps attention scores only with attn_implementation='eager'"


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A folder to be walked: its blocks as they run, what each does at run time, and the scheme, None for floats."""

    stream: BlockwiseModel
    online: list[RuntimeTransforms]
    scheme: Scheme | None = None

    def linears(self) -> list[Linear]:
        """The linears of all blocks."""
        return [linear for i in range(self.stream.layers) for linear in self.stream.linears(i)]

    def rounded(self, linear: Linear) -> Rounded:
        """Codes and scales of a linear of a quantized model."""
        assert self.scheme is not None
        return _rounded(self.stream.weights, linear.name, linear.shape, self.scheme)

    def rounded_table(self, name: str) -> Rounded:
        """Codes and scales of an embedding or a head, by its name on disk."""
        assert self.scheme is not None
        return _rounded(self.stream.weights, name, self.stream.expected[f"{name}.weight"], self.scheme)


def open_checkpoint(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    products: torch.dtype | None = None,
    tasks: Collection[Task] = ALL_TASKS,
) -> QuantizedCheckpoint:
    """OUT of a quantization job, or a float model that the library knows, for one of some `tasks`.  Raises BadInput
    where it is neither."""
    raw = read_json(folder / "config.json")
    found = raw.pop("quantization_config", None)
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
    if found is None:
        stream = BlockwiseModel(read_config(folder, tasks), Weights(folder), device, dtype, products)
        stream.check()
        return QuantizedCheckpoint(stream, [RuntimeTransforms()] * stream.layers)
    if not (folder / RECIPE).is_file():
        raise BadInput(
            f"{folder}: is quantized already ({method}), by another tool; add --dequantize to go on with the floats "
            "that it stands for, or load it with transformers"
        )
    recipe = read_recipe(folder)[-1]
    if recipe["job"] == "export" and "scheme" not in recipe:
        raise BadInput(
            f"{folder}: was exported to a format that is not read here; load it with the runtime that it is for, or "
            "give the folder that it was made from"
        )
    scheme = scheme_in(folder, recipe)
    if not isinstance(recipe.get("hadamard_down"), bool):
        raise BadInput(f"{folder / RECIPE}: does not say how the folder was quantized; make it again")
    config, weights = config_for(folder, raw, tasks), Weights(folder)
    linears = set(linears_in(weights.entries, scheme))
    if scheme.mixed and set(scheme.bits) != linears - scheme.tables.keys():
        raise BadInput(f"{folder / RECIPE}: has bits of other linears than the folder; make it again")
    parts = {linear: codec_of(scheme).names(linear, scheme) for linear in linears}
    scales = {name for name in weights.entries if scheme.has_fixed_keys and name.endswith(ENDINGS)}
    composed = Composed(
        {f"{linear}.weight": weights.entry(names[0]).shape[0] for linear, names in parts.items()},
        frozenset(name for names in parts.values() for name in names) | scales,
        lambda names: {n: _rounded(weights, n.removesuffix(".weight"), None, scheme).weight() for n in names},
    )
    stream = BlockwiseModel(config, weights, device, dtype, products, composed).without(scheme.ignored)
    stream.check()
    checkpoint = QuantizedCheckpoint(stream, [], scheme)
    _check_linears(checkpoint, linears)
    _check_keys(checkpoint, scales)
    run_time = load_runtime_transforms(folder, stream, scheme, hadamard_down=recipe["hadamard_down"])
    return replace(checkpoint, online=[online.to(device) for online in run_time])


def scheme_in(folder: Path, step: Mapping[str, Any]) -> Scheme:
    """The scheme that a step of a directory's recipe names.  Raises BadInput."""
    try:
        return Scheme.read(step)
    except BadInput as error:
        raise BadInput(f"{folder / RECIPE}: {error}") from error


def load(model: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model, ready to run: an output of parewell's or a float model that transformers knows.

    Weights are dense in `dtype`: quantization saves disk here, not memory. A quantized model rounds activations, keys
    and values as its scheme says, and applies its run-time rotations.

    Args:
        model: a directory, or a name on the hub.
        device: where the model is put.
        dtype: of the weights in memory.

    Returns:
        The library's own model class, in eval mode.

    Raises:
        BadInput: the directory is neither, is incomplete or damaged.
    """
    folder, device = find_model(model), torch.device(device)
    raw = read_json(folder / "config.json")
    if not is_quantized(raw):
        Weights(folder)  # refuses what is incomplete, or leads outside the folder
        task = task_of_checkpoint(str(raw.get("model_type")), raw.get("architectures")) or Task.CAUSAL_LM
        loaded, info = pretrained(getattr(transformers, task), folder, dtype=dtype)
        if info["missing_keys"]:
            raise BadInput(f"{folder}: lacks '{min(info['missing_keys'])}'; the checkpoint is incomplete")
        return loaded.to(device).eval()
    checkpoint = open_checkpoint(folder, device, dtype)
    stream = checkpoint.stream
    with device:
        built: Any = empty_model(stream.config, dtype)
    values = dict(built.named_parameters(remove_duplicate=False)) | dict(built.named_buffers())
    with torch.no_grad():
        for name, value in stream.read_outer().items():
            values[name].copy_(value)
        for i, params in stream.reading(range(stream.layers)):
            block = stream.block_name(i)
            for name, value in params.items():
                values[f"{block}.{name}"].copy_(value)
            install(built.get_submodule(block), checkpoint.online[i], stream.linears(i), stream.attention(i))
    return built.eval()


def codes_in(folder: Path) -> dict[str, Tensor]:
    """Codes (out, in) of OUT of a quantization, by name of the weight as it is stored."""
    checkpoint = open_checkpoint(folder, torch.device("cpu"))
    return {f"{linear.name}.weight": checkpoint.rounded(linear).codes for linear in checkpoint.linears()}


def _check_linears(checkpoint: QuantizedCheckpoint, stored: set[str]) -> None:
    """Raises BadInput where linears are not stored as the recipe and the config say."""
    weights, scheme = checkpoint.stream.weights, checkpoint.scheme
    assert scheme is not None
    linears: dict[str, tuple[int, ...]] = {linear.name: linear.shape for linear in checkpoint.linears()}
    expected = checkpoint.stream.expected
    linears |= {name: expected.get(f"{name}.weight", ()) for name in scheme.tables}
    if other := linears.keys() ^ stored:
        raise BadInput(f"{weights.folder}: '{min(other)}' is not quantized as {RECIPE} says; make the folder again")
    for name, shape in linears.items():
        for part, (size, whole) in codec_of(scheme).shapes(name, (shape[0], shape[1]), scheme).items():
            entry = weights.entry(part)
            if entry.shape != size or entry.dtype.is_floating_point == whole:
                raise BadInput(
                    f"{entry.file}: tensor '{part}' is {entry.dtype} of shape {list(entry.shape)}, not {list(size)} as "
                    f"config.json and {RECIPE} ask for; make the folder again"
                )


def _check_keys(checkpoint: QuantizedCheckpoint, stored: set[str]) -> None:
    """Raises BadInput where scales of keys and values are not stored as the recipe says."""
    stream, scheme = checkpoint.stream, checkpoint.scheme
    assert scheme is not None
    folder, wanted = stream.weights.folder, set(scale_names(stream, scheme))
    if other := wanted ^ stored:
        raise BadInput(f"{folder}: '{min(other)}' is not stored as {RECIPE} says; make the folder again")
    for name, scale in stream.weights.read(sorted(wanted)).items():
        known = scale.shape == scale_shape(stream, scheme) and scale.is_floating_point()
        if not known or not (scale.isfinite() & (scale > 0)).all():
            raise BadInput(f"{stream.weights.entry(name).file}: tensor '{name}' is no scale; make the folder again")


def _rounded(weights: Weights, linear: str, shape: tuple[int, ...] | None, scheme: Scheme) -> Rounded:
    try:
        found = codec_of(scheme).decode(linear, weights.read(codec_of(scheme).names(linear, scheme)), scheme)
        if shape is None or found.codes.shape == shape:
            return found
        reason = f"shape {list(found.codes.shape)}"
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
    raise BadInput(f"{weights.folder}: what is stored of '{linear}' does not fit together ({reason}); make it again")


def save_runtime_transforms(folder: Path, run_time: Sequence[RuntimeTransforms]) -> None:
    """The tensors of the run-time part; no file where there are none."""
    rotations = {f"{i}.key_rotation": o.key_rotation for i, o in enumerate(run_time) if o.key_rotation is not None}
    if rotations:
        save_file(
            {name: r.float().cpu().contiguous() for name, r in rotations.items()}, folder / RUNTIME_TRANSFORMS_FILE
        )


def load_runtime_transforms(
    folder: Path, stream: BlockwiseModel, scheme: Scheme, *, hadamard_down: bool
) -> list[RuntimeTransforms]:
    """Read the run-time transforms of every block: rounding of activations, keys and values, and rotations of keys.

    Raises:
        BadInput: rotations have another shape than the model's heads, or are none.
    """
    file = folder / RUNTIME_TRANSFORMS_FILE
    rotations = read_file(file)[0] if file.is_file() else {}
    plain = [
        RuntimeTransforms(
            scheme.activations,
            scheme.kv,
            inputs=input_scales([one.name for one in stream.linears(i)], scheme, stream.weights.read),
            keys=_key_value_scales(stream, i, scheme),
        )
        for i in range(stream.layers)
    ]
    if not rotations and not hadamard_down:
        return plain
    parts, online = found_parts(stream), list[RuntimeTransforms]()
    for i, found in enumerate(parts.blocks):
        rotation = rotations.get(f"{i}.key_rotation")
        shapes = [(layer.kv_heads, layer.width, layer.width) for layer in found.attention]
        if rotation is not None and (rotation.shape not in shapes or not rotation.isfinite().all()):
            raise BadInput(
                f"{file}: holds no rotations of shape {[*next(iter(shapes), ())]}; make the folder again"
            )  # fmt: skip
        turned = downs(found, stream.linears(i)) if hadamard_down else frozenset[str]()
        online.append(replace(plain[i], hadamard=turned, key_rotation=rotation))
    return online


def _key_value_scales(stream: BlockwiseModel, index: int, scheme: Scheme) -> dict[str, Tensor]:
    """Scales (2, 1 or heads) of keys and of values of a block's attention layers, where calibration found them."""
    if not scheme.has_fixed_keys:
        return {}
    names = key_value_names(stream, index)
    stored = stream.weights.read([name for pair in names.values() for name in pair])
    return {layer: torch.stack([stored[name].float().flatten() for name in pair]) for layer, pair in names.items()}


# Types that transformers 5.23 does not load in few bits: it takes the experts of Llama 4 apart, and initializes weights
# of xLSTM that are not there.
STOPPED = {"llama4_text", "xlstm"}


def only_here(stream: BlockwiseModel) -> str | None:
    """Why no other loader has a place for codes of this model's linears; None where others have one."""
    linears = [linear for i in range(stream.layers) for linear in stream.linears(i)]
    if stream.config.get_text_config().model_type in STOPPED:
        return f"{stream.config.model_type}: tried, and transformers stops with an error where it meets codes"
    if any(linear.transposed for linear in linears):
        return "weights that the library keeps as (in, out): other loaders have no place for their codes"
    if any(linear.named_here for linear in linears):
        return "experts that lie in one tensor on disk: other loaders have no names for their codes"
    if any(linear.read_elsewhere for linear in linears):
        return "weights that the library's code also reads past their linears: codes in their place would break it"
    if stream.names.converted({f"{stream.block_name(0)}.{linear.parameter}" for linear in linears if linear.step}):
        return "tensors that the library converts as it loads them: it does not do so beside codes"
    return None


def plainly_loadable(scheme: Scheme, *, experts: bool, elsewhere: bool, hadamard_down: bool) -> bool:
    """Whether plain `transformers` computes what was measured.  `elsewhere`: other loaders have a place for the codes.

    Of experts, which it stacks, it neither knows bits of their own nor zero points, and does not round the inputs; of
    linears with bits of their own it takes zero points wrongly, and of experts in NVFP4 it forgets the global scales.
    """
    symmetric, apart = scheme.weights.symmetric, scheme.weights.scales == "e4m3"
    known = elsewhere and not (experts and (scheme.activations or scheme.mixed or apart or not symmetric))
    return known and not scheme.has_own_keys and not hadamard_down and (symmetric or not scheme.mixed)


def serving_note(
    scheme: Scheme | None, *, online: bool, experts: bool, capped: bool = False, only: str | None = None,
    one_table: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """List the loaders that run a checkpoint as it was measured, with notes.

    Args:
        scheme: None: a plain model.
        online: whether Hadamards run in it.
        experts: whether it has experts.
        capped: whether its attention scores are capped.
        only: why no other loader has a place for codes.
        one_table: whether embedding and head are one.
    """
    loaders, notes = ["parewell.load"], []
    minded = [CAPPED] if capped else []
    if scheme is None:
        notes = ["weights are transformed, not rounded", *minded]
        return {"loaders": [*loaders, "transformers", "vLLM"], "notes": notes}
    if scheme.weights.is_block_type:
        notes.append("blocks of llama.cpp's: parewell export --to gguf stores them for it, byte for byte")
    elif reasons := _unknown_elsewhere(scheme, online=online, experts=experts, only=only):
        notes += reasons
    if notes:
        return {"loaders": loaders, "notes": notes}
    if scheme.table_name:
        loaders.append("transformers (with the bitsandbytes package)")
        notes.append("bitsandbytes 0.50 computes in bfloat16 on CPUs with AVX-512 BF16, whatever dtype is asked for")
        notes += minded
        return {"loaders": loaders, "notes": notes}
    if (read := _tables_in_transformers(scheme)) is None:
        notes.append(
            "transformers 5.23 stops at this embedding or head beside linears on other grids, also with dequantize=True"
        )
    elif scheme.has_fixed_keys and (read or not scheme.weights.symmetric):
        what = "an embedding" if read else "zero points"
        notes.append(f"transformers 5.23 reads {what} only with dequantize=True, where it leaves keys and values alone")
    else:
        loaders.append("transformers (with the compressed-tensors package)")
        notes += [*minded, *([read] if read else [])]
        if scheme.weights.scales in ("e8m0", "e4m3"):
            notes.append("transformers 5.23 opens it with dtype=torch.bfloat16 only")
        if not scheme.weights.symmetric:
            notes.append("transformers 5.23 reads zero points only with CompressedTensorsConfig(dequantize=True)")
    if (unserved := _not_in_vllm(scheme, one_table=one_table)) is not None:
        notes.append(unserved)
    elif (served := vllm(scheme)) is not None:
        loaders.append("vLLM")
        notes += [served] if served else []
        notes += ["vLLM: only recent releases serve a quantized embedding"] if scheme.embedding else []
        notes += [FP8_CACHE] if scheme.has_fixed_keys else []
        notes += [FP8_HEADS] if scheme.kv and scheme.kv.scales == "head" else []
    return {"loaders": loaders, "notes": notes}


def _unknown_elsewhere(scheme: Scheme, *, online: bool, experts: bool, only: str | None) -> list[str]:
    """Why no other loader runs such a checkpoint; nothing where one does."""
    notes = [only] if only else []
    if scheme.kv and scheme.has_own_keys:
        notes.append(f"{scheme.kv.bits}-bit keys and values: no file format serves them")
    if online:
        notes.append("online Hadamards: other loaders would ignore them, so they are made to refuse the folder")
    if experts and scheme.activations:
        notes.append("quantized activations in a mixture of experts: transformers has no such experts")
    if experts and scheme.weights.scales == "e4m3":
        notes.append("NVFP4 in a mixture of experts: transformers 5.23 forgets the global scales of experts")
    if experts and not scheme.weights.symmetric:
        notes.append("zero points in a mixture of experts: transformers 5.23 cannot load such experts")
    if scheme.mixed and not scheme.weights.symmetric:
        notes.append("zero points with bits that differ: transformers 5.23 with dequantize=True would answer wrongly")
    if experts and scheme.mixed:
        notes.append("bits that differ in a mixture of experts: transformers would take experts for floats")
    return notes


def _tables_in_transformers(scheme: Scheme) -> str | None:
    """None where transformers opens no such embedding or head; else what to mind, or "".

    It opens a head as any linear, and an embedding with dequantize=True alone, which takes one grid for all and leaves
    activations as they are.
    """
    if scheme.embedding is not None:
        if {*scheme.tables.values()} != {scheme.weights} or scheme.activations is not None or scheme.mixed:
            return None
        return "transformers 5.23 opens a quantized embedding only with CompressedTensorsConfig(dequantize=True)"
    return None if scheme.head is not None and not scheme.weights.symmetric else ""


def _not_in_vllm(scheme: Scheme, *, one_table: bool) -> str | None:
    """Why vLLM does not serve such an embedding or head, or linears ignored, by its rules; None where it does."""
    if splits_fused(scheme.ignored):
        return "vLLM puts queries, keys and values together, and gate and up: it ignores all of them or none"
    if scheme.embedding is not None and one_table:
        return "vLLM serves no quantized table that is embedding and head at once; add --lm-head for two"
    if scheme.embedding is not None and scheme.embedding[1].bits not in (2, 4, 8):
        return f"{scheme.embedding[1].bits}-bit embedding: vLLM serves 2, 4 or 8 bits"
    if scheme.head is not None and scheme.head[1].bits not in (4, 8):
        return f"{scheme.head[1].bits}-bit head: vLLM serves 4 or 8 bits"
    return None


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that vLLM puts together


def splits_fused(ignored: Sequence[str]) -> bool:
    """Whether some linears that vLLM puts together are ignored, and others of them not."""
    names = set(ignored)
    for name in ignored:
        module, _, leaf = name.rpartition(".")
        for together in FUSED:
            if leaf in together and not names.issuperset(f"{module}.{one}" for one in together):
                return True
    return False


def vllm(scheme: Scheme) -> str | None:
    """None where no compressed-tensors scheme of vLLM's fits; else what to mind, or "".

    By its rules; benchmarks/results/vllm.md has what was tried.
    """
    weights, activations = scheme.weights, scheme.activations
    if weights.scales in ("e8m0", "e4m3"):
        if activations is not None:
            return "vLLM: below compute capability 10.0 activations stay in 16 bits"
        # vLLM 0.33 asks a group in MX for its weights alone.
        mx = "vLLM: from compute capability 10.0 on it rounds activations to MXFP%d as well"
        return mx % weights.bits if weights.scales == "e8m0" else ""
    if weights.is_float:
        return "" if activations is None else "vLLM: below compute capability 8.9 activations stay in 16 bits"
    if activations is not None and activations.is_float:
        four = (weights.bits, weights.group) == (4, 128) and not scheme.mixed
        return "vLLM: on GPUs of compute capability 9.0 alone" if four else None
    if activations is None:
        if (set(scheme.bits.values()) or {weights.bits}) <= {4, 8}:
            return ""
        return "vLLM: only recent releases run weights of other than 4 or 8 bits" if weights.symmetric else None
    if is_int_quantized(scheme):
        return "" if activations.bits == 8 and weights.group is None else None
    if not activations.symmetric or activations.bits not in (4, 8):
        return None
    return "vLLM: needs its WNA8Int and WNA4Int schemes (mid-2026) and a GPU of compute capability 7.5"
