"""`parewell show OUT`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from calib.jobs.options import with_new_names
from calib.jobs.recipe import read_recipe
from calib.model.config import RECIPE
from calib.quant.scheme import Scheme
from calib.report.html import plain_text
from cli.command import GroupedCommand
from cli.folders import check_written
from cli.replay import JOBS

PARTS = ("options", "data", "forgotten", "quality", "versions")
MADE = {
    "quantize": "quantized from",
    "distill": "distilled from",
    "unlearn": "unlearned from",
    "export": "exported from",
    "soup": "averaged from",
}


@click.command(
    cls=GroupedCommand, short_help="How an output was made, step by step.",
    examples={
        "parewell show OUT": "models, options, data and figures",
        "parewell show OUT --json": "the recipe itself",
    },
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the recipe as JSON on stdout")
def show_command(out: Path, as_json: bool) -> None:
    """Show how OUT was made: every step's model, options that are no defaults, inputs and figures, oldest first."""
    check_written(out, RECIPE)
    steps = read_recipe(out)
    if as_json:
        click.echo(json.dumps(steps))
        return
    for number, step in enumerate(steps, 1):
        made, model = MADE.get(step["job"], f"{step['job']} of"), step["model"]
        click.echo(f"{number}. {made} {model['name']} (sha256 {model['sha256'][:12]})")
        if student := step.get("student"):
            click.echo(f"   student: {student['name']} (sha256 {student['sha256'][:12]})")
        for other in step.get("with", []):
            click.echo(f"   and: {other['name']} (sha256 {other['sha256'][:12]})")
        if of := step.get("teacher"):
            jobs = (f"{MADE.get(one['job'], one['job'])} {one['model']['name']}" for one in of)
            click.echo(f"   its teacher: {', '.join(jobs)}")
        for part in PARTS:
            found = _chosen(step) if part == "options" else step.get(part) or {}
            if part == "options" and "scheme" in step:  # however it was chosen, it is what OUT is in
                found = {"scheme": Scheme.recorded_name(step["scheme"])} | found
            if text := ", ".join(f"{k} {plain_text(v)}" for k, v in found.items() if v is not None):
                click.echo(f"   {part}: {text}")


def _chosen(step: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not the job's defaults."""
    job = JOBS[step["job"]][0] if step["job"] in JOBS else None
    defaults = {f.name: f.default for f in fields(job)} if job else {}
    options = with_new_names(step["job"], step["options"])
    return {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
