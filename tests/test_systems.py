"""docs/systems.md: its commands are understood, and the tests, figures and pages that it names are there."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from cli.main import parewell
from compressor import Distill, Quantize, Soup
from unlearn import Unlearn

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/systems.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]
JOBS: dict[str, Any] = {"distill": Distill, "quantize": Quantize, "soup": Soup, "unlearn": Unlearn}


def test_all_are_there() -> None:
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 26))
    assert all(len(row) == 6 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[1].partition(" (")[0] for row in ROWS])
def test_what_is_named_is_there(row: list[str]) -> None:
    """The command's options are read as the command line reads them, and make a job's options without a refusal."""
    files = re.findall(r"`((?:tests|benchmarks)/[^`]+)`", " ".join(row))
    assert any(file.startswith("tests/") for file in files)
    assert all((ROOT / file).is_file() for file in files), files
    (line,) = re.findall(r"`(parewell [^`]+)`", row[2])
    name, *words = shlex.split(line)[1:]
    command = parewell.commands[name]
    with click.Context(command) as context:
        command.parse_args(context, words)
    if name in JOBS:
        names = {f.name for f in fields(JOBS[name])}
        JOBS[name](**{option: value for option, value in context.params.items() if option in names})
