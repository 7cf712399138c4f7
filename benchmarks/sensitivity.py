"""What rounding each part of a model costs: predicted from one backward pass, against measured part by part.

    PAREWELL_DATA=... python -m benchmarks.sensitivity --model stories260k [--seeds 0 1 2]
    PAREWELL_DATA=... python -m benchmarks.sensitivity --model smollm2 --blocks 8 --journal DIR

GPTQ after a random Hadamard, in 3 and in 4 bits. Ranks are Spearman's, over all parts that were measured; the ratio is
of predicted to measured KL, median (10% to 90% of the parts). CPU seconds are of the process, one thread. With --blocks
only the parts of so many blocks are measured, in a walk to the last block as ever; --journal keeps what was measured,
so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.mixed import MODELS
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from compressor import Quantize
from compressor.quantization.job import QuantizationJob, validate_quantization
from compressor.quantization.precision import mixed_precision
from compressor.quantization.precision.mixed_precision import LayerGroup
from compressor.quantization.precision.sensitivity import kl_together, predict_groups, profile_rank_correlation
from compressor.quantization.stages import model_of_job

WIDTHS = [3, 4]
SMALLER: dict[str, dict[str, Any]] = {  # than the job of benchmarks.mixed, so that an evening is enough
    "stories260k": {},
    "smollm2": {"samples": 8, "held_out": 2, "held_out_data": None, "length": 256},
}
ROWS = {"stories260k": (16, 16), "smollm2": (8, 1)}  # that sensitivity and measurement take


def timed(work: Callable[[], list[LayerGroup]]) -> tuple[list[LayerGroup], float]:
    began = time.process_time()
    return work(), time.process_time() - began


def measured(job: QuantizationJob, blocks: int | None, rows: int, context: RunContext) -> list[LayerGroup]:
    """Of the first `blocks` blocks, or all."""
    model, shown = model_of_job(job), job.rows.calibration[:rows]
    if blocks is None:
        return mixed_precision.profile_groups(model, job.rows.calibration, rows, WIDTHS, job.rounder, context)
    page = "profile-0-0"
    if page not in context.journal:
        runs = mixed_precision._PerturbedRuns(model, job.rows.calibration, shown, WIDTHS, job.rounder)
        context.journal.write(page, {}, runs.run(range(blocks), context))
    found = context.journal.notes(page)
    parts = [part for i in range(blocks) for part in mixed_precision.layer_groups(job.stream.linears(i))]
    return [LayerGroup.of(part, {b: found[f"{part[0].name}.{b}"][0] for b in WIDTHS}, {}) for part in parts]


def row_of(job: QuantizationJob, name: str, seed: int, blocks: int | None, journal: Path) -> dict[str, Any]:
    context, (shown, rows) = RunContext(Journal(journal), job.budget), ROWS[name]
    model, some = model_of_job(job), job.rows.calibration[:shown]
    predicted, quick = timed(lambda: predict_groups(model, some, job.options, job.rounder, context).groups)
    parts, slow = timed(lambda: measured(job, blocks, rows, context))
    named = {one.linears: one for one in predicted}
    own = [named[one.linears] for one in parts]
    row: dict[str, Any] = {"seed": seed, "parts": len(parts), "CPU s, predicted": quick, "CPU s, measured": slow}
    for bits, rank in profile_rank_correlation(parts, own).items():
        b = int(bits)
        ratio = torch.tensor([one.kl[b] / other.kl[b] for one, other in zip(own, parts, strict=True)])
        low, middle, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        row |= {f"rank, {bits} bits": rank, f"ratio, {bits} bits": f"{middle:.2f} ({low:.2f} to {high:.2f})"}
    together = {name: 4 for part in predicted for name in part.linears}
    row["sum predicted, 4 bits"] = sum(one.kl[4] for one in predicted)
    return row | {"measured together, 4 bits": kl_together(model, some, some, together, job.rounder, context)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--journal", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        model, options = MODELS[args.model](Path(folder))
        options = replace(options, target_bits=3.5, candidate_bits="3,4", **SMALLER[args.model])
        for seed in args.seeds:
            journal = (args.journal or Path(folder)) / f"{args.model}-{seed}"
            journal.mkdir(parents=True, exist_ok=True)
            asked: Quantize = replace(options, seed=seed)
            job = validate_quantization(model, Path(folder) / "out", asked)
            rows.append(row_of(job, args.model, seed, args.blocks, journal))
            record.write(f"sensitivity-{args.model}", rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
