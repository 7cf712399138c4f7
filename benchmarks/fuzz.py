"""Fuzz everything that reads files, guided by coverage: bytes and structure spoilt, nothing but success or one line.

    pip install atheris   # into an environment beside the project's, where it does not fit in
    python -m benchmarks.fuzz --seconds 1800 [--reader weights] [--found DIR]

The time is shared out evenly over the readers of tests/fuzz/readers.py, each in a process of its own (libFuzzer ends
its process), which starts from the sound files and from tests/fuzz/corpus. Half of the mutations are libFuzzer's own,
half those of tests/fuzz/mutate.py. A defect is told by exception and line, its first input is kept in DIR, and the run
goes on. Sockets are closed to the readers: none may fetch anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

CORPUS = Path(__file__).parents[1] / "tests/fuzz/corpus"
SLOW = 20  # seconds that no input may take
SEED = 1


def no_network(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a reader wants the network")


def fuzz(name: str, seconds: int, found: Path) -> NoReturn:
    """One reader, in this process, which ends with it; what was counted lies in `found`, as JSON."""
    import atheris  # not everyone has it

    with atheris.instrument_imports(include=["calib", "cli", "unlearn", "compressor", "json", "tomllib"]):
        from tests.fuzz.mutate import mutated
        from tests.fuzz.readers import outcome, readers
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    socket.socket.connect = no_network  # type: ignore[method-assign, assignment]
    scratch = Path(tempfile.mkdtemp())
    reader = readers(scratch)[name]
    counted: dict[str, Any] = {"reader": name, "executions": 0, "read": 0, "refused": 0, "slowest s": 0.0}
    defects: dict[str, str] = {}
    ends = time.monotonic() + seconds

    def once(data: bytes) -> None:
        began = time.monotonic()
        if began > ends:
            (found / f"{name}.json").write_text(json.dumps(counted | {"defects": defects}))
            os._exit(0)  # libFuzzer would go on until it has looked at its own clock
        counted["executions"] += 1
        try:
            counted["read" if outcome(reader, data) == "read" else "refused"] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of what is written in Rust is no Exception
            kept(data, error)
        counted["slowest s"] = max(counted["slowest s"], time.monotonic() - began)

    def kept(data: bytes, error: BaseException) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        if place not in defects:
            defects[place] = str(error)[:200]
            (found / f"{name}-{len(defects)}").write_bytes(data)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        if random.Random(seed).random() < 0.5:
            return atheris.Mutate(data, len(data))  # type: ignore[no-any-return]
        return mutated(data, reader.kind, seed, 1 + seed % 3)[:most]

    corpus = scratch / "corpus"
    corpus.mkdir()
    for i, data in enumerate(reader.seeds):
        (corpus / f"seed-{i}").write_bytes(data)
    kept_before = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
    flags = [f"-seed={SEED}", f"-timeout={SLOW}", "-rss_limit_mb=4096", "-max_len=20000", f"-artifact_prefix={found}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus), *kept_before], once, custom_mutator=mutator)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ends its process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all readers together")
    parser.add_argument("--reader", action="append", help="only this one; may be given again")
    parser.add_argument("--found", type=Path, help="where inputs go that show defects")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process is to be one reader's
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = args.found or Path(tempfile.mkdtemp(prefix="fuzz-"))
    found.mkdir(parents=True, exist_ok=True)
    if args.here:
        fuzz(args.reader[0], args.seconds, found)
    from benchmarks import record
    from tests.fuzz.readers import NAMES

    names = args.reader or list(NAMES)
    rows = []
    for name in names:
        part = args.seconds // len(names)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--here", "--reader", name, "--seconds", str(part)]
        process = subprocess.run([*command, "--found", str(found)], capture_output=True, text=True, check=False)
        said = found / f"{name}.json"
        row = json.loads(said.read_text()) if said.exists() else {"reader": name, "defects": {"died": ""}}
        if not said.exists():
            (found / f"{name}.txt").write_text(process.stdout + process.stderr)
        row["seconds"] = part
        row["defects"] = "; ".join(row["defects"]) or "none"
        rows.append(row)
        record.write("fuzz", rows, f"{__doc__.partition(chr(10))[0]} libFuzzer's seed is {SEED}.")
    print(f"inputs that show defects: {found}")


if __name__ == "__main__":
    main()
