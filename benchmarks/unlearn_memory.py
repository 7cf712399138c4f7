"""Peak memory of jobs, measured, beside what --dry-run foretells.

    python -m benchmarks.unlearn_memory MODEL... [--rows 6] [--jobs unlearn distill quantize]

MODELs are folders of causal language models. Every job and every dry run is a process of its own; figures are the
greatest resident size that the system says it had. "weights" are those in single precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write
from calib.model.weights import Weights

RUN = (
    "import resource, subprocess, sys; done = subprocess.run([sys.executable, '-m', 'cli', *sys.argv[1:]]); "
    "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, done.returncode)"
)


def peak(*words: object) -> tuple[int, str]:
    """Bytes, and what the command printed."""
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    _, held, status = last.split()
    if status != "0":
        raise SystemExit(done.stderr)
    return int(held), "\n".join(printed)


def jobs(model: Path, place: Path, rows: int) -> dict[str, list[object]]:
    """Command lines, without OUT."""
    file = place / "rows.jsonl"
    lines = [
        {"prompt": f"Who is person {i}?", "completion": f"Person {i} paints in town {7 * i}."} for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    moving = ["--train", file, "--forget-lines", 1, "--epochs", 2, "--lr", 1e-6, "--allow-damage"]
    few = ["--samples", 8, "--held-out", 2, "--length", 128]
    return {
        "unlearn": ["unlearn", model, "--method", "npo", *moving],
        "unlearn-checkpointing": ["unlearn", model, "--method", "npo", *moving, "--gradient-checkpointing"],
        "unlearn-adamw8bit": ["unlearn", model, "--method", "npo", *moving, "--optimizer", "adamw8bit"],
        "distill": ["distill", model, *few, "--student", model, "--steps", 4, "--allow-damage"],
        "quantize": ["quantize", model, *few, "--scheme", "w4a16-channel", "--no-learn", "--allow-damage"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--jobs", nargs="+", default=["unlearn", "distill", "quantize"])
    asked = parser.parse_args()
    found = list[dict[str, Any]]()
    for model in asked.models:
        entries = Weights(model).entries.values()
        weights = 4 * sum(entry.bytes // entry.dtype.itemsize for entry in entries)
        for name in asked.jobs:
            with tempfile.TemporaryDirectory() as folder:
                command, given, *rest = jobs(model, Path(folder), asked.rows)[name]
                told = json.loads(peak(command, given, Path(folder) / "none", *rest, "--dry-run", "--json")[1])
                held, _ = peak(command, given, Path(folder) / "out", *rest)
            foretold = told["peak_bytes"]
            row = {
                "model": model.name,
                "job": name,
                "weights (MB)": round(weights / 1e6),
                "peak (MB)": round(held / 1e6),
            }
            found.append(row | {"foretold (MB)": round(foretold / 1e6), "foretold / peak": foretold / held})
            print(found[-1], flush=True)
    write("unlearn-memory", found, "Peak resident memory of whole processes.", "unlearn_memory")


if __name__ == "__main__":
    main()
