"""`parewell distill TEACHER OUT`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from calib import BadInput
from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.console import print_classification, print_distillation
from cli.from_dataclass import RecoveryOptions, all_presets, allowing_damage, choosing_preset, gating, options_from
from compressor import Distill
from compressor.distillation.loss_syntax import LOSS_NAMES
from compressor.distillation.options import DISTILL_PRESETS


@click.command(
    cls=GroupedCommand, short_help="Train a smaller or quantized student from a teacher.",
    epilog="Losses: " + ", ".join(LOSS_NAMES),
    examples={
        "parewell distill TEACHER OUT --layers 6 --data text.jsonl": "keep the six blocks that matter most, and train",
        "parewell distill MODEL OUT --student-scheme w4a16 --data text.jsonl": "quantization-aware distillation",
    },
)  # fmt: skip
@click.argument("source", metavar="TEACHER")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--resume/--no-resume", default=None, help="continue or discard an interrupted run beside OUT")
@click.option("--dry-run", is_flag=True, help="check everything, take two steps, and estimate time, memory and size")
@gating
@allowing_damage
@choosing_preset(DISTILL_PRESETS)
@options_from(Distill)
def distill_command(
    options: Distill, source: str, out: Path, as_json: bool, resume: bool | None, dry_run: bool,
    recovery: RecoveryOptions, allow_damage: bool,
) -> None:  # fmt: skip
    """Distil TEACHER, a folder or a hub name, into a smaller student in the folder OUT."""
    if options.factory is None:
        local(source)
    from calib.jobs.journal import gentle_interrupts
    from calib.runtime.distributed import is_main_process, process_group
    from cli.costs import print_distillation_cost
    from cli.gates import combine_gates, requested_gate
    from compressor import distill as run
    from compressor.distillation.cost import estimate_distillation
    from compressor.distillation.distill import must_last

    forgetful = must_last(source, options)
    gate = combine_gates(requested_gate(model, recovery, options.device) for model in forgetful)
    if recovery.train is not None and not forgetful:
        raise BadInput("train: is for rounded students of what was made to forget; leave it out, or is --data meant?")
    if dry_run:
        if resume is not None:
            raise click.UsageError("--dry-run measures a whole job from its start; leave out --resume and --no-resume")
        if options.shard:
            raise click.UsageError("--dry-run measures one process; leave out --shard")
        with redirect_stdout(sys.stderr):  # a factory is the user's own code, and may print
            cost = estimate_distillation(source, out, options, all_presets(Distill, DISTILL_PRESETS))
        click.echo(json.dumps(asdict(cost))) if as_json else print_distillation_cost(cost)
        return
    speak = gentle_interrupts(lambda note: click.echo(f"parewell: {note}", err=True))
    with process_group(options.device), speak, redirect_stdout(sys.stderr):
        report = run(
            source, out, options, resume=resume, gate=gate, allow_recovery=recovery.allow, allow_damage=allow_damage
        )
        if not is_main_process():
            return
    if options.data is None:
        click.echo("Trained on the embedded text; text like that of your own use is better (--data).", err=True)
    if as_json:
        click.echo(json.dumps(report))
    else:
        (print_classification if report["job"] == "classify" else print_distillation)(report)
        click.echo(f"{out}: checkpoint, README.md, parewell.json, report.html, report.json")
