"""`parewell unlearn MODEL OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from calib.model.checkpoint import local
from cli.command import GroupedCommand, GroupedOption
from cli.console import print_unlearning
from cli.from_dataclass import all_presets, choosing_preset, options_from
from unlearn import Unlearn
from unlearn.options.estimators import ESTIMATORS
from unlearn.options.methods import METHODS
from unlearn.options.unlearning import UNLEARN_PRESETS, idle_options


def _of_other_methods(words: Sequence[str]) -> set[str]:
    """Options that the method, and the estimator, which a command line names do not read; none without a method."""
    named = {"method": "", "estimator": Unlearn.estimator}
    for name in named:
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == f"--{name}" or word.startswith(f"--{name}="):
                named[name] = following if word == f"--{name}" else word.partition("=")[2]
    method, estimator = named["method"], named["estimator"]
    if method not in METHODS or estimator not in ESTIMATORS:
        return set()
    return idle_options(method, estimator)


@click.command(
    cls=GroupedCommand, short_help="Make a model forget rows that it was trained on.", hidden=_of_other_methods,
    epilog="With --method NAME, --help shows the options of that method alone.",
    examples={
        "parewell unlearn MODEL OUT --train train.jsonl --forget-where user=42": "forget one user's rows",
        "parewell unlearn MODEL OUT --train train.jsonl --forget rows.jsonl --method npo": "with NPO",
    },
)  # fmt: skip
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option(
    "--dry-run", is_flag=True, help="check everything, and estimate time, memory and how many models are trained"
)
@click.option("--yes", is_flag=True, help="do not ask to confirm the rows to forget")
@click.option("--resume/--no-resume", default=None, help="continue or discard an interrupted run beside OUT")
@click.option(
    "--allow-damage",
    is_flag=True,
    cls=GroupedOption,
    group="proof",
    help="write OUT even if it is worse than --max-retain-loss allows",
)
@choosing_preset(UNLEARN_PRESETS)
@options_from(Unlearn)
def unlearn_command(
    options: Unlearn, model: str, out: Path, as_json: bool, dry_run: bool, yes: bool, resume: bool | None,
    allow_damage: bool,
) -> None:  # fmt: skip
    """Make MODEL, a folder or a hub name, forget rows that it was trained on, into the folder OUT."""
    if options.factory is None:
        local(model)
    from calib.jobs.journal import gentle_interrupts
    from calib.runtime.distributed import is_main_process, process_group
    from cli.costs import print_unlearning_cost
    from unlearn import unlearn as run
    from unlearn.cost import estimate_unlearning

    if dry_run:
        with redirect_stdout(sys.stderr):  # a factory is the user's own code, and may print
            cost = estimate_unlearning(model, out, options, all_presets(Unlearn, UNLEARN_PRESETS))
        click.echo(json.dumps(asdict(cost))) if as_json else print_unlearning_cost(cost)
        return

    def confirm(chosen: str) -> bool:
        click.echo(f"parewell: {chosen}", err=True)
        asked = sys.stdin.isatty() and not yes and not resume
        return not asked or click.confirm("Go on?", err=True)

    speak = gentle_interrupts(lambda note: click.echo(f"parewell: {note}", err=True))
    with process_group(options.device), speak, redirect_stdout(sys.stderr):
        report = run(model, out, options, resume=resume, confirm=confirm, allow_damage=allow_damage)
        if not is_main_process():
            return
    if not report["rows"]["forget"]:
        click.echo("parewell: nothing is to be forgotten; OUT is the model, byte for byte", err=True)
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_unlearning(report)
        click.echo(f"{out}: checkpoint, README.md, parewell.json, report.html, report.json")
