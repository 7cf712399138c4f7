"""`parewell audit MODEL`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.options import options
from cli.together import audit as run
from unlearn.recovery import Audit


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@options(Audit)
def audit(how: Audit, model: str, as_json: bool) -> None:
    """What an unlearned language MODEL knows again once its weights are rounded, beside the model before and one that
    never saw what it forgot."""
    report = run(model, how)
    if as_json:
        click.echo(json.dumps(report))
        return
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
        table.add_row(form, *cells, "" if back is None else f"{back:.2f}", changed)
    console.print(table)
    if found := report.get("relearning"):
        table = Table(title="Trained on half of the forgotten rows: probability of a token of those; of the others")
        for heading in ("steps", *found):
            table.add_column(heading, justify="right")
        for i, step in enumerate(next(iter(found.values()))["steps"]):
            cells = (f"{of['trained on'][i]:.3f}; {of['asked for'][i]:.3f}" for of in found.values())
            table.add_row(str(step), *cells)
        console.print(table)
    click.echo(_verdict(report))


def _verdict(report: dict[str, Any]) -> str:
    back = {form: of["probability"] for form, of in report["recovery"].items() if of["probability"] is not None}
    if not back:
        return "The model before knew no more of these rows than one that never saw them: nothing can come back."
    worst = max(back, key=lambda form: back[form])
    here = f"{next(iter(back.values())):.0%} is left as the model is"
    fewer = f", and at most {back[worst]:.0%} ({worst}) in fewer bits" if len(back) > 1 else ""
    return f"Of what was known of the rows {here}{fewer}: 0% is a model that never saw them."
