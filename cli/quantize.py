"""`parewell quantize MODEL OUT`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from calib.model.checkpoint import local
from calib.quant.scheme import PRESETS
from cli.command import GroupedCommand
from cli.console import print_quantization
from cli.from_dataclass import (
    RecoveryOptions,
    all_presets,
    allowing_damage,
    choosing_preset,
    choosing_recipe,
    gating,
    options_from,
)
from compressor import Quantize
from compressor.quantization.options import QUANTIZE_PRESETS, QUANTIZE_RECIPES


def _bits(context: click.Context, option: click.Parameter, bits: int | None) -> None:
    """Have `--bits 4` mean `--scheme w4a16`, as it does elsewhere."""
    if bits is None:
        return
    words = context.meta["parewell.words"]
    if any(word == "--scheme" or word.startswith("--scheme=") for word in words):
        raise click.UsageError("--bits is part of the scheme; leave out --bits or --scheme", context)
    context.default_map = {**(context.default_map or {}), "scheme": f"w{bits}a16"}


@click.command(
    cls=GroupedCommand, short_help="Store a model's weights in 2 to 8 bits.",
    epilog="\b\nSchemes, any of 2 to 8 bits:\n" + "\n".join(f"  {n:16} {what}" for n, what in PRESETS.items()),
    examples={
        "parewell quantize MODEL OUT --scheme w4a16-g64 --data calibration.jsonl": "4-bit weights, tuned",
        "parewell quantize MODEL OUT --scheme W4A16 --preset fast": "the same in minutes",
    },
)  # fmt: skip
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--resume/--no-resume", default=None, help="continue or discard an interrupted run beside OUT")
@click.option(
    "--dry-run", is_flag=True, help="check everything, measure the first blocks, and estimate time, memory and size"
)
@click.option("--bits", type=click.IntRange(2, 8), hidden=True, is_eager=True, expose_value=False, callback=_bits)
@gating
@allowing_damage
@choosing_preset(QUANTIZE_PRESETS)
@choosing_recipe(QUANTIZE_RECIPES)
@options_from(Quantize)
def quantize_command(
    options: Quantize, model: str, out: Path, as_json: bool, resume: bool | None, dry_run: bool,
    recovery: RecoveryOptions, allow_damage: bool,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a hub name, into the folder OUT.

    Rounds with GPTQ, then tunes codes and scales; --learn learns transforms before (OSTQuant). transformers and vLLM
    load OUT.
    """
    local(model)
    from calib.jobs.journal import gentle_interrupts
    from calib.runtime.distributed import is_main_process, process_group
    from cli.costs import print_quantization_cost
    from cli.gates import requested_gate
    from compressor import quantize as run
    from compressor.quantization.cost import estimate_quantization

    gate = requested_gate(model, recovery, options.device)
    if dry_run:
        if resume is not None:
            raise click.UsageError("--dry-run measures a whole job from its start; leave out --resume and --no-resume")
        cost = estimate_quantization(model, out, options, all_presets(Quantize, QUANTIZE_PRESETS))
        if as_json:
            click.echo(json.dumps(asdict(cost) | {"seconds": cost.seconds}))
        else:
            print_quantization_cost(cost)
        return
    with process_group(options.device), gentle_interrupts(lambda note: click.echo(f"parewell: {note}", err=True)):
        report = run(
            model, out, options, resume=resume, gate=gate, allow_recovery=recovery.allow, allow_damage=allow_damage
        )
        if not is_main_process():
            return
    if options.data is None:
        click.echo("Calibrated on the embedded text; text like that of your own use is better (--data).", err=True)
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_quantization(report)
        click.echo(f"{out}: checkpoint, README.md, parewell.json, report.html, report.json")
