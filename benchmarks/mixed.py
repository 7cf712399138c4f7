"""Bits shared out among the parts of a model by what each suffers, against all parts alike, at the same rounding.

    PAREWELL_DATA=... python -m benchmarks.mixed --model stories260k [--seeds 0 1 2]
    PAREWELL_DATA=... python -m benchmarks.mixed --model smollm2 --seeds 0

GPTQ after a random Hadamard, nothing learned. "line" is what lies between uniform 3 and uniform 4 at the mean bits
that were reached: a model in which half of the weights, taken anywhere, had 3 bits and half 4 would be expected there.
"geometric" is the line in logarithms: 3.5 bits for all would be expected there, if there were such a grid.
stories260k: per channel; calibration and test as in benchmarks.stories. SmolLM2-135M: groups of 64; 32 rows of 512
tokens of C4 calibrate, two of them show what each part suffers, and the first 10,240 tokens of the WikiText-2 test text
give the figure.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import record, stories
from benchmarks.real_models import real_model
from compressor import Quantize, quantize


def of_stories(folder: Path) -> tuple[Path, Quantize]:
    return stories.model(), stories.job(folder, scheme="w4a16-channel").without_learning()


def of_smollm2(folder: Path) -> tuple[Path, Quantize]:
    model, text = real_model("smollm2"), Path(os.environ["PAREWELL_DATA"]) / "text"
    ids = AutoTokenizer.from_pretrained(model)((text / "wikitext2-raw-test.txt").read_text(), verbose=False)
    test = folder / "test.safetensors"
    save_file({"input_ids": torch.tensor(ids["input_ids"][:10_240]).view(20, 512)}, test)
    options = Quantize(
        scheme="w4a16-g64", data=text / "c4-sample-1000.jsonl", held_out_data=test, samples=32, held_out=20, length=512,
        learn=False,
    )  # fmt: skip
    return model, options


MODELS = {"stories260k": of_stories, "smollm2": of_smollm2}
PROFILE_ROWS = {"stories260k": 8, "smollm2": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[3.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, options = MODELS[args.model](Path(folder))
        narrow = replace(options, scheme=options.scheme.replace("w4", "w3"))
        for seed in args.seeds:
            mixed = [
                replace(options, target_bits=target, profile="measured", profile_rows=PROFILE_ROWS[args.model])
                for target in args.targets
            ]
            ends: list[dict[str, Any]] = []
            for one in (narrow, options, *mixed):
                began = time.monotonic()
                report = quantize(model, Path(folder) / "out", replace(one, seed=seed), resume=False)
                quality, bits = report["quality"], report.get("precision", {}).get("mean_bits", len(ends) + 3.0)
                row = {
                    "seed": seed,
                    "bits": "shared out" if one in mixed else "all alike",
                    "mean bits": round(bits, 3),
                    "KL": quality["kl"],
                    "perplexity": quality["perplexity"],
                    "float": quality["reference_perplexity"],
                    "megabytes": report["bytes"]["after"] / 1e6,
                }
                if one in mixed:
                    row |= {f"line, {of}": _between(ends, bits, of) for of in ("KL", "perplexity")}
                    row |= {"geometric, KL": math.exp(_between(ends, bits, "KL", math.log))}
                else:
                    ends.append(row)
                rows.append(row | {"minutes": (time.monotonic() - began) / 60})
                record.write(f"mixed-{args.model}", rows, __doc__.partition("\n")[0])


def _between(ends: list[dict[str, Any]], bits: float, of: str, scale: Callable[[float], float] = float) -> float:
    three, four = (scale(float(row[of])) for row in ends)
    return three + (bits - 3) * (four - three)


if __name__ == "__main__":
    main()
