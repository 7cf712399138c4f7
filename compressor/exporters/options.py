"""Options of an export, and the formats it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.jobs.options import check_numbers, option

# Of exports.
DTYPES = ("bfloat16", "float16", "float32")
BNB = {"bnb-nf4": "nf4", "bnb-fp4": "fp4", "bnb-int8": "int8"}
LOADERS: dict[str, list[str]] = {
    "safetensors": ["transformers", "vLLM", "compressor.load"],
    "onnx": ["onnxruntime"],
    "gguf": ["llama.cpp", "transformers (gguf_file='model.gguf')"],
} | {name: ["transformers (with the bitsandbytes package)"] for name in BNB}
EXPORT_FORMATS = tuple(sorted(LOADERS))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export; also what its recipe records."""

    to: str = option("safetensors", f"format of DST: {', '.join(EXPORT_FORMATS)}", group="basic")
    base_model: Path | None = option(None, "base of OUT, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that OUT stands for, where it is GGUF, FP8 or the like")
    dtype: str | None = option(
        None, "of what is not quantized; default: 16 bits as the model has them, else bfloat16; gguf: float16",
        choices=DTYPES, group="basic"
    )  # fmt: skip
    held_out: int = option(
        8, "rows on which DST is run, by its runtime where that is installed, beside OUT; 0: none", group="data"
    )
    data: Path | None = option(
        None,
        "where they come from: text, .jsonl or .safetensors token ids; default: the embedded held-out text",
        group="data",
    )
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data"
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.to == "compressed-tensors":
            raise BadInput("to compressed-tensors: that is what parewell quantize writes; give it the float model")
        if self.to not in EXPORT_FORMATS:
            raise BadInput(f"to '{self.to}' is unknown; choose from {', '.join(EXPORT_FORMATS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(f"dtype '{self.dtype}' is unknown; choose from {', '.join(DTYPES)}")
        if self.to == "onnx" and self.dtype not in (None, "float32"):
            raise BadInput(f"dtype {self.dtype}: onnxruntime computes in float32 on CPU; leave it out")
        if self.held_out < 0 or (self.length is not None and self.length < 2):
            raise BadInput("held-out must not be negative, length must be at least 2")
        if not self.held_out and (self.data is not None or self.length is not None):
            raise BadInput("held-out is 0, so that --data and --length change nothing; leave one of them out")
