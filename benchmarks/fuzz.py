"""Fuzz everything that reads files, guided by coverage: bytes and structure spoilt, nothing but success or one line.

    pip install '.[fuzz]'
    python -m benchmarks.fuzz --seconds 1800 [--reader weights] [--found DIR]

The time is shared out evenly over the readers of tests/fuzz/readers.py, each in a process forked for it (libFuzzer ends
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
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import atheris
import torch
from transformers.utils import logging

from benchmarks import record

with atheris.instrument_imports(include=["calib", "cli", "unlearn", "compressor", "json", "tomllib"]):
    from tests.fuzz.mutate import mutated
    from tests.fuzz.readers import NAMES, Reader, outcome, readers

CORPUS = Path(__file__).parents[1] / "tests/fuzz/corpus"
SLOW = 20  # seconds that no input may take
SEED = 1


def no_network(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a reader wants the network")


def fuzz(atheris: Any, reader: Reader, name: str, seconds: int, found: Path, corpus: Path) -> NoReturn:
    """One reader, in this process, which ends with it; what was counted lies in `found`, as JSON."""
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
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            if place not in defects:
                defects[place] = str(error)[:200]
                (found / f"{name}-{len(defects)}").write_bytes(data)
        counted["slowest s"] = max(counted["slowest s"], time.monotonic() - began)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        if random.Random(seed).random() < 0.5:
            return bytes(atheris.Mutate(data, len(data)))
        return mutated(data, reader.kind, seed, 1 + seed % 3)[:most]

    corpus.mkdir()
    for i, data in enumerate(reader.seeds):
        (corpus / f"seed-{i}").write_bytes(data)
    kept_before = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
    longest = max(20000, *(2 * len(seed) for seed in reader.seeds))
    flags = [f"-seed={SEED}", f"-timeout={SLOW}", "-rss_limit_mb=4096", f"-max_len={longest}"]
    flags.append(f"-artifact_prefix={found}/")
    atheris.Setup([sys.argv[0], *flags, str(corpus), *kept_before], once, custom_mutator=mutator)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ends its process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all readers together")
    parser.add_argument("--reader", action="append", choices=NAMES, help="only this one; may be given again")
    parser.add_argument("--found", type=Path, help="where inputs go that show defects")
    args = parser.parse_args()
    found = args.found or Path(tempfile.mkdtemp(prefix="fuzz-"))
    found.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    socket.socket.connect = no_network  # type: ignore[method-assign, assignment]
    scratch, rows = Path(tempfile.mkdtemp()), []
    readers_of_all, names = readers(scratch), args.reader or list(NAMES)
    part = args.seconds // len(names)
    for name in names:
        said = found / f"{name}.json"
        said.unlink(missing_ok=True)
        if (process := os.fork()) == 0:
            with (found / f"{name}.txt").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            fuzz(atheris, readers_of_all[name], name, part, found, scratch / f"corpus-{name}")
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        row = json.loads(said.read_text()) if said.exists() else {"reader": name, "defects": [f"died of {status}"]}
        rows.append(row | {"seconds": part, "defects": "; ".join(row["defects"]) or "none"})
        record.write("fuzz", rows, f"{__doc__.partition(chr(10))[0]} libFuzzer's seed is {SEED}.")
    print(f"inputs that show defects: {found}")


if __name__ == "__main__":
    main()
