"""`parewell report OUT`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from calib import BadInput
from calib.checkpoint import read_json
from calib.report import page
from cli.tables import print_quantization


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write the page to this file as well")
def report(out: Path, as_json: bool, html: Path | None) -> None:
    """The report that lies in OUT, on the terminal."""
    content = read_json(out / "report.json")
    if not {"scheme", "quality", "layers", "loaders"} <= content.keys():
        raise BadInput(f"{out / 'report.json'}: is no report of parewell's")
    if html:
        html.write_text(page(content), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(content))
    else:
        print_quantization(content)
