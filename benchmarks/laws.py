"""What is foretold of losses that were not measured, against measuring them: of bits, of students' sizes, of more rows.

    PAREWELL_DATA=... python -m benchmarks.laws [--seeds 0 1 2]

stories260k, KL from it on 33 stories in nats a token. "law": each width (GPTQ after a random Hadamard) and each student
(cut out, 400 steps) is left out and foretold from the others; the band is that of 95%. "rows": learned in 60 steps on n
stories and on each half of them, which foretells what twice as many win; theory is p / 2n.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, stories
from calib.stats.scaling_law import cut_size, fit
from compressor import Distill, distill, quantize

BITS = (2, 3, 4, 5, 6, 8)
STUDENTS = ({"layers": 1}, {"layers": 2}, {"layers": 3}, {"layers": 4}, {"ffn": 86}, {"ffn": 43})
ROWS = (8, 16, 32, 64, 128)


def laws(kind: str, seed: int, sizes: list[float], scales: list[float], losses: list[float]) -> list[dict[str, Any]]:
    """A row for each: left out, and foretold from the others."""
    rows = []
    whole = fit(scales, losses)
    for i, size in enumerate(sizes):
        others = [j for j in range(len(sizes)) if j != i]
        law = fit([scales[j] for j in others], [losses[j] for j in others])
        told, low, high = law.predicted(scales[i])
        rows.append({
            "kind": kind, "seed": seed, "size": size, "KL": losses[i], "foretold": told,
            "band": f"{low:.3g} to {high:.3g}", "within": str(low <= losses[i] <= high).lower(),
            "exponent of all": f"{whole.exponent:.2f} ± {whole.exponent_error:.2f}",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--parts", nargs="+", choices=["bits", "parameters", "rows"], default=["bits", "parameters", "rows"]
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, about = list[dict[str, Any]](), str(__doc__).split("\n")[0]
    more = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed in args.seeds:
            fixed = stories.job(folder, scheme="w4a16-channel", seed=seed).without_learning()
            losses = (
                []
                if "bits" not in args.parts
                else [
                    quantize(stories.model(), folder / "out", replace(fixed, scheme=f"w{b}a16-channel"), resume=False)[
                        "quality"
                    ]["kl"]
                    for b in BITS
                ]
            )
            if losses:
                rows += laws("bits", seed, list(BITS), [2.0**b for b in BITS], losses)
                record.write("laws", rows, about)
            counts, kls = list[float](), list[float]()
            for shape in STUDENTS if "parameters" in args.parts else ():
                options = Distill(
                    data=fixed.data, held_out_data=fixed.held_out_data, by_document=True, samples=150, held_out=33,
                    steps=400, batch=6, lr=1e-3, seed=seed, **shape,
                )  # fmt: skip
                report = distill(stories.model(), folder / "out", options, resume=False)
                counts.append(report["parameters"]["student"])
                kls.append(report["quality"]["kl"])
            if kls:
                whole = report["parameters"]["teacher"]
                rows += laws("parameters", seed, counts, [cut_size(count, whole) for count in counts], kls)
                record.write("laws", rows, about)
            before: dict[str, Any] | None = None
            for n in ROWS if "rows" in args.parts else ():
                options = replace(fixed, samples=n, learn=True, steps=60, batch=4, halves=True)
                found = quantize(stories.model(), folder / "out", options, resume=False)["samples"]
                if before is not None:
                    more[-1]["twice as many won"] = before["whole"] - found["whole"]
                more.append({
                    "seed": seed, "rows": n, "tokens": found["tokens"], "KL": found["whole"],
                    "half of them cost": found["change"], "±": found["change_error"],
                    "foretold of twice as many": found["win"], "p": found["parameters"], "p / 2n": found["risk"],
                })  # fmt: skip
                before = found
                record.write("laws-rows", more, about)


if __name__ == "__main__":
    main()
