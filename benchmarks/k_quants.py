"""llama.cpp's own quantizer beside ours, in its mixtures and at its bytes, on the same calibration rows.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36, unpack it, and in its vendor/llama.cpp:
    cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-quantize llama-perplexity
    PAREWELL_DATA=... python -m benchmarks.k_quants --llama DIR/build/bin --models smollm2 gemma3

llama-quantize takes our export of the float model in float32 and the importance matrix (--imatrix-out) of the rows that
calibrate ours. "allocated": the bits of the linears of llama.cpp's file as --target-bits, its type of embedding as
--embedding. KL from the float model in nats a token, and perplexity, are of the dequantized file in single precision
(transformers), on rows of WikiText-2, each led by a start token where the model has one. "KL, llama.cpp" is what
llama-perplexity says of the file beside the float one, on the same text in pieces of 512 of which it scores the second
half; it rounds activations to 8 bits. Bytes are of the whole file; minutes are those of a CPU, of quantize and export
with all their figures, and of llama-quantize, which had its matrix before.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import record
from benchmarks.peers import prepare, quality
from benchmarks.real_models import CACHE
from compressor import Export, Quantize, export, quantize


class Llama:
    """llama.cpp's programs on one model."""

    def __init__(self, programs: Path, model: Path, folder: Path) -> None:
        self.programs, self.folder, self.float = programs, folder, folder / "float" / "model.gguf"
        export(model, folder / "float", Export(to="gguf", dtype="float32", held_out=0))
        ids = load_file(folder / "test.safetensors")["input_ids"]
        written = AutoTokenizer.from_pretrained(model).decode(ids.flatten(), skip_special_tokens=True)
        (folder / "text").write_text(written)
        self.output_of("perplexity", "-m", self.float, *self.text)

    @property
    def text(self) -> list[str | Path]:
        return ["-f", self.folder / "text", "-c", "512", "-t", "1", "--kl-divergence-base", self.folder / "logits"]

    def output_of(self, program: str, *words: str | Path) -> str:
        done = subprocess.run(
            [self.programs / f"llama-{program}", *words], capture_output=True, text=True, check=True, errors="replace"
        )
        return done.stdout + done.stderr

    def quantized(self, kind: str) -> tuple[Path, float]:
        """-> the file, and minutes."""
        file, began = self.folder / "theirs" / "model.gguf", os.times().children_user
        file.parent.mkdir(exist_ok=True)
        self.output_of("quantize", "--imatrix", self.folder / "imatrix.gguf", self.float, file, kind.upper(), "1")
        return file, (os.times().children_user - began) / 60

    def divergence(self, file: Path) -> float:
        output = self.output_of("perplexity", "-m", file, *self.text, "--kl-divergence")
        return float(re.search(r"Mean\s+KLD:\s+([-\d.]+)", output)[1])  # type: ignore[index]


def figures(file: Path, model: Path, folder: Path, llama: Llama) -> dict[str, float]:
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    found = quality(read, str(model), folder / "test.safetensors")
    size = {"MB": file.stat().st_size / 1e6, "bits of linears": of_linears(file)[0]}
    return size | {"KL": found["KL"], "perplexity": found["perplexity"], "KL, llama.cpp": llama.divergence(file)}


def of_linears(file: Path) -> tuple[float, str]:
    """Bits a weight of the linears of blocks; and the type of the embedding."""
    tensors = GGUFReader(file).tensors
    linears = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    bits = 8 * sum(t.n_bytes for t in linears) / sum(int(t.n_elements) for t in linears)
    return bits, next(t.tensor_type.name.lower() for t in tensors if t.name == "token_embd.weight")


def lines(name: str, kinds: list[str], tools: list[str], args: argparse.Namespace, folder: Path) -> Any:
    """A row a file."""
    model = prepare(name, folder, args.cache, args.samples).resolve()
    given: dict[str, Any] = {"data": folder / "rows.safetensors", "samples": args.samples, "held_out": 2}
    given |= {"held_out_data": folder / "test.safetensors", "device": "cpu", "init": "none"}
    llama = Llama(args.llama, model, folder)
    only = Quantize(**given, scheme="q8_0", rounding="rtn", learn=False, imatrix_out=folder / "imatrix.gguf")
    quantize(model, folder / "matrix", only)
    for kind in kinds:
        file, minutes = llama.quantized(kind)
        row = {"model": name, "mixture": kind}
        yield row | {"tool": "llama-quantize"} | figures(file, model, folder, llama) | {"CPU minutes": minutes}
        bits, embedding = of_linears(file)
        allocated = {"scheme": "q4_k", "target_bits": bits, "embedding": embedding}
        for tool in tools:
            options = given | (allocated if "allocated" in tool else {"scheme": kind})
            with tempfile.TemporaryDirectory() as place:
                began, out = time.process_time(), Path(place)
                quantize(model, out / "out", Quantize.preset("fast", **options | TOOLS[tool]), allow_damage=True)
                export(out / "out", out / "gguf", Export(to="gguf", held_out=0))
                minutes = (time.process_time() - began) / 60
                found = figures(out / "gguf" / "model.gguf", model, folder, llama)
            yield row | {"tool": f"parewell {tool}"} | found | {"CPU minutes": minutes}


TOOLS: dict[str, dict[str, Any]] = {
    "GPTQ": {"learn": False},
    "GPTQ, allocated": {"learn": False},
    "fast": {},
    "fast, allocated": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--kinds", nargs="+", default=["q3_k_m", "q4_k_m", "q5_k_m"])
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=["GPTQ", "GPTQ, allocated"])
    parser.add_argument("--samples", type=int, default=32, help="rows of 512 tokens that calibrate")
    parser.add_argument("--name", default="k-quants", help="of the results")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as place:
            for row in lines(model, args.kinds, args.tools, args, Path(place)):
                rows.append(row)
                record.write(args.name, rows, (__doc__ or "").partition("\n\n")[0])


if __name__ == "__main__":
    main()
