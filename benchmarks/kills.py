"""Kill a job at random moments, resume it, and compare the bytes: stories260k, all stages.

    PAREWELL_DATA=... python -m benchmarks.kills [--kills 40]

Moment n is drawn from a generator with seed n, uniformly over the time an undisturbed run takes; the process gets
SIGKILL. Between kill and resume OUT must be complete or absent.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stories import job, model


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def stage(journal: Path) -> str:
    """How far a killed run had come, by the newest kind of page in its journal."""
    pages = {file.stem.partition("-")[0] for file in journal.glob("*.page")} if journal.exists() else set()
    return next((name for name in ("tune", "rounded", "block", "learn", "teacher", "float") if name in pages), "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        how = replace(job(here, scheme="w3a16", steps=12, tune_steps=8, length=128), samples=32, held_out=8)
        changed = [(f.name, getattr(how, f.name)) for f in fields(how) if getattr(how, f.name) != f.default]
        options = []
        for name, value in changed:
            flag = f"--{name.replace('_', '-')}"
            options += [flag] if value is True else [flag, str(value)]

        def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "cli", "quantize", str(model()), str(out), *options, *more]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        began = time.monotonic()
        assert start(here / "whole").wait() == 0
        seconds = time.monotonic() - began
        whole = digest(here / "whole")
        out, journal = here / "out", here / ".out.journal"
        for seed in range(args.kills):
            moment = random.Random(seed).uniform(0, seconds)
            process = start(out, "--no-resume")
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            partial = out.exists() and digest(out) != whole
            row = {"seed": seed, "killed after s": moment, "with pages of": stage(journal), "OUT": "absent"}
            if out.exists():
                row["OUT"] = "partial" if partial else "complete"
            status = start(out, "--resume").wait() if not out.exists() else 0
            row["resumed"] = "same bytes" if status == 0 and digest(out) == whole else "DIFFERS"
            rows.append(row)
            left = sorted(p.name for p in here.iterdir() if p.name.startswith("."))
            row["left behind"] = " ".join(left) or "nothing"
            record.write("kills", rows, f"{__doc__.partition(chr(10))[0]} An undisturbed run takes {seconds:.0f} s.")
            for file in out.iterdir():
                file.unlink()
            out.rmdir()


if __name__ == "__main__":
    main()
