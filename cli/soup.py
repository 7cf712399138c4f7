"""`parewell soup A B OUT`."""

from __future__ import annotations

import json
from pathlib import Path

import click

import compressor
from calib import BadInput
from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.console import print_soup
from cli.from_dataclass import RecoveryOptions, allowing_damage, gating, options_from
from compressor import Soup


@click.command(
    cls=GroupedCommand, short_help="The mean of models that one model was trained into.",
    examples={
        "parewell soup A B OUT": "half of each, and the loss on the way from A to B",
        "parewell soup A B C OUT --weights 0.5,0.3,0.2": "a mean of three",
    },
)  # fmt: skip
@click.argument("models", metavar="A B...", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@gating
@allowing_damage
@options_from(Soup)
def soup_command(
    options: Soup, models: tuple[str, ...], out: Path, as_json: bool, recovery: RecoveryOptions, allow_damage: bool
) -> None:  # fmt: skip
    """Average the weights of models A, B and more, outputs of one ancestor, into the folder OUT."""
    for model in models:
        local(model)
    from calib.jobs.recipe import forgettings
    from calib.model.checkpoint import find_model
    from cli.gates import combine_gates, requested_gate

    forgetful = [model for model in models if forgettings(find_model(model))]
    if recovery.train is not None and not forgetful:
        raise BadInput("train: is for models that were made to forget; leave it out, or is --data meant?")
    gate = combine_gates(requested_gate(model, recovery, options.device) for model in forgetful)
    report = compressor.soup(models, out, options, gate=gate, allow_recovery=recovery.allow, allow_damage=allow_damage)
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_soup(report)
        click.echo(f"{out}: checkpoint, README.md, parewell.json, report.html, report.json")
