"""`parewell audit MODEL`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cli.options import options
from compressor.rounded import check_form, rounded
from unlearn.recovery import Audit, audited


def _rounded(form: str, weight: Tensor, scales_of: Tensor | None) -> tuple[Tensor, Tensor]:
    found = rounded(weight, form, scales_of)
    return found.codes, found.values


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@options(Audit)
def audit(how: Audit, model: str, as_json: bool) -> None:
    """What an unlearned language MODEL knows again once its weights are rounded, beside the model before and one that
    never saw what it forgot."""
    report = audited(model, how, _rounded, check_form)
    if as_json:
        click.echo(json.dumps(report))
        return
    table = Table(title=f"{report['rows']['forget']:,} rows forgotten: nats a token, share extracted; nats retained")
    for heading in ("", *report["table"]["float"], "recovery", "codes changed"):
        table.add_column(heading, justify="right" if heading else "left")
    for form, models in report["table"].items():
        cells = (
            f"{of['forget']['nats']:.3f} {of['forget']['extraction']:.2f}; {of['retain']['nats']:.3f}"
            for of in models.values()
        )
        flips = report["flips"].get(form)
        back = report["recovery"][form]["probability"]
        changed = "" if flips is None else f"{flips['same scales']:.1%}"
        table.add_row(form, *cells, "" if back is None else f"{back:.2f}", changed)
    Console().print(table)
    click.echo(_verdict(report))


def _verdict(report: dict[str, Any]) -> str:
    back = {form: of["probability"] for form, of in report["recovery"].items() if of["probability"] is not None}
    if not back:
        return "The model before knew no more of these rows than one that never saw them: nothing can come back."
    worst = max(back, key=lambda form: back[form])
    return (
        f"Of what was known of the rows {back['float']:.0%} is left as the model is, and at most {back[worst]:.0%} "
        f"({worst}) in fewer bits: 0% is a model that never saw them."
    )
