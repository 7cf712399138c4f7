"""Ways to stay orthogonal while learning: stories260k, w3a16-channel, same seeds, same scales' rate; perplexity after
GPTQ.

    pip install geoopt && PAREWELL_DATA=... python -m benchmarks.orthogonality [--steps 100] [--seeds 2]

ours: tangent at the current point, Cayley retraction after each step, plain Adam. cayley, exp: one free skew matrix for
the whole run, the map differentiated. geoopt: RiemannianAdam on the Stiefel manifold (Euclidean metric).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor

from benchmarks import record
from compressor import Quantize, quantize
from compressor.engine.rotations import Rotation, cayley, skew


class Parametrised:
    """start @ map(skew(free)), `map` differentiated."""

    def __init__(self, start: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.start = start.to(dtype)
        self.tangent = torch.zeros_like(self.start, requires_grad=True)

    @staticmethod
    def map(a: Tensor) -> Tensor:
        return cayley(a)

    def value(self) -> Tensor:
        return self.start @ self.map(skew(self.tangent))

    @property
    def point(self) -> Tensor:
        return self.value().detach()

    def retract(self) -> None:
        pass


class Exponential(Parametrised):
    @staticmethod
    def map(a: Tensor) -> Tensor:
        return torch.matrix_exp(a)


class Geoopt:
    """The point itself is the parameter; the optimizer keeps it on the manifold."""

    def __init__(self, start: Tensor, dtype: torch.dtype = torch.float32) -> None:
        manifold = geoopt.Stiefel(canonical=False)
        self.tangent = geoopt.ManifoldParameter(start.to(dtype).clone(), manifold=manifold)

    def value(self) -> Tensor:
        return self.tangent

    @property
    def point(self) -> Tensor:
        return self.tangent.detach()

    def retract(self) -> None:
        pass


WAYS = {"ours": Rotation, "cayley": Parametrised, "exp": Exponential, "geoopt": Geoopt}
RATES = {"ours": (0.05, 0.1, 0.2), "cayley": (0.1,), "exp": (0.1,), "geoopt": (0.01, 0.02, 0.04)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["PAREWELL_DATA"])
    stories = [
        s.strip() for s in (data / "text/tinystories-a-clean.txt").read_text().split("<|endoftext|>") if s.strip()
    ]
    rows: list[dict[str, Any]] = []
    learning, adam = sys.modules["compressor.quantization.learn_transforms"], torch.optim.Adam
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "calibration.jsonl", Path(folder) / "test.jsonl"]
        for file, some in zip(files, (stories[:150], stories[150:]), strict=True):
            file.write_text("".join(json.dumps({"text": s}) + "\n" for s in some))
        options = Quantize(
            scheme="w3a16-channel",
            data=files[0],
            held_out_data=files[1],
            held_out=33,
            samples=150,
            by_document=True,
            batch=6,
            steps=args.steps,
            block_steps=0,
            tune_steps=0,
        )
        for way in args.ways:
            learning.Rotation = WAYS[way]  # type: ignore[attr-defined]
            torch.optim.Adam = geoopt.optim.RiemannianAdam if way == "geoopt" else adam  # type: ignore[misc]
            for rate in RATES[way]:
                for seed in range(args.seeds):
                    began = time.monotonic()
                    report = quantize(
                        data / "stories260k", Path(folder) / "out", replace(options, seed=seed, lr_rotation=rate)
                    )
                    rows.append(
                        {
                            "way": way,
                            "rotation rate": rate,
                            "seed": seed,
                            "perplexity": report["quality"]["perplexity"],
                            "last losses": sum(report["curves"]["learn"][-10:]) / 10,
                            "seconds": time.monotonic() - began,
                        }
                    )
                    record.write("orthogonality", rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
