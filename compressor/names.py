"""Names that options choose among, apart from what they stand for, so that a command can show and check them without
importing it."""

from __future__ import annotations

INITS = ("hadamard", "womi", "identity", "none")  # where rotations start (`compressor.rotate`)
UNROUNDED = "none"  # weights are transformed, and stay in the dtype they are stored in
ROUNDINGS = ("gptq", "rtn", UNROUNDED)
KL_TOPS = ("tail", "partial", "renormalised")  # keys of `calib.sparse.KL_TOP`
BALANCES = ("none", "gradient", "recap")

# Of exports.
DTYPES = ("bfloat16", "float16", "float32")
BNB = {"bnb-nf4": "nf4", "bnb-fp4": "fp4", "bnb-int8": "int8"}
LOADERS: dict[str, list[str]] = {
    "safetensors": ["transformers", "vLLM", "compressor.load"],
    "onnx": ["onnxruntime"],
    "gguf": ["llama.cpp", "transformers (gguf_file='model.gguf')"],
} | {name: ["transformers (with the bitsandbytes package)"] for name in BNB}
FORMATS = tuple(sorted(LOADERS))
