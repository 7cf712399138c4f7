"""SmolLM2-135M on WikiText-2: baselines against learned and tuned, at w4a16-g64 and at w4a4kv4-sym.

    PAREWELL_DATA=... python -m benchmarks.smollm2 --scheme w4a16-g64

32 x 512 tokens of C4 calibrate; the figure is perplexity on the first 10,240 tokens of the WikiText-2 raw test text in
rows of 512, no start token. The model is that of `benchmarks.real_models`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import record
from benchmarks.real_models import CACHE, real_model
from compressor import Quantize, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "hadamard", "learned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--lr-rotation", type=float, default=0.1)
    parser.add_argument("--lr-scale", type=float, default=0.01)
    parser.add_argument("--lr-tune", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--name", default=None, help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    model = real_model("smollm2", args.cache)
    name = args.name or f"smollm2-{args.scheme}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ids = AutoTokenizer.from_pretrained(model)((text / "wikitext2-raw-test.txt").read_text(), verbose=False)
        test = Path(folder) / "test.safetensors"
        save_file({"input_ids": torch.tensor(ids["input_ids"][:10_240]).view(20, 512)}, test)
        learned = Quantize(
            scheme=args.scheme,
            data=text / "c4-sample-1000.jsonl",
            held_out_data=test,
            samples=32,
            held_out=20,
            length=512,
            steps=args.steps,
            batch=args.batch,
            block_steps=0,
            tune_steps=args.tune_steps,
            lr_rotation=args.lr_rotation,
            lr_scale=args.lr_scale,
            lr_tune=args.lr_tune,
        )
        fixed = learned.without_learning()
        plain = replace(fixed, init="none")
        methods = {"rtn": replace(plain, rounding="rtn"), "gptq": plain, "hadamard": fixed, "learned": learned}
        given = {f: getattr(learned, f) for f in ("scheme", "data", "held_out_data", "samples", "held_out", "length")}
        methods |= {name: Quantize.preset(name, **given) for name in ("fast", "default", "ostquant")}
        for method in args.methods:
            for seed in args.seeds if method not in ("rtn", "gptq") else [0]:
                began, worked = time.monotonic(), time.process_time()
                report = quantize(model, Path(folder) / "out", replace(methods[method], seed=seed))
                minutes, spent = (time.monotonic() - began) / 60, time.process_time() - worked
                for stage, figures in report["quality_by_stage"].items():
                    rows.append(
                        {
                            "scheme": args.scheme,
                            "method": method if stage == "rounded" else f"{method}, {stage}",
                            "seed": seed,
                            "perplexity": figures["perplexity"],
                            "float": figures["reference_perplexity"],
                            "KL": figures["kl"],
                            "minutes": minutes,
                            "CPU seconds": spent,
                        }
                    )
                record.write(name, rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
