"""One table that is embedding and head: what keeping, untying and rounding it costs in bytes and wins in KL.

    PAREWELL_DATA=... python -m benchmarks.tied --models smollm2 gemma3

GPTQ without learning, on rows of C4; where embedding and head are two tables the residual stream is rotated by a random
Hadamard, else nothing is. KL from the float model in nats a token and perplexity are on 20 rows of WikiText-2, each led
by a start token where the model has one; MB are of the safetensors files. "frontier": no other choice is both smaller
and nearer to the float model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.peers import prepare, quality
from benchmarks.real_models import CACHE
from calib import BadInput
from compressor import Quantize, load, quantize

UNTIED = {"tied": "untie", "init": "hadamard"}
CHOICES: dict[str, dict[str, Any]] = {
    "keep (default)": {},
    "untie": UNTIED,
    "one table in 8 bits": {"embedding": "w8"},
    "one table in 4 bits": {"embedding": "w4-g64"},
    "two tables in 8 bits": {"embedding": "w8", "lm_head": "w8"} | UNTIED,
    "two tables in 8 bits, not rotated": {"embedding": "w8", "lm_head": "w8"},
    "embedding in 8 bits, head in 4": {"embedding": "w8", "lm_head": "w4-g64"} | UNTIED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--samples", type=int, default=32, help="rows of 512 tokens that calibrate")
    parser.add_argument("--name", default="tied", help="of the results")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            folder, found, refused = Path(place), list[dict[str, Any]](), list[dict[str, Any]]()
            model = prepare(name, folder, args.cache, args.samples).resolve()
            given: dict[str, Any] = {
                "data": folder / "rows.safetensors",
                "held_out_data": folder / "test.safetensors",
                "held_out": 2,
            }
            for choice, options in ((c, CHOICES[c]) for c in args.choices):
                with tempfile.TemporaryDirectory() as made:
                    out = Path(made) / "out"
                    job = Quantize(scheme=args.scheme, samples=args.samples, learn=False, **given | options)
                    row: dict[str, Any] = {"model": name, "choice": choice}
                    try:
                        quantize(model, out, job, allow_damage=True)
                    except BadInput as error:  # norms that keep their gains leave no rotation that two tables are for
                        refused.append(row | {"note": f"no: {error}"})
                        continue
                    row["MB"] = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
                    figures = quality(load(out), str(model), folder / "test.safetensors")
                found.append(row | {"KL": figures["KL"], "perplexity": figures["perplexity"]})
                for one in found:
                    better = [r for r in found if r["MB"] < one["MB"] and r["KL"] < one["KL"]]
                    one["frontier"] = "" if better else "yes"
                record.write(args.name, rows + found + refused, (__doc__ or "").partition("\n\n")[0])
            rows += found + refused


if __name__ == "__main__":
    main()
