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
from unlearn.report.facts import facts_page, facts_verdict, recall_table
from unlearn.report.recovery import audited_page
from unlearn.report.verdict import audited_verdict


@click.command(
    cls=GroupedCommand, short_help="Forgotten knowledge that quantization recovers.",
    examples={
        "parewell audit OUT --original MODEL --oracle RETRAINED": "of the rows that OUT's recipe names",
        "parewell audit OUT --original MODEL --facts facts.jsonl": "of facts, in both directions",
    },
)  # fmt: skip
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write the page to this file")
@options_from(Audit)
def audit_command(options: Audit, model: str, as_json: bool, html: Path | None) -> None:
    """Measure what an unlearned language MODEL recovers once its weights are quantized, beside the original and an
    oracle that was retrained without the forget set; or, with --facts, what a language model knows of facts in both
    directions."""
    local(model)
    from cli.gates import audit as run

    check_page(html)
    report = run(model, options)
    if as_json:
        click.echo(json.dumps(report))
    elif options.facts is not None:
        _print_facts(report)
    else:
        _print(report)
    if html is not None:
        folder, page = find_model(model), audited_page if options.facts is None else facts_page
        html.write_text(
            page(report, folder.resolve().name, past_of(folder)), encoding="utf-8", errors="backslashreplace"
        )


def _print_facts(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    head, rows = recall_table(report)
    table = Table(title=f"{report['rows']['facts']:,} facts in both directions, {report['task']}")
    for heading in head:
        table.add_column(heading, justify="right" if heading else "left")
    for text, *values in rows:
        table.add_row(text, *(f"{value:.3f}" for value in values))
    console.print(table)
    for kind, parts in (("mrr", ("forward", "reversed")), ("entanglement", ("forward", "reversed", "within"))):
        for name, of in report["models"].items():
            for part in parts:
                curve = " ".join("-" if value is None else f"{value:.2f}" for value in of[kind][part])
                console.print(f"{kind}, {part}, by block, {name}: {curve}")
    click.echo(str(facts_verdict(report)))


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
