"""ONNX: the whole model as one graph, (input_ids, attention_mask) -> logits, both axes free; quantized linears are
MatMulNBits (com.microsoft) on the codes and scales of the checkpoint.

The graph comes from torch's tracing exporter: the newer one gives the same answers and takes over ten times as long.
onnxruntime runs it in float32. The operator knows 4 and 8 bits and blocks of 16 to 256 inputs, a power of two: codes of
fewer bits are kept in the next of these, scales of larger groups are repeated. A tied head reads the embedding's own
table. Rotary frequencies that depend on the length of the sequence (dynamic, longrope) are computed in the graph.
What else depends on the rows is traced as it was on a short one: a graph of a type that is not among `TRACED` is run on
long and on padded rows as it is written, and refused where it answers otherwise than the model. Of a model that sees
images it is the text alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from calib import BadInput, first_line
from calib.jobs.output_folder import write_json
from calib.model.config import as_configured
from calib.quant.grid_types import Grid
from calib.runtime.memory import is_out_of_memory
from compressor.engine.load import QuantizedCheckpoint, load
from compressor.exporters import runtimes
from compressor.exporters.format import ExportJob, Format
from compressor.exporters.onnx_check import check_graph, logits_on, rows_to_try
from compressor.storage.description import WEIGHTS_ALONE, FormatDescription
from compressor.storage.quantized_linear import Rounded

ONNX_BLOCKS = (256, 128, 64, 32, 16)
MOVING = {"dynamic", "longrope"}  # rope types whose frequencies depend on the length of the sequence
# Types whose graphs were compared with the model for every shape of rows; others' are, as they are written.
TRACED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"}
MAX_ONNX_BYTES = 2**31 - 2**24  # bytes of weights in one file, with room for the graph


def _check(job: ExportJob) -> None:
    """Raises BadInput where the graph, or the operator, cannot hold the model."""
    checkpoint = job.checkpoint
    _check_operator(checkpoint)
    size = job.expected_bytes(ENTRIES["onnx"])
    if size > MAX_ONNX_BYTES:
        raise BadInput(
            f"to onnx: {size / 1e9:.1f} GB of weights do not fit into one file of 2 GB; export to safetensors"
        )


def _check_operator(checkpoint: QuantizedCheckpoint) -> None:
    if any(linear.step for linear in checkpoint.linears()):
        raise BadInput(f"to onnx: torch cannot trace the experts of {checkpoint.stream.config.model_type}; export to "
                       "safetensors")  # fmt: skip
    config = checkpoint.stream.config.get_text_config()
    kinds = {str(how.get("rope_type", "default")) for how in _rope(config).values()}
    if unknown := kinds - {"default", *ROPE_INIT_FUNCTIONS}:
        raise BadInput(f"to onnx: rope type '{', '.join(sorted(unknown))}' is not known here; export to safetensors")
    if kinds & MOVING and (len(_rope(config)) > 1 or "" not in _rope(config)):
        raise BadInput(f"to onnx: frequencies of rope type '{', '.join(sorted(kinds & MOVING))}' that differ by the "
                       "kind of layer cannot be traced; export to safetensors")  # fmt: skip
    if checkpoint.scheme is None:
        return
    if any(linear.rows or linear.read_elsewhere for linear in checkpoint.linears()):
        raise BadInput(f"to onnx: linears of {config.model_type} share a matrix or are read by other code, so that no "
                       "operator can stand in their place; export to safetensors")  # fmt: skip
    grid = checkpoint.scheme.weights  # of whatever bits
    if not grid.is_even:
        raise BadInput(f"to onnx: MatMulNBits knows even grids only, not {checkpoint.scheme.name}; quantize to another "
                       "scheme, such as w4a16-g64")  # fmt: skip
    if grid.group and grid.group % ONNX_BLOCKS[-1]:
        raise BadInput(f"to onnx: groups of {grid.group} do not fit MatMulNBits, whose blocks are 16 to 256 and powers "
                       "of two; quantize with a multiple of 16, such as -g64, or without groups")  # fmt: skip


def _rope(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer, "" where one goes for all."""
    found = getattr(config, "rope_parameters", None) or {}
    by_layer = {str(kind): how for kind, how in found.items() if isinstance(how, dict)}
    return by_layer or {"": found}


def block_of(grid: Grid, width: int) -> int:
    """Inputs that share a scale in the operator: as many as a group has, or what takes the fewest bytes."""
    if grid.group:
        return next(block for block in ONNX_BLOCKS if grid.group % block == 0)
    return min(ONNX_BLOCKS, key=lambda block: -(-width // block) * (block * stored_bits(grid) / 8 + 4))


def stored_bits(grid: Grid) -> int:
    """Bits in which the operator keeps a grid's codes: 4 or 8."""
    return 4 if grid.bits <= 4 else 8


def upcast_params(checkpoint: QuantizedCheckpoint) -> str:
    """Bits that linears have and the operator does not, which are kept in the next that it has."""
    scheme = checkpoint.scheme
    found = set() if scheme is None else set(scheme.bits.values()) or {scheme.weights.bits}
    return ", ".join(str(bits) for bits in sorted(found - {4, 8}))


def _bits(job: ExportJob, linear: str) -> float:
    """Scales, zero points and the filling of the last block included."""
    if job.checkpoint.scheme is None:
        return 32.0
    grid, width = job.checkpoint.scheme.grid(linear), job.width(linear)
    bits, block = stored_bits(grid), block_of(grid, width)
    blocks = -(-width // block)
    zeros = 0.0 if grid.symmetric else 8 * -(-blocks * bits // 8)
    return (blocks * (block * bits + 32) + zeros) / width


class MatMulNBits(nn.Module):
    """A linear on codes, exported as the operator of that name."""

    def __init__(self, rounded: Rounded, bias: Tensor | None) -> None:
        super().__init__()
        grid, (self.outputs, self.width) = rounded.grid, rounded.codes.shape
        self.bits, self.block = stored_bits(grid), block_of(grid, self.width)
        blocks = -(-self.width // self.block)
        offset, per_byte = 2 ** (self.bits - 1), 8 // self.bits
        codes = torch.nn.functional.pad(rounded.codes.cpu().int(), (0, blocks * self.block - self.width)) + offset
        self.codes = nn.Buffer(_packed(codes.view(self.outputs, blocks, -1), per_byte))
        repeats = blocks // rounded.scale.shape[1]
        self.scale = nn.Buffer(rounded.scale.float().repeat_interleave(repeats, 1))
        zeros = (rounded.zero.int() + offset).repeat_interleave(repeats, 1)
        self.zeros = None if grid.symmetric else nn.Buffer(
            _packed(torch.nn.functional.pad(zeros, (0, -blocks % per_byte)), per_byte)
        )  # fmt: skip
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(
            x, self.codes, self.scale, self.zeros, self.width, self.outputs, self.bits, self.block
        )
        return y if self.bias is None else y + self.bias


def _packed(numbers: Tensor, per_byte: int) -> Tensor:
    """(..., n) from 0 to 2^bits - 1 -> (..., n / per_byte) uint8, the first in the lowest bits."""
    parts = numbers.unflatten(-1, (-1, per_byte))
    return sum((parts[..., i] << (8 // per_byte * i) for i in range(per_byte)), torch.zeros(())).to(torch.uint8)


class _Product(torch.autograd.Function):
    """What is traced: of the operator only its shape counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor | None, *config: int) -> Tensor:
        return x.new_zeros(*x.shape[:-1], config[1])

    @staticmethod
    def symbolic(g: Any, x: Any, codes: Any, scale: Any, zeros: Any, *config: int) -> Any:
        width, outputs, bits, block = config
        given = [x, codes, scale] if zeros is None else [x, codes, scale, zeros]
        y = g.op("com.microsoft::MatMulNBits", *given, K_i=width, N_i=outputs, bits_i=bits, block_size_i=block)
        sizes = x.type().sizes()
        y.setType(x.type().with_sizes([*sizes[:-1], outputs]) if sizes else x.type())
        return y


class MovingRotary(nn.Module):
    """A rotary embedding whose frequencies depend on the length of the sequence, without branches or memory: what the
    library's does for a first sequence, as a graph.

    "longrope" takes its long factors beyond the original number of positions, else the short ones. "dynamic" raises
    the base with the length beyond the model's positions (NTK).
    """

    def __init__(self, config: Any, scaling: float) -> None:
        super().__init__()
        self.options, self.scaling = config.rope_parameters, scaling
        kind, at_rest = self.options["rope_type"], config.max_position_embeddings
        self.limit = int(self.options["original_max_position_embeddings"] if kind == "longrope" else at_rest)
        frequencies = ROPE_INIT_FUNCTIONS[kind]
        self.short = nn.Buffer(frequencies(config, torch.device("cpu"))[0])
        beyond = frequencies(config, torch.device("cpu"), seq_len=self.limit + 1)[0]
        self.long = nn.Buffer(beyond) if kind == "longrope" else None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> cosines and sines (batch, T, r)."""
        length = position_ids.max() + 1
        if self.long is not None:
            frequencies = torch.where(length > self.limit, self.long, self.short)
        else:
            half, factor = len(self.short), self.options["factor"]
            longer = length.clamp(min=self.limit).float() / self.limit
            base = self.options["rope_theta"] * (factor * longer - (factor - 1)) ** (half / (half - 1))
            frequencies = base ** (-torch.arange(half) / half)
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos() * self.scaling, both.sin() * self.scaling


class TiedHead(nn.Module):
    """A head that shares the embedding's table (V, d), which a traced linear would keep a second, turned copy of."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TiedProduct.apply(x.flatten(0, -2), self.weight)
        return y.view(*x.shape[:-1], len(self.weight))


class _TiedProduct(torch.autograd.Function):
    """x (n, d) -> x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any) -> Any:
        y = g.op("Gemm", x, weight, transB_i=1)
        y.setType(x.type().with_sizes([None, (weight.type().sizes() or [None])[0]]))
        return y


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def write_onnx(scratch: Path, folder: Path, checkpoint: QuantizedCheckpoint) -> None:
    """Trace the model and write it as model.onnx.

    Raises:
        BadInput: it cannot be traced, or the graph answers otherwise than the model.
    """
    model: Any = load(folder)
    config = model.config.get_text_config()
    model.set_attn_implementation(_attention(model))
    known = config.model_type in TRACED
    answers = [] if known else [(given, logits_on(model, *given)) for given in rows_to_try(config)]
    _prepare(model, checkpoint)
    try:
        _trace(scratch / "model.onnx", model, operators=checkpoint.scheme is not None)
    except Exception as error:  # of the library's code, which the tracer has no rule for
        if known or is_out_of_memory(error):
            raise
        raise BadInput(f"to onnx: torch cannot trace a model of type {config.model_type} ({first_line(error)}); export "
                       "to safetensors") from error  # fmt: skip
    if answers:
        check_graph(scratch, config.model_type, answers)


def _attention(model: Any) -> str:
    """An attention that can be traced, and with which the model says what its config means."""
    capped = as_configured(model.config.get_text_config().to_dict())
    return "eager" if capped or not model._supports_sdpa else "sdpa"


def _prepare(model: Any, checkpoint: QuantizedCheckpoint) -> None:
    """Put in what the graph is to have: a head tied to its table, moving frequencies, linears on codes."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and head.weight is embedding and head.bias is None:
        model.set_output_embeddings(TiedHead(embedding))
    config = model.config.get_text_config()
    if str(_rope(config).get("", {}).get("rope_type")) in MOVING:
        for name, rotary in list(model.named_modules()):
            if getattr(rotary, "rope_type", None) in MOVING:
                _replace(model, name, MovingRotary(config, rotary.attention_scaling))
    if checkpoint.scheme is not None:
        for i in range(checkpoint.stream.layers):
            for linear in checkpoint.stream.linears(i):
                name = f"{checkpoint.stream.block_name(i)}.{linear.module}"
                bias = model.get_submodule(name).bias
                _replace(model, name, MatMulNBits(checkpoint.rounded(linear), bias))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _trace(file: Path, model: Any, *, operators: bool) -> None:
    from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig  # not everyone has it

    names = ["input_ids", "attention_mask"]
    sizes = NormalizedTextConfig(model.config.get_text_config())
    rows = DummyTextInputGenerator("text-generation", sizes, batch_size=2, sequence_length=3)  # padded, as may come
    given = tuple(rows.generate(name, framework="pt") for name in names)
    with warnings.catch_warnings(), torch.no_grad(), _nothing_printed():
        warnings.simplefilter("ignore")  # of the tracer, on what it takes to be constant
        torch.onnx.export(
            _Logits(model),
            given,
            str(file),
            dynamo=False,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "logits")},
            opset_version=18,
            custom_opsets={"com.microsoft": 1} if operators else {},
        )


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Where the tracer fails it prints the whole graph, past Python's own stream."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _write(scratch: Path, job: ExportJob) -> None:
    write_onnx(scratch, job.folder, job.checkpoint)
    write_json(scratch / "config.json", job.config)
    if "vision_config" in job.config:
        job.notes.append("the graph is of text: images are no input of it")
    if widened := upcast_params(job.checkpoint):
        job.notes.append(f"codes of {widened} bits take 4 or 8 there")


_ABOUT = FormatDescription(
    title="ONNX, MatMulNBits",
    contents="one graph on the codes and scales as they are; fewer bits in the next of 4 and 8, scales of larger "
    "groups repeated; a float model in 32 bits; up to 2 GB; of text alone where a model sees images",
    bits="2 to 8",
    groups=f"multiples of {ONNX_BLOCKS[-1]}, channel",
    zero_points=True,
    mixed=True,
    activations=WEIGHTS_ALONE,
    tables="32 bits",
    readers=(),
    hardware="CPUs here; what onnxruntime has the operator for",
    bits_per_weight="b + 32/g, with b of 4 or 8 and g up to 256",
    zero_bits="b/g",
)
ENTRIES = {
    "onnx": Format(
        _write,
        _bits,
        _check,
        dtype=lambda checkpoint: torch.float32,
        runner=runtimes.Runner(("onnxruntime",), lambda folder: runtimes.onnxruntime_answers(folder)),
        about=_ABOUT,
    )
}
