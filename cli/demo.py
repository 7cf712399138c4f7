"""`parewell demo`: the embedded model and text, float against round-to-nearest against learned."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import compressor
from calib import embedded
from cli.command import GroupedCommand
from cli.console import print_quantization
from cli.versions import check_versions
from compressor import Quantize


@click.command(
    cls=GroupedCommand, short_help="Quantize the embedded model three ways.",
    examples={
        "parewell demo": "into parewell-demo, about three minutes",
        "parewell demo OUT --scheme w4a16-channel": "in another scheme",
    },
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path), default=Path("parewell-demo"))
@click.option("--scheme", default="w3a16-channel", show_default=True, help="what gets how many bits")
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON on stdout")
def demo_command(out: Path, scheme: str, as_json: bool) -> None:
    """Quantize the embedded model three ways and keep the learned one in OUT (default: parewell-demo)."""
    check_versions()
    learned = Quantize(scheme=scheme, samples=64, length=256, held_out=32, steps=60, tune_steps=40)
    fixed = learned.without_learning()
    plain = replace(fixed, init="none", rounding="rtn")
    figures = dict[str, Any]()
    table = Table(title=f"the embedded model at {scheme}, on text it was not trained or calibrated on")
    for heading in ("", "perplexity", "KL to float", "same top token"):
        table.add_column(heading, justify="right" if heading else "left")
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in (
            ("round to nearest", plain),
            ("random Hadamard, GPTQ", fixed),
            ("learned, GPTQ", learned),
        ):
            destination = out if options is learned else Path(scratch) / "out"
            report = compressor.quantize(
                embedded.MODEL, destination, options, resume=False, allow_damage=options is not learned
            )
            if options is plain:
                figures["float"] = {"perplexity": report["quality"]["reference_perplexity"]}
                table.add_row("float", f"{report['quality']['reference_perplexity']:.3f}", "0", "100%")
            for stage, q in report["quality_by_stage"].items():
                if stage == "nearest":  # which has a row of its own
                    continue
                row = name if stage == "rounded" else f"{name}, {stage}"
                figures[row] = q
                table.add_row(row, f"{q['perplexity']:.3f}", f"{q['kl']:.4f}", f"{q['top1_agreement']:.1%}")
    if as_json:
        click.echo(json.dumps(figures))
        return
    print_quantization(report)
    Console().print(table)
    click.echo(f"The checkpoint and its report: {out}, {out / 'report.html'}")
