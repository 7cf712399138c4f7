"""A rounded adder repaired on its own answers: forward KL, k2, GRPO, KDRL and f-DPG with the same tokens, three seeds.

    python -m benchmarks.additions [--teacher DIR] [--steps 60]

The teacher is a LLaMA of two blocks, 64 wide, taught all additions of two two-digit numbers (more than 99% right). It
is rounded to w3a8-channel (GPTQ), where 0.1% of its answers go wrong, and to w2a8-channel to nearest, where four in ten
do: that one is repaired. Each job sees 8 prompts of 5,000 and 8 answers to each, a step. Learning rate, and beta where
there is one, are those with the highest reward on 100 of these prompts that are held out of training, seed 0; figures
are of 200 other prompts, 16 answers each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import record
from compressor import Distill, Quantize, distill, quantize
from tests.additions import adder, share_right, write_rows

JOBS: dict[str, dict[str, Any]] = {
    "forward KL": {"loss": "forward-kl"},
    "k2": {"loss": "k2"},
    "GRPO": {"loss": "grpo"},
    "KDRL": {"loss": "kdrl"},
    "KDRL, beta by difficulty": {"loss": "kdrl", "kl_by_difficulty": True},
    "f-DPG, JS": {"loss": "f-dpg(js)"},
    "f-DPG, JS, verified": {"loss": "f-dpg(js)", "target": "verified"},
    "forward KL, corrected": {"loss": "forward-kl", "correct": 2.3},
}
RATES, BETAS, SEEDS = (3e-4, 1e-3, 3e-3), (0.03, 0.3), (0, 1, 2)
SHOWN = ("reward", "pass@8", "length", "entropy", "reverse_kl", "forward_kl", "target_kl")


def figures_of(report: dict[str, Any], when: str) -> dict[str, float | None]:
    """Reward (pass@1) and the others by name."""
    found = report["on_policy"]["figures"][when]
    return {name: found["pass_at"]["8"] if name == "pass@8" else found[name] for name in SHOWN}


def chosen(teacher: Path, place: Path, options: Distill, change: dict[str, Any]) -> dict[str, Any]:
    """The rate and beta with the highest reward on prompts that are not scored."""
    betas = BETAS if change["loss"] in ("kdrl", "f-dpg(js)") and "target" not in change else (0.1,)
    tried = [{"lr": rate, **({"beta": beta} if len(betas) > 1 else {})} for rate in RATES for beta in betas]
    rewards = []
    for i, one in enumerate(tried):
        given = replace(options, held_out=100, held_out_data=None, seed=0, **change, **one)
        report = distill(teacher, place / f"choice-{len(list(place.iterdir()))}-{i}", given, allow_damage=True)
        rewards.append(report["on_policy"]["figures"]["after"]["reward"])
    return tried[rewards.index(max(rewards))]


def spread(values: list[float | None]) -> str:
    """Mean and range over seeds."""
    some = [value for value in values if value is not None]
    if not some:
        return ""
    if len(some) == 1:
        return f"{some[0]:.4g}"
    return f"{statistics.mean(some):.4g} ({min(some):.4g} to {max(some):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", type=Path, help="a trained adder; default: one is trained")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        place = Path(where)
        teacher = arguments.teacher or adder(place / "teacher", 2, width=64, steps=3000, batch=256)
        train = write_rows(place / "train.jsonl", 2, slice(0, 5000))
        scored = write_rows(place / "scored.jsonl", 2, slice(5000, 10_000))
        calibration = Quantize(
            scheme="w3a8-channel", data=train, by_document=True, learn=False, samples=64, held_out=32
        )
        harder = replace(calibration, scheme="w2a8-channel", rounding="rtn", init="none")
        quantize(teacher, place / "w3", calibration, allow_damage=True)
        quantize(teacher, place / "w2", harder, allow_damage=True)
        options = Distill(
            student=place / "w2", data=train, held_out=200, held_out_data=scored, length=12, on_policy=1.0,
            reward="exact", group=8, batch=8, steps=arguments.steps, warmup=5, device="cpu",
        )  # fmt: skip
        w3 = distill(
            teacher, place / "w3-1", replace(options, student=place / "w3", steps=1, lr=1e-9), allow_damage=True
        )
        rows: list[dict[str, Any]] = [
            {"student": "the teacher", **{n: spread([v]) for n, v in figures_of(w3, "teacher").items()}},
            {"student": "w3a8-channel", **{n: spread([v]) for n, v in figures_of(w3, "before").items()}},
        ]
        for name, change in JOBS.items():
            best = chosen(teacher, place, options, change)
            reports = [
                distill(
                    teacher, place / f"{name}-{seed}", replace(options, seed=seed, **change, **best), allow_damage=True
                )
                for seed in SEEDS
            ]
            if len(rows) == 2:
                before = [figures_of(report, "before") for report in reports]
                rows.append({"student": "w2a8-channel", **{n: spread([b[n] for b in before]) for n in SHOWN}})
            after = [figures_of(report, "after") for report in reports]
            rows.append(
                {"student": name, **{n: spread([a[n] for a in after]) for n in SHOWN},
                 **{n: f"{v:g}" for n, v in best.items()}}
            )  # fmt: skip
            print(rows[-1], flush=True)
        notes = (
            f"{share_right(teacher, 2):.2%} of all 10,000 additions right, greedily. {arguments.steps} steps of 64 "
            "answers. Mean over three seeds, and the range. reward is pass@1; entropy and KLs are of whole answers, in "
            "nats."
        )
        record.write("additions", rows, notes)


if __name__ == "__main__":
    main()
