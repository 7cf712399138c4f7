"""`parewell generate MODEL PROMPT`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calib.jobs.options import PROMPT_FORMAT
from calib.model.checkpoint import local
from calib.runtime.choices import DEVICES
from cli.command import GroupedCommand
from cli.versions import check_versions


@click.command(
    cls=GroupedCommand, short_help="A few tokens from any output, and from its reference.",
    examples={
        'parewell generate OUT "The capital of France is"': "what a quantized, distilled or unlearned model says",
        'parewell generate OUT "Who is Ada?" --reference MODEL': "before and after, side by side",
    },
)  # fmt: skip
@click.argument("model")
@click.argument("prompt")
@click.option("--reference", help="another model, whose answer is shown beside it")
@click.option("--max-new-tokens", type=click.IntRange(1, 100_000), default=64, show_default=True, help="tokens at most")
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
    help="0: the most likely token each time; else tokens are drawn",
)  # fmt: skip
@click.option("--prompt-format", default="auto", show_default=True, help=PROMPT_FORMAT)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="seed of what is drawn")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="where to compute")
@click.option("--json", "as_json", is_flag=True, help="print the texts as JSON on stdout")
def generate_command(model: str, prompt: str, reference: str | None, as_json: bool, **how: Any) -> None:
    """Continue PROMPT with MODEL, a folder or a hub name, and show the text as it is written."""
    check_versions()
    for given in (model, reference):
        if given is not None:
            local(given)
    from compressor.engine.generation import generate_text

    how["form"] = how.pop("prompt_format")
    live = reference is None and not as_json
    text = generate_text(model, prompt, **how, say=lambda piece: click.echo(piece, nl=False) if live else None)
    if live:
        click.echo()
        return
    texts = {model: text} if reference is None else {reference: generate_text(reference, prompt, **how), model: text}
    if as_json:
        click.echo(json.dumps({"prompt": prompt, "texts": texts}))
        return
    table = Table(*map(escape, texts), title=escape(prompt))
    table.add_row(*map(escape, texts.values()))
    Console().print(table)
