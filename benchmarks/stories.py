"""stories260k: round-to-nearest, GPTQ, random Hadamard + GPTQ, learned + GPTQ, and tuned after it; same-seed pairs.

    PAREWELL_DATA=... python -m benchmarks.stories [--scheme w4a16-channel] [--seeds 3] [--steps 300]

150 stories calibrate, the other 33 give the figure: perplexity per story, each led by the start token. "gap closed" is
the share of the log-perplexity between float and the same seed's random Hadamard + GPTQ that is won back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from compressor import Quantize, quantize


def model() -> Path:
    return Path(os.environ["PAREWELL_DATA"]) / "stories260k"


def job(folder: Path, **options: Any) -> Quantize:
    """Calibration on 150 stories, figures on the other 33, both written into `folder`."""
    text = (Path(os.environ["PAREWELL_DATA"]) / "text/tinystories-a-clean.txt").read_text()
    stories = [s.strip() for s in text.split("<|endoftext|>") if s.strip()]
    files = []
    for part, some in (("calibration", stories[:150]), ("test", stories[150:])):
        files.append(folder / f"{part}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": s}) + "\n" for s in some))
    data, held_out = files
    return Quantize(data=data, held_out_data=held_out, by_document=True, samples=150, held_out=33, batch=6, **options)


SCHEMES = ("w4a16-channel", "w3a16-channel", "w4a4kv4-asym")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", action="append", choices=[*SCHEMES, "w4a4kv4-sym"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="stories")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in args.scheme or SCHEMES:
            learned = job(
                Path(folder), scheme=scheme, steps=args.steps, block_steps=0, tune_steps=args.tune_steps, lr_tune=0.01
            )

            def run(options: Quantize) -> dict[str, Any]:
                report = quantize(model(), Path(folder) / "out", options)
                return {name: q["perplexity"] for name, q in report["quality_by_stage"].items()} | {
                    "float": report["quality"]["reference_perplexity"]
                }

            fixed = learned.without_learning()
            plain = replace(fixed, init="none")
            nearest = run(replace(plain, rounding="rtn"))
            rows.append({"scheme": scheme, "method": "float", "perplexity": nearest["float"]})
            rows.append(
                {"scheme": scheme, "method": "round to nearest, clip searched", "perplexity": nearest["rounded"]}
            )
            rows.append(
                {"scheme": scheme, "method": "GPTQ on the unfolded weights", "perplexity": run(plain)["rounded"]}
            )
            closed: dict[str, list[float]] = {"learned": [], "learned, tuned": []}
            for seed in range(args.seeds):
                base = run(replace(fixed, seed=seed))
                rows.append(_row(scheme, "random Hadamard + GPTQ", seed, base["rounded"], None))
                began = time.monotonic()
                result = run(replace(learned, seed=seed))
                for method, value in (("learned", result["rounded"]), ("learned, tuned", result["tuned"])):
                    gap = math.log(base["rounded"] / base["float"])
                    closed[method].append(math.log(base["rounded"] / value) / gap)
                    rows.append(_row(scheme, f"{method} + GPTQ", seed, value, closed[method][-1]))
                rows[-1]["minutes"] = (time.monotonic() - began) / 60
                record.write(args.name, rows, __doc__.partition("\n")[0])
            for method, shares in closed.items():
                spread = f" ± {statistics.stdev(shares):.1%}" if len(shares) > 1 else ""
                rows.append(
                    {
                        "scheme": scheme,
                        "method": f"{method}: mean",
                        "gap closed": f"{statistics.mean(shares):.1%}{spread}",
                    }
                )
            record.write(args.name, rows, __doc__.partition("\n")[0])


def _row(scheme: str, method: str, seed: int, perplexity: float, closed: float | None) -> dict[str, Any]:
    row = {"scheme": scheme, "method": method, "seed": seed, "perplexity": perplexity}
    return row if closed is None else row | {"gap closed": f"{closed:.1%}"}


if __name__ == "__main__":
    main()
