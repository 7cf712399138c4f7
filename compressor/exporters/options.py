"""Options of an export, and the formats it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.jobs.options import check_options, option

COMPRESSED_TENSORS = "compressed-tensors"  # which `quantize` writes by itself
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class FormatEntry:
    """A format's module in `compressor.exporters`, whose ENTRIES has it by its name; what loads it; whether it rounds
    weights; the packages that writing it needs, which an extra called `extra` brings."""

    module: str
    loaders: tuple[str, ...]
    rounds: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""


_BNB = FormatEntry("bnb", ("transformers (with the bitsandbytes package)",), rounds=True)
# To add a format: a file in `compressor.exporters` that defines a `Format` in ENTRIES, and a line here.
EXPORT_FORMATS = {
    "awq": FormatEntry("awq_layout", ("GPTQModel", "transformers (with the gptqmodel package)")),
    "bnb-fp4": _BNB,
    "bnb-int8": _BNB,
    "bnb-nf4": _BNB,
    "deepseek-fp8": FormatEntry("deepseek_fp8", ("transformers",)),
    "gguf": FormatEntry(
        "gguf", ("llama.cpp", "transformers (gguf_file='model.gguf')"), packages=("gguf",), extra="gguf"
    ),
    "gptq": FormatEntry("gptq_layout", ("GPTQModel", "transformers (with the gptqmodel and optimum packages)")),
    "mlx": FormatEntry("mlx", ("mlx-lm",)),
    "onnx": FormatEntry("onnx", ("onnxruntime",), packages=("onnx", "onnxscript", "optimum"), extra="onnx"),
    "safetensors": FormatEntry("merged", ("transformers", "vLLM", "parewell.load")),
}
# Formats of `quantize --format`: INT8 of bitsandbytes is found by rounding to nearest alone.
STORED_FORMATS = (COMPRESSED_TENSORS, *(name for name in EXPORT_FORMATS if name != "bnb-int8"))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export; also what its recipe records."""

    to: str = option("safetensors", f"format of DST: {', '.join(EXPORT_FORMATS)}", group="basic")
    base_model: Path | None = option(None, "base model of OUT where that is an adapter; default: the one that it names")
    dequantize: bool = option(False, "dequantize OUT first, where it is GGUF, FP8 or the like")
    dtype: str | None = option(
        None, "dtype of what is not quantized; default: 16 bits as the model has them, else bfloat16; gguf: float16; "
        "mlx: that of the scales",
        choices=DTYPES, group="basic"
    )  # fmt: skip
    held_out: int = option(
        8,
        "rows on which DST is run in its runtime, if that is installed, and compared with OUT; 0: none",
        group="data",
        ge=0,
    )
    data: Path | None = option(
        None,
        "where they come from: text, .jsonl or .safetensors token ids; default: the embedded held-out text",
        group="data",
    )
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data", ge=2
    )

    def __post_init__(self) -> None:
        if self.to == COMPRESSED_TENSORS:
            raise BadInput("to compressed-tensors: that is what parewell quantize writes; give it the float model")
        if self.to not in EXPORT_FORMATS:
            raise BadInput(f"to '{self.to}' is unknown; choose from {', '.join(EXPORT_FORMATS)}")
        check_options(self)
        if self.to == "onnx" and self.dtype not in (None, "float32"):
            raise BadInput(f"dtype {self.dtype}: onnxruntime computes in float32 on CPU; leave it out")
        if not self.held_out and (self.data is not None or self.length is not None):
            raise BadInput("held-out is 0, so that --data and --length change nothing; leave one of them out")

    @property
    def entry(self) -> FormatEntry:
        """The table's entry of the format."""
        return EXPORT_FORMATS[self.to]
