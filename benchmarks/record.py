"""How benchmarks write what they measured: a table and the facts needed to run it again."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def cpu() -> str:
    """Model and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _module() -> str:
    """The module that is run."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).stem if spec is None else spec.name.removesuffix(".__main__")


def write(name: str, rows: Sequence[dict[str, Any]], notes: str) -> None:
    """Keep `rows` under benchmarks/results/NAME.json, and print and keep them as a table in NAME.md."""
    packages = ("parewell", "torch", "transformers", "numpy")
    local = ("--cache", "--disk", "--journal")  # what follows is a path of this machine
    arguments = [
        "DIR" if before in local or (os.sep in a and Path(a).exists()) else a for before, a in pairwise(sys.argv)
    ]
    facts: dict[str, Any] = {
        "command": " ".join(["python", "-m", _module(), *arguments]),
        "versions": {p: installed(p) for p in packages} | {"python": platform.python_version()},
        "machine": cpu(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(c, '')) for c in columns)} |" for row in rows]
    table = "\n".join(lines)
    versions = ", ".join(f"{p} {v}" for p, v in facts["versions"].items())
    (RESULTS / f"{name}.md").write_text(
        f"`{facts['command']}`  \n{versions}  \n{facts['machine']}\n\n{notes}\n\n{table}\n"
    )
    print(table, flush=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
