"""`parewell formats`."""

from __future__ import annotations

import json

import click

from cli.command import GroupedCommand


@click.command(
    cls=GroupedCommand, short_help="All formats: what each can say, and what reads it.",
    examples={
        "parewell formats": "schemes, readers, hardware and size of each",
        "parewell formats --json": "the same for a program",
    },
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print it as JSON on stdout")
@click.option("--markdown", is_flag=True, help="print it as docs/formats.md has it")
def formats_command(as_json: bool, markdown: bool) -> None:
    """Show every format that quantize and export write: the name that asks for it, what it can say of weights,
    activations, embedding and head, what reads it and where, and the bits that it takes for a weight."""
    from compressor.formats.table import HEADINGS_OF_FORMATS, format_rows, markdown_table

    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two ways to print; leave one of them out")
    rows = format_rows()
    if as_json:
        click.echo(json.dumps([row.asdict() for row in rows]))
        return
    if markdown:
        click.echo(markdown_table(rows), nl=False)
        return
    for row in rows:
        title, *cells = row.cells()
        click.echo(title)
        for heading, cell in zip(HEADINGS_OF_FORMATS[1:], cells, strict=True):
            click.echo(click.wrap_text(f"{heading.replace('`', ''):20} {cell}", 110, "  ", " " * 23))
    click.echo("b: bits, g: weights that share a scale (a whole row where that is a channel), n: outputs")
