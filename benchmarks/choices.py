"""stories260k: initialisations and the three forms of KL-Top, each over three seeds, everything else alike.

    PAREWELL_DATA=... python -m benchmarks.choices [--scheme w3a16-channel] [--steps 100]

Perplexity on 33 stories after learning and GPTQ, without tuning; "start" is the same without learning.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.stories import job, model
from compressor import Quantize, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w3a16-channel")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = job(Path(folder), scheme=args.scheme, steps=args.steps, block_steps=0, tune_steps=0)

        def perplexities(options: Quantize) -> list[float]:
            return [
                quantize(model(), Path(folder) / "out", replace(options, seed=seed))["quality"]["perplexity"]
                for seed in range(args.seeds)
            ]

        def add(choice: str, what: str, start: list[float] | None, learned: list[float]) -> None:
            row: dict[str, Any] = {"choice": choice, "": what}
            if start is not None:
                row["start"] = " ".join(f"{p:.3f}" for p in start)
            row["learned"] = " ".join(f"{p:.3f}" for p in learned)
            rows.append(row | {"mean": statistics.mean(learned), "deviation": statistics.stdev(learned)})
            record.write("choices", rows, __doc__.partition("\n")[0])

        for init in ("hadamard", "womi", "identity"):
            options = replace(base, init=init)
            add("initialisation", init, perplexities(options.without_learning()), perplexities(options))
        for loss in ("partial", "renormalised"):
            add("loss", loss, None, perplexities(replace(base, loss=loss)))


if __name__ == "__main__":
    main()
