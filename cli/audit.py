"""`parewell audit MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model, local
from cli.command import GroupedCommand
from cli.from_dataclass import check_page, options_from
from unlearn import Audit
from unlearn.report.recovery import audited_page
from unlearn.report.verdict import audited_verdict


@click.command(
    cls=GroupedCommand, short_help="Forgotten knowledge that quantization recovers.",
    examples={
        "parewell audit OUT --original MODEL --oracle RETRAINED": "of the rows that OUT's recipe names",
        "parewell audit OUT --original MODEL --oracle RETRAINED --forms nf4,gptq:w4a16": "in these forms",
    },
)  # fmt: skip
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write the page to this file")
@options_from(Audit)
def audit_command(options: Audit, model: str, as_json: bool, html: Path | None) -> None:
    """Measure what an unlearned language MODEL recovers once its weights are quantized, beside the original and an
    oracle that was retrained without the forget set."""
    local(model)
    from cli.gates import audit as run

    check_page(html)
    report = run(model, options)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)
    if html is not None:
        folder = find_model(model)
        html.write_text(
            audited_page(report, folder.resolve().name, past_of(folder)), encoding="utf-8", errors="backslashreplace"
        )


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    models = list(next(iter(report["table"].values())))
    table = Table(title=f"{report['rows']['forget']:,} rows forgotten: nats a token, share extracted; nats retained")
    for heading in ("", *models, "recovery", "codes changed"):
        table.add_column(heading, justify="right" if heading else "left")
    for form, of_all in report["table"].items():
        cells = (
            f"{of['forget']['nats']:.3f} {of['forget']['extraction']:.2f}; {of['retain']['nats']:.3f}"
            for of in of_all.values()
        )
        flips = report["flips"].get(form)
        back = report["recovery"][form]["probability"]
        changed = "" if flips is None else f"{flips.get('same scales', flips['own scales']):.1%}"
        table.add_row(form, *cells, "" if back is None else f"{back:z.2f}", changed)
    console.print(table)
    if found := report.get("relearning"):
        table = Table(title="Trained on half of the forgotten rows: probability of a token of those; of the others")
        for heading in ("steps", *found):
            table.add_column(heading, justify="right")
        for i, step in enumerate(next(iter(found.values()))["steps"]):
            cells = (f"{of['trained on'][i]:.3f}; {of['asked for'][i]:.3f}" for of in found.values())
            table.add_row(str(step), *cells)
        console.print(table)
    click.echo(str(audited_verdict(report)))
