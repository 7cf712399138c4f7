"""Reports as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from calib.report import verdict


def print_quantization(report: Mapping[str, Any], console: Console | None = None) -> None:
    """QSUR and error of every layer, then the verdict."""
    console = console or Console(highlight=False)
    table = Table(title=f"{report['scheme']}: QSUR as a share of the ceiling, relative output error")
    table.add_column("layer", no_wrap=True)
    for heading in ("inputs", "→", "weights", "→", "error"):
        table.add_column(heading, justify="right")
    for layer in report["layers"]:
        qsur = [layer[when][what]["ratio"] for what in ("activations", "weights") for when in ("before", "after")]
        table.add_row(layer["name"], *(f"{q:.3f}" for q in qsur), f"{layer['output_error']:.1e}")
    console.print(table)
    console.print(verdict(report))
    if report["untied"]:
        console.print("Embedding and head were tied and are untied now: the head takes the final norm's gain.")
    console.print(f"Runs in: {', '.join(report['loaders']['loaders'])}.")
    for note in report["loaders"]["notes"]:
        console.print(f"Mind: {note}.")
