"""`parewell show OUT`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from calib.checkpoint import read_recipe
from calib.report import plain

PARTS = ("options", "data", "quality", "versions")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the recipe as JSON on stdout")
def show(out: Path, as_json: bool) -> None:
    """How OUT was made: every step's job, options, inputs and figures, oldest first."""
    steps = read_recipe(out)
    if as_json:
        click.echo(json.dumps(steps))
        return
    for number, step in enumerate(steps, 1):
        click.echo(f"{number}. {step['job']} of {step['model']['name']} (sha256 {step['model']['sha256'][:12]})")
        for part in PARTS:
            click.echo(f"   {part}: " + ", ".join(f"{k} {plain(v)}" for k, v in step[part].items() if v is not None))
