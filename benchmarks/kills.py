"""Kill a job at random moments, or fill its disk; resume it, and compare the bytes: stories260k, all stages.

    PAREWELL_DATA=... python -m benchmarks.kills [--kills 40] [--job distill] [--signals KILL TERM HUP]
    mount -t tmpfs -o size=64m tmpfs DIR && PAREWELL_DATA=... python -m benchmarks.kills --disk DIR

Moment n is drawn from a generator with seed n, uniformly over the time an undisturbed run has a journal (before it
there is nothing to lose); the process gets SIGKILL, or --signals in turn. With --disk everything lies in DIR, a small
file system, and at the same moments another file takes all room but a random rest under 64 KiB, and gives it back when
the job has ended. Between the two runs OUT must be complete or absent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stories import job, model
from compressor import Distill
from unlearn import Unlearn


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def stage(journal: Path) -> str:
    """How far a killed run had come: the kind of the newest page in its journal."""
    pages = sorted(journal.glob("*.page"), key=lambda file: file.stat().st_mtime_ns) if journal.exists() else []
    return pages[-1].stem.partition("-")[0] if pages else "start"


def options_of(job: Any) -> list[str]:
    """What stands on the command line."""
    options = []
    for f in fields(job):
        value, flag = getattr(job, f.name), f"--{f.name.replace('_', '-')}"
        if value != f.default:
            options += [flag] if value is True else [flag, str(value)]
    return options


def quantizing(here: Path) -> list[str]:
    options = replace(
        job(here, scheme="w3a16-channel", steps=40, block_steps=10, tune_steps=30, length=128), samples=32, held_out=8
    )
    return ["quantize", *options_of(options)]


def distilling(here: Path) -> list[str]:
    data = job(here).data
    options = Distill(
        layers=3, data=data, samples=64, held_out=8, length=128, steps=60, batch=4, teacher="top-k", top_k=16
    )
    return ["distill", *options_of(options)]


def unlearning(here: Path) -> list[str]:
    """Stories as prompts and responses, the first four to be forgotten by matching what two folds say."""
    data = job(here).data
    assert data is not None
    stories = [json.loads(line)["text"] for line in data.read_text().splitlines()[:40]]
    train, training = here / "train.jsonl", here / "training.json"
    train.write_text("".join(json.dumps({"prompt": s[:20], "response": s[20:200]}) + "\n" for s in stories))
    training.write_text(json.dumps({"optimiser": "adamw", "epochs": 3, "batch": 8, "lr": 1e-4}))
    options = Unlearn(train=train, forget_lines="1-4", training=training, base=model(), estimator="folds", calibrate=2,
                  epochs=4, length=64)  # fmt: skip
    return ["unlearn", "--yes", *options_of(options)]


JOBS = {"quantize": quantizing, "distill": distilling, "unlearn": unlearning}


@contextmanager
def filled(disk: Path, rest: int) -> Iterator[None]:
    """All room of a file system taken but for `rest` bytes."""
    with tempfile.NamedTemporaryFile(dir=disk) as file:
        state = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - rest))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--job", choices=JOBS, default="quantize")
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "HUP", "INT"])
    parser.add_argument("--disk", type=Path, help="a small file system to fill up, instead of kills")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.disk) as scratch, tempfile.TemporaryFile() as said:
        here = Path(scratch)
        command, *options = JOBS[args.job](here)

        def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
            words = [sys.executable, "-m", "cli", command, str(model()), str(out), *options, *more]
            return subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=said,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup has made deaf
            )  # fmt: skip

        def until(path: Path, process: subprocess.Popen[bytes]) -> None:
            while not path.exists() and process.poll() is None:
                time.sleep(0.01)

        undisturbed = start(here / "whole")
        until(here / ".whole.journal", undisturbed)
        began = time.monotonic()
        assert undisturbed.wait() == 0
        seconds = time.monotonic() - began
        whole = digest(here / "whole")
        out, journal = here / "out", here / ".out.journal"
        for seed in range(args.kills):
            generator, sent = random.Random(seed), args.signals[seed % len(args.signals)]
            moment = generator.uniform(0, seconds)
            process = start(out, "--no-resume")
            until(journal, process)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                if args.disk is None:
                    process.send_signal(signal.Signals[f"SIG{sent}"])
                    process.wait()
                else:
                    with filled(args.disk, generator.randrange(2**16)):
                        process.wait()
            partial = out.exists() and digest(out) != whole
            row = {"seed": seed} | ({"signal": sent, "exit": process.returncode} if args.signals != ["KILL"] else {})
            row |= {"after s": moment, "with pages of": stage(journal), "OUT": "absent"}
            if args.disk is not None:
                said.seek(0)
                lines = said.read().decode().splitlines() if process.returncode else []
                row |= {"exit": process.returncode, "last line": lines[-1].replace(str(here), "") if lines else ""}
                said.seek(0)
                said.truncate()
            if out.exists():
                row["OUT"] = "partial" if partial else "complete"
            status = start(out, "--resume").wait() if not out.exists() else 0
            row["resumed"] = "same bytes" if status == 0 and digest(out) == whole else "DIFFERS"
            rows.append(row)
            left = sorted(p.name for p in here.iterdir() if p.name.startswith(".out"))
            row["left behind"] = " ".join(left) or "nothing"
            record.write(
                "-".join(
                    ["kills", *([args.job] if args.job != "quantize" else []), *(["full-disk"] if args.disk else [])]
                ),
                rows,
                f"{__doc__.partition(chr(10))[0]} An undisturbed run has its journal for {seconds:.0f} s.",
            )
            for file in out.iterdir():
                file.unlink()
            out.rmdir()


if __name__ == "__main__":
    main()
