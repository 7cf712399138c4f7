"""`parewell attribute MODEL OUT`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.from_dataclass import options_from
from unlearn import Attribute


@click.command(
    cls=GroupedCommand, short_help="Which training rows an answer comes from.",
    examples={
        "parewell attribute MODEL OUT.jsonl --train train.jsonl --query query.jsonl": "ten rows at either end a query",
        "parewell attribute MODEL OUT.jsonl --train train.jsonl --query query.jsonl --width 32 --top 3":
            "finer gradients, fewer rows",
    },
)  # fmt: skip
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print what is written to OUT as JSON on stdout")
@click.option("--resume/--no-resume", default=None, help="continue or discard an interrupted run beside OUT")
@options_from(Attribute)
def attribute_command(options: Attribute, model: str, out: Path, as_json: bool, resume: bool | None) -> None:
    """Find the rows of --train that make the answers of --query likelier or less likely, and write them to OUT.

    MODEL is a language model's directory or its name on the hub; it runs block by block, so it need not fit in memory.
    OUT has a line of JSON for each query.
    """
    local(model)
    from calib.jobs.journal import gentle_interrupts
    from calib.runtime.distributed import is_main_process, process_group
    from unlearn import attribute

    with process_group(options.device), gentle_interrupts(lambda note: click.echo(f"parewell: {note}", err=True)):
        found = attribute(model, out, options, resume=resume)
        if not is_main_process():
            return
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table(title=escape(str(out)))
    for name in ("query", "training row", "score", "text"):
        table.add_column(name, justify="right" if name != "text" else "left")
    for line in found[:5]:
        for row in line["raises"][:3]:
            table.add_row(str(line["query"]), str(row["row"]), f"{row['score']:.4g}", escape(row["text"][:60]))
    Console().print(table)
