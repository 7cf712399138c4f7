"""`parewell models`."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from cli.command import GroupedCommand


@click.command(
    cls=GroupedCommand, short_help="What can be done with a model, without reading its weights.",
    examples={
        "parewell models MODEL": "blocks, weights that are quantized, transforms that are left out and why",
        "parewell models MODEL --json": "the same for a program",
    },
)  # fmt: skip
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print it as JSON on stdout")
def models_command(model: str, as_json: bool) -> None:
    """Show what can be done with MODEL, a directory or a name on the hub, from its config and the names of its tensors:
    how it is run block by block, which share of its weights is quantized and what stays in 16 bits, which transforms it
    admits and why not."""
    from compressor.engine.support import support_of
    from compressor.transforms.proof import left_out, parts_of

    found = support_of(model, lambda stream: left_out(parts_of(stream)))
    if as_json:
        click.echo(json.dumps(found.asdict()))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("type", found.model_type)
    kinds = f"{found.kinds} kind{'s' * (found.kinds > 1)}"
    table.add_row("blocks", f"{found.blocks}, of {kinds}, run as the library runs them")
    table.add_row("width", f"{found.width:,}")
    table.add_row("embedding and head", "one table" if found.tied else "two tables")
    table.add_row("quantized", f"{found.quantized:,} linears, {found.quantized_share:.1%} of the blocks' weights")
    for name, share in found.kept.items():
        table.add_row("stays in 16 bits", f"{name}, {share:.2%}")
    table.add_row("keys and values", "can be rounded" if found.keys_and_values else "stay as they are")
    told = "no: blocks are told of more than hidden states"
    table.add_row("learning, attribution", "yes" if found.gradients else told)
    for name, reason in found.left_out.items():
        table.add_row(f"without {name.replace('_', ' ')}", reason)
    Console(soft_wrap=True).print(table)
