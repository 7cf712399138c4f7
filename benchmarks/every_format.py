"""Every format that parewell writes, read by the library that it is for, beside parewell.load of the same weights.

    pip install 'parewell[onnx,gguf,eight-bit]' accelerate 'mlx-lm[cpu]'
    PAREWELL_DATA=... python -m benchmarks.every_format --models stories260k smollm2

Each scheme is rounded by GPTQ (FP8 and MXFP8 to nearest) on a few rows of C4 or, for stories260k, of stories, without
learning; then it is stored in each format that can say it. Figures are on rows of 256 tokens of WikiText-2 or of other
stories: KL from the float model in nats a token, and perplexity, both of parewell.load in single precision and of the
other library in the dtype named; "far" is the mean difference of the log-probability of the text's next token between
the two (in the dtype named, both), "same" how often the likeliest token is the same. "bits" counts every bit of every
file that holds weights, for each weight of the model, embeddings included; minutes are those of quantize and export
together, on one thread. GPTQModel runs in the virtual environment of benchmarks/peers.py; GGUF files are dequantized
by transformers (benchmarks/llama_cpp.py runs them in llama.cpp).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from benchmarks import record
from benchmarks.formats import of_onnxruntime
from benchmarks.peers import padded
from benchmarks.real_models import CACHE, real_model
from benchmarks.repacked import of_gptqmodel, of_mlx
from benchmarks.stories import model as stories260k
from calib import BadInput
from compressor import Export, Quantize, export, load, quantize

Rows = list[dict[str, Any]]
Answers = Callable[[Path, Tensor, Path], Tensor]  # a folder, ids (N, T), the cache -> logits (N, T, V)


def in_transformers(dtype: torch.dtype = torch.float32, **more: Any) -> Answers:
    def answers(folder: Path, ids: Tensor, cache: Path) -> Tensor:
        run: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()
        return torch.cat([run(input_ids=row).logits.float() for row in ids.split(1)])

    return answers


def in_onnxruntime(folder: Path, ids: Tensor, cache: Path) -> Tensor:
    run = of_onnxruntime(folder)
    return torch.cat([run(row) for row in ids.split(1)])


def in_gptqmodel(folder: Path, ids: Tensor, cache: Path) -> Tensor:
    return of_gptqmodel(folder, ids, cache)[1]["logits"]


def in_mlx(folder: Path, ids: Tensor, cache: Path) -> Tensor:
    return of_mlx(folder, ids, cache)[1]["logits"]


@dataclass(frozen=True)
class Case:
    """A scheme, or more options of `quantize`; and the formats: what `export --to` calls each, None for what quantize
    writes itself, how its library is called, and its answers."""

    scheme: str
    formats: tuple[tuple[str | None, str, Answers], ...]
    more: dict[str, Any] = field(default_factory=dict)


FLOAT32 = (None, "transformers, float32", in_transformers())
BFLOAT16 = (None, "transformers, bfloat16", in_transformers(torch.bfloat16))
DEQUANTIZED = (
    None,
    "transformers, dequantized",
    in_transformers(quantization_config=CompressedTensorsConfig(dequantize=True)),
)
DEEPSEEK = ("deepseek-fp8", "transformers, bfloat16", in_transformers(torch.bfloat16))
GGUF = ("gguf", "transformers, of GGUF", in_transformers(gguf_file="model.gguf"))
ONNX = ("onnx", "onnxruntime", in_onnxruntime)
OF_GPTQ = ("gptq", "GPTQModel, float16", in_gptqmodel)
OF_AWQ = ("awq", "GPTQModel, float16", in_gptqmodel)
MLX = ("mlx", "mlx-lm, float32", in_mlx)
CASES = (
    Case("w4a16-g64", (FLOAT32, ONNX, OF_GPTQ, OF_AWQ, MLX)),
    Case("w4a16-g64-asym", (DEQUANTIZED, ONNX, OF_GPTQ, OF_AWQ, MLX)),
    Case("w4a16-g32", (FLOAT32, GGUF)),
    Case("w8a16-channel", (DEQUANTIZED,), {"embedding": "w8", "lm_head": "w8"}),
    Case("w3a16-g64", (FLOAT32, OF_GPTQ, MLX)),
    Case("w8a16-g32", (FLOAT32, GGUF)),
    Case("w8a8", (FLOAT32,)),
    Case("w4a16kvfp8-g64", (FLOAT32,)),
    Case("wfp8afp8", (FLOAT32,)),
    Case("wfp8afp8-b128", (FLOAT32, DEEPSEEK)),
    Case("wfp8afp8-tensor", (FLOAT32,)),
    Case("wfp8a16", (FLOAT32,)),
    Case("wnvfp4a16", (BFLOAT16,)),
    Case("wnvfp4anvfp4", (BFLOAT16,)),
    Case("wmxfp4a16", (BFLOAT16, GGUF)),
    Case("wmxfp4amxfp4", (BFLOAT16,)),
    Case("wmxfp8amxfp8", (BFLOAT16,)),
    Case("nf4", (FLOAT32,)),
    *(Case(name, (GGUF,)) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl")),
    Case("q4_k", (GGUF,), {"embedding": "q6_k"}),
    *(Case(name, (GGUF,)) for name in ("q3_k_m", "q4_k_m", "q5_k_m")),
    Case("q4_k", (GGUF,), {"target_bits": 4.6}),
)


@dataclass(frozen=True)
class Text:
    """ids (N, T) that figures are on, and the float model's logits of them."""

    ids: Tensor
    floats: Tensor

    def figures(self, logits: Tensor) -> tuple[float, float]:
        """KL from the float model, and perplexity."""
        sure, found = (x[:, :-1].double().log_softmax(-1) for x in (self.floats, logits))
        kl = kl_div(found, sure, reduction="none", log_target=True).sum(-1).mean()
        return float(kl), math.exp(-float(self.next(logits).mean()))

    def next(self, logits: Tensor) -> Tensor:
        return logits[:, :-1].double().log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]


@torch.no_grad()
def lines(case: Case, model: Path, text: Text, given: dict[str, Any], folder: Path, cache: Path) -> Rows:
    """A line for each format of a case; what does not go is one, too."""
    said = ", ".join([case.scheme, *(f"{name} {value}" for name, value in case.more.items())])
    began = time.monotonic()
    try:
        quantize(model, folder / "out", Quantize(**given | case.more, scheme=case.scheme), allow_damage=True)
    except BadInput as error:
        return [{"scheme": said, "note": f"no: {error}"}]
    spent, ours = time.monotonic() - began, logits_of(folder / "out", text.ids)
    known, made = dict(zip(("KL, ours", "perplexity, ours"), text.figures(ours), strict=True)), list[dict[str, Any]]()
    weights = sum(p.numel() for p in load(model).parameters())
    own = "bitsandbytes" if case.scheme == "nf4" else "compressed-tensors"
    for to, library, answers in case.formats:
        began, place, same = time.monotonic(), folder / (to or "out"), ours
        row: dict[str, Any] = {"scheme": said, "format": to or own, "library": library}
        try:
            if to:
                export(folder / "out", place, Export(to=to, held_out=0))
            files = [f for f in place.iterdir() if f.suffix in (".safetensors", ".gguf", ".onnx", ".data")]
            size = sum(f.stat().st_size for f in files)
            row |= {"MB": size / 1e6, "bits": size * 8 / weights, "minutes": (spent + time.monotonic() - began) / 60}
            theirs = answers(place, text.ids, cache)[..., : text.floats.shape[-1]]
            if library.endswith("bfloat16"):
                same = logits_of(folder / "out", text.ids, torch.bfloat16)
            row |= known | dict(zip(("KL, theirs", "perplexity, theirs"), text.figures(theirs), strict=True))
            row["far"] = float((text.next(same) - text.next(theirs)).abs().mean())
            row["same"] = float((same.argmax(-1) == theirs.argmax(-1)).double().mean())
        except (BadInput, ImportError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            row["note"] = f"no: {str(error).strip().splitlines()[-1][:160]}"
        made.append(row)
    return made


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    run: Any = load(folder, dtype=dtype)
    return torch.cat([run(input_ids=row).logits.float() for row in ids.split(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories260k", "smollm2", "gemma3", "qwen2"])
    parser.add_argument("--schemes", nargs="*", help="those alone")
    parser.add_argument("--samples", type=int, default=8, help="rows of 512 tokens that calibrate")
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, for figures")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    given = {"samples": args.samples, "held_out": 1, "length": 512, "learn": False, "init": "none"}
    for name in args.models:
        with tempfile.TemporaryDirectory() as kept:
            small = name == "stories260k"
            model = padded(stories260k(), Path(kept) / "model", 64) if small else real_model(name, args.cache)
            data = text / ("tinystories-a-clean.txt" if small else "c4-sample-1000.jsonl")
            written = data.read_text()[-20_000:] if small else (text / "wikitext2-raw-test.txt").read_text()
            read = AutoTokenizer.from_pretrained(model)(written, verbose=False)["input_ids"]
            ids = torch.tensor(read[: args.rows * 256]).view(args.rows, 256)
            told, table = Text(ids, logits_of(model, ids)), Rows()
            for case in CASES:
                if not args.schemes or case.scheme in args.schemes:
                    with tempfile.TemporaryDirectory() as place:
                        table += lines(case, model, told, given | {"data": data}, Path(place), args.cache)
                    record.write(f"every-format-{name}", table, (__doc__ or "").partition("\n\n")[0])


if __name__ == "__main__":
    main()
