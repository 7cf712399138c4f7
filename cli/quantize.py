"""`parewell quantize MODEL OUT`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from calib import BadInput
from calib.journal import gentle_interrupts
from calib.parallel import is_first, joined
from calib.scheme import PRESETS
from cli.options import options
from cli.tables import print_plan, print_quantization
from cli.together import gate
from compressor import Quantize
from compressor import quantize as run
from compressor.plan import plan


@click.command(
    epilog="\b\nSchemes, any of 2 to 8 bits:\n" + "\n".join(f"  {n:16} {what}" for n, what in PRESETS.items())
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--resume/--no-resume", default=None, help="continue or discard what an interrupted run left beside OUT")
@click.option("--dry-run", is_flag=True, help="check everything, measure the first blocks, say what it will cost")
@click.option(
    "--recovery-threshold",
    "threshold",
    default=0.1,
    show_default=True,
    help="of what MODEL was made to forget, the share that may come back; more fails the job",
)
@click.option("--allow-recovery", is_flag=True, help="let it come back; still measured where the rows are to be had")
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="what MODEL was trained on before it forgot, if no longer where its recipe says",
)
@options(Quantize)
def quantize(
    how: Quantize, model: str, out: Path, as_json: bool, resume: bool | None, dry_run: bool, threshold: float,
    allow_recovery: bool, train: Path | None,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a hub name, into the folder OUT."""
    try:
        held = gate(model, train=train, threshold=None if allow_recovery else threshold, device=how.device)
    except BadInput as error:
        if not allow_recovery:
            raise
        click.echo(f"parewell: not measured whether anything comes back: {error}", err=True)
        held = None
    if train is not None and held is None and not allow_recovery:
        raise BadInput(f"train: {model} was not made to forget anything; leave it out")
    if dry_run:
        if resume is not None:
            raise click.UsageError("--dry-run measures a whole job from its start; leave out --resume and --no-resume")
        cost = plan(model, out, how)
        if as_json:
            click.echo(json.dumps(asdict(cost) | {"seconds": cost.seconds}))
        else:
            print_plan(cost)
        return
    with joined(how.device), gentle_interrupts(lambda note: click.echo(f"parewell: {note}", err=True)):
        report = run(model, out, how, resume=resume, gate=held, allow_recovery=allow_recovery)
        if not is_first():
            return
    if how.data is None:
        click.echo("Calibrated on the embedded text; text like that of your own use is better (--data).", err=True)
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_quantization(report)
        click.echo(f"{out}: checkpoint, parewell.json, report.html, report.json")
