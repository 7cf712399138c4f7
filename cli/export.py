"""`parewell export OUT DST`."""

from __future__ import annotations

import json
from pathlib import Path

import click

import compressor
from calib import BadInput
from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.console import print_export
from cli.from_dataclass import THRESHOLD, RecoveryOptions, allowing_damage, gating, options_from
from compressor import Export


@click.command(
    cls=GroupedCommand, short_help="Write an output for another runtime.",
    examples={
        "parewell export OUT DST --to gguf": "for llama.cpp: q4_k and its other block types as they are",
        "parewell export OUT DST --to onnx": "for onnxruntime",
    },
)  # fmt: skip
@click.argument("out")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print what was written as JSON on stdout")
@gating
@allowing_damage
@options_from(Export)
def export_command(
    options: Export, out: str, dst: Path, as_json: bool, recovery: RecoveryOptions, allow_damage: bool
) -> None:  # fmt: skip
    """Store OUT, a folder of parewell's or a float model, in another runtime's format in the folder DST."""
    local(out)
    gate = None
    if options.entry.rounds:  # other formats keep what OUT is
        from cli.gates import requested_gate

        gate = requested_gate(out, recovery)
    elif recovery != RecoveryOptions(None, False, THRESHOLD):
        raise BadInput(
            f"to {options.to}: rounds nothing, so nothing can be recovered; leave out --train, --allow-recovery and "
            "--recovery-threshold"
        )
    report = compressor.export(out, dst, options, gate=gate, allow_recovery=recovery.allow, allow_damage=allow_damage)
    if as_json:
        click.echo(json.dumps(report))
        return
    print_export(report)
