"""`parewell export OUT DST`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cli.options import options
from compressor import Export
from compressor import export as run


@click.command()
@click.argument("out")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print what was written as JSON on stdout")
@options(Export)
def export(how: Export, out: str, dst: Path, as_json: bool) -> None:
    """Store OUT, a folder of parewell's or a float model, in another runtime's format in the folder DST."""
    report = run(out, dst, how)
    if as_json:
        click.echo(json.dumps(report))
        return
    size, loaders = report["bytes"], report["loaders"]
    click.echo(f"{dst}: {how.to}, {size['after'] / 1e6:,.1f} MB ({report['bits_per_weight']:.3g} bits per weight)")
    click.echo(f"Loads in: {', '.join(loaders['loaders'])}")
    for note in loaders["notes"]:
        click.echo(f"Note: {note}")
