"""What dry runs say, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
from rich.console import Console
from rich.table import Table

from calib.jobs.cost import HOUR, PresetCost, Saving
from calib.report.html import format_number
from compressor.distillation.cost import DistillationCost
from compressor.quantization.cost import QuantizationCost
from compressor.report.quantization import sizes_phrase
from unlearn.cost import UnlearningCost


def print_unlearning_cost(cost: UnlearningCost) -> None:
    """Print the estimated cost of an unlearning."""
    click.echo(
        f"{cost.trainings:,} models to train, {cost.tokens:,} tokens or rows in all, about {_time(cost.seconds)}, "
        f"peak memory {cost.peak_bytes / 1e6:,.0f} MB (the whole process)"
    )
    _print_size(cost)
    _print_time(cost)


def print_distillation_cost(cost: DistillationCost) -> None:
    """Print the estimated cost of a distillation."""
    click.echo(
        f"about {_time(cost.seconds)}, of which {_time(cost.step_seconds)} for each step, peak memory "
        f"{cost.peak_bytes / 1e6:,.0f} MB (the whole process)"
    )
    _print_size(cost)
    _print_time(cost)


def print_quantization_cost(plan: QuantizationCost) -> None:
    """Print the estimated cost of a quantization, by stage."""
    console = Console(highlight=False, markup=False)
    table = Table(title="what the job will cost, from its first blocks")
    table.add_column("stage", no_wrap=True)
    for heading in ("time", "weights read", "tokens"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        table.add_row(stage.name, _time(stage.seconds), f"{stage.bytes_read / 1e6:,.0f} MB", f"{stage.tokens:,}")
    console.print(table)
    console.print(
        f"In all {_time(plan.seconds)}, peak memory {plan.peak_bytes / 1e6:,.0f} MB (the whole process), "
        f"disk {plan.disk_bytes / 1e6:,.0f} MB beside OUT while it is made."
    )
    _print_size(plan, plan.out_parts)
    if plan.out_parts:
        console.print(sizes_phrase(plan.out_parts, plan.choices))
    if plan.least_bytes is not None:
        console.print(
            f"That is in the most bits to choose from; in the fewest, its weights are "
            f"{format_number(plan.least_bytes / 1e6)} MB. How many it takes is measured, by as many tries as are "
            "counted above or a few more."
        )
    if plan.untied_bytes:
        console.print(
            f"Of these, {format_number(plan.untied_bytes / 1e6)} MB are a second table, as embedding and head are tied "
            "and will not be: --tied keep keeps one and leaves out the rotation of the residual stream."
        )
    if plan.rotation_left_out:
        console.print(f"Left out: residual rotation, as {plan.rotation_left_out}.")
    _print_time(plan)


def _print_size(
    cost: UnlearningCost | DistillationCost | QuantizationCost, parts: Mapping[str, int] | None = None
) -> None:
    """What OUT will weigh."""
    of = ", ".join(f"{name} {format_number(size / 1e6)}" for name, size in (parts or {}).items() if size)
    click.echo(
        f"OUT will weigh about {format_number(cost.folder_bytes / 1e6)} MB, "
        f"{format_number(cost.out_bytes / 1e6)} MB of them weights{f' ({of})' if of else ''}."
    )


def _print_time(cost: UnlearningCost | DistillationCost | QuantizationCost) -> None:
    """Where the time goes, and how it gets less."""
    seconds = {stage.name: stage.seconds for stage in cost.stages}
    if cost.costliest:
        click.echo(f"Most time: {', '.join(f'{name} ({_time(seconds[name])})' for name in cost.costliest)}.")
    for text in _shorter(cost.savings):
        click.echo(text)

    _print_presets(cost.presets)


def _print_presets(presets: Mapping[str, PresetCost]) -> None:
    """What the job would take by each."""
    if not presets:
        return
    table = Table(title="by --preset")
    for heading in ("preset", "time", "peak memory", "OUT"):
        table.add_column(heading, justify="left" if heading == "preset" else "right", no_wrap=True)
    for name, of in presets.items():
        table.add_row(
            name, _time(of.seconds), f"{of.peak_bytes / 1e6:,.0f} MB", f"{format_number(of.folder_bytes / 1e6)} MB"
        )
    Console(highlight=False, markup=False).print(table)


def _shorter(savings: Sequence[Saving]) -> list[str]:
    """Of a job of more than an hour."""
    if not savings:
        return []
    none = "" if any(saving.seconds <= HOUR for saving in savings) else ", though none of it under an hour"
    head = f"More than an hour; it would take{none}:"
    return [head, *(f"  {_time(saving.seconds):>9} with {saving.options}" for saving in savings)]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
