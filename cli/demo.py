"""`parewell demo`: the embedded model and text, float against round-to-nearest, against GPTQ, against tuned."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import compressor
from calib import embedded
from cli.command import GroupedCommand
from cli.console import print_quantization
from cli.versions import check_versions
from compressor import Quantize

_ROWS = {"nearest": "round to nearest", "rounded": "GPTQ", "tuned": "GPTQ, tuned"}  # by stage of one job


@click.command(
    cls=GroupedCommand, short_help="Quantize the embedded model three ways.",
    examples={
        "parewell demo": "into parewell-demo, about a minute",
        "parewell demo OUT --scheme w4a16-channel": "in another scheme",
    },
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path), default=Path("parewell-demo"))
@click.option("--scheme", default="w3a16-channel", show_default=True, help="what gets how many bits")
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON on stdout")
def demo_command(out: Path, scheme: str, as_json: bool) -> None:
    """Quantize the embedded model into OUT (default: parewell-demo), and say what each stage of that wins."""
    check_versions()
    options = Quantize(scheme=scheme, samples=64, length=256, held_out=32)
    report = compressor.quantize(embedded.MODEL, out, options, resume=False)
    stages = report["quality_by_stage"]
    figures = {"float": {"perplexity": report["quality"]["reference_perplexity"]}}
    figures |= {row: stages[stage] for stage, row in _ROWS.items() if stage in stages}
    if as_json:
        click.echo(json.dumps(figures))
        return
    table = Table(title=f"the embedded model at {scheme}, on text it was not trained or calibrated on")
    for heading in ("", "perplexity", "KL to float", "same top token"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("float", f"{figures['float']['perplexity']:.3f}", "0", "100%")
    for row in list(figures)[1:]:
        q = figures[row]
        table.add_row(row, f"{q['perplexity']:.3f}", f"{q['kl']:.4f}", f"{q['top1_agreement']:.1%}")
    print_quantization(report)
    Console().print(table)
    click.echo(f"The checkpoint and its report: {out}, {out / 'report.html'}")
