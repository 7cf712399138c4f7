"""`parewell evaluate MODEL`."""

from __future__ import annotations

import json
import math

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import compressor
from calib import Failed
from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.from_dataclass import options_from
from compressor import Evaluate


@click.command(
    cls=GroupedCommand, short_help="Perplexity, and agreement with a reference.",
    examples={
        "parewell evaluate OUT --data text.jsonl": "perplexity of any output",
        "parewell evaluate OUT --reference MODEL --data text.jsonl": "and KL from the model that it was made from",
    },
)  # fmt: skip
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@options_from(Evaluate)
def evaluate_command(options: Evaluate, model: str, as_json: bool) -> None:
    """Perplexity and bits per byte of MODEL, and how far it is from a reference."""
    local(model)
    quality = compressor.evaluate(model, options).asdict()
    if any(isinstance(value, float) and not math.isfinite(value) for value in quality.values()):
        raise Failed(f"{model}: its answers are no numbers; the weights are broken, or overflow")
    if as_json:
        click.echo(json.dumps(quality))
        return
    table = Table(title=escape(f"{model} on {options.data or 'the embedded held-out text'}"))
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in quality.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
