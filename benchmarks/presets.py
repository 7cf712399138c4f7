"""The presets of each job on stories260k: time and quality on held-out rows, over seeds.

    PAREWELL_DATA=... python -m benchmarks.presets [--jobs quantize distill unlearn] [--presets ...]

Quantization (w3a16-channel, where there is most to win; 64 rows) and distillation (three of five blocks stay; 256 rows)
take rows of 128 tokens of stories and are measured on 32 of other stories: KL from the model that they began with, in
nats a token. Unlearning: TOFU's facts, taught to the model here, of which a quarter is to be forgotten by simnpo; "gap"
is the share of the way that the forget set's nats go to those of a model that was trained without it (1: all the way),
"kept" how much worse retained rows got, in nats a token. CPU seconds of one thread; a spread is that of the seeds
(largest less smallest).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.stories import job, model
from benchmarks.without_recipe import language, taught
from calib.jobs.options import PRESET_NAMES
from compressor import Distill, Quantize, distill, quantize
from unlearn import Unlearn, unlearn
from unlearn.model.training_recipe import Training

Figures = dict[str, float]
ROWS, HELD_OUT, LENGTH = 64, 32, 128


def quantized(place: Path, preset: str, seed: int) -> Figures:
    rows = job(place)
    options = Quantize.preset(
        preset, scheme="w3a16-channel", data=rows.data, held_out_data=rows.held_out_data, length=LENGTH,
        samples=ROWS, held_out=HELD_OUT, seed=seed,
    )  # fmt: skip
    return {"KL": quantize(model(), place / "out", options)["quality"]["kl"]}


def distilled(place: Path, preset: str, seed: int) -> Figures:
    rows = job(place)
    options = Distill.preset(
        preset, layers=3, data=rows.data, held_out_data=rows.held_out_data, length=LENGTH, samples=4 * ROWS,
        held_out=HELD_OUT, seed=seed,
    )  # fmt: skip
    return {"KL": distill(model(), place / "out", options)["quality"]["kl"]}


def unlearned(place: Path, preset: str, seed: int) -> Figures:
    data = Path(os.environ["PAREWELL_DATA"])
    training = Training(optimiser="adamw", epochs=15, batch=8, lr=3e-3, decay=0.0, warmup=0.1)
    start, plain, training = language(model(), 40, training)(data, place)
    forgetful, never = taught(start, plain, training, place)
    began = time.process_time()
    options = Unlearn.preset(
        preset, train=plain.train, forget_lines=plain.forget_lines, length=plain.length, method="simnpo", seed=seed
    )
    report = unlearn(forgetful, place / "out", options, resume=False, allow_damage=True)
    was, now = (report["quality_by_stage"][stage] for stage in ("before", "after"))
    gap = (now["forget"]["nats"] - was["forget"]["nats"]) / (never - was["forget"]["nats"])
    took = time.process_time() - began
    return {"gap": gap, "kept": now["retain"]["nats"] - was["retain"]["nats"], "CPU seconds": took}


RUNS: dict[str, Callable[[Path, str, int], Figures]] = {
    "quantize": quantized, "distill": distilled, "unlearn": unlearned
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--presets", nargs="+", choices=PRESET_NAMES, default=PRESET_NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="presets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        for name in args.jobs:
            for preset in args.presets:
                found = list[Figures]()
                for seed in args.seeds:
                    began = time.process_time()
                    figures = RUNS[name](Path(place), preset, seed)
                    found.append({"CPU seconds": time.process_time() - began} | figures)
                    print(name, preset, seed, found[-1], flush=True)
                row: dict[str, Any] = {"job": name, "preset": preset}
                for figure in found[0]:
                    values = [one[figure] for one in found]
                    row[figure] = statistics.fmean(values)
                    if figure != "CPU seconds":
                        row[f"{figure}, spread"] = max(values) - min(values)
                rows.append(row)
    record.write(args.name, rows, f"Means over {len(args.seeds)} seeds of rows, batches and rotations.")


if __name__ == "__main__":
    main()
