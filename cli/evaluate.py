"""`parewell evaluate MODEL`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import compressor
from calib import BadInput, Failed
from calib.model.checkpoint import local
from cli.command import GroupedCommand
from cli.from_dataclass import options_from
from compressor import Evaluate, EvaluateTasks


@click.command(
    cls=GroupedCommand, short_help="Perplexity, agreement with a reference, tasks.",
    examples={
        "parewell evaluate OUT --reference MODEL --data text.jsonl": "and KL from the model that it was made from",
        "parewell evaluate OUT --reference MODEL --tasks arc_easy,hellaswag": "what both score in tasks",
    },
)  # fmt: skip
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@options_from(Evaluate, EvaluateTasks)
def evaluate_command(options: Evaluate, by_tasks: EvaluateTasks, model: str, as_json: bool) -> None:
    """Perplexity and bits per byte of MODEL, and how far it is from a reference.

    With --tasks, what MODEL and the reference score in tasks of lm-evaluation-harness; with --data as well, both.
    """
    local(model)
    found = dict[str, Any]()
    if by_tasks.tasks is None or options.data is not None:
        found = compressor.evaluate(model, options).asdict()
        if any(isinstance(value, float) and not math.isfinite(value) for value in found.values()):
            raise Failed(f"{model}: its answers are no numbers; the weights are broken, or overflow")
    else:
        _check_idle(options)
    scored = compressor.evaluate_tasks(model, by_tasks) if by_tasks.tasks is not None else {}
    if as_json:
        click.echo(json.dumps(found | scored))
        return
    if found:
        _print_text(found, model, options)
    if scored:
        _print_tasks(scored, model, by_tasks)


def _check_idle(options: Evaluate) -> None:
    """Raises BadInput where an option is about text, and none is measured."""
    for f in fields(options):
        of_text = f.metadata["group"] == "data" or f.name == "information_plane"
        if of_text and getattr(options, f.name) != f.default:
            raise BadInput(f"{f.name.replace('_', '-')}: is about text, and tasks have their own; add --data FILE")


_SPELLED = {"tell_apart": "tell-apart rate (0.5: alike)", "tokens_to_tell": "tokens until told apart (95% sure)"}


def _print_text(found: Mapping[str, Any], model: str, options: Evaluate) -> None:
    table = Table(title=escape(f"{model} on {options.data or 'the embedded held-out text'}"))
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if value is not None and name != "information":
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(_SPELLED.get(name, name.replace("_", " ")), f"{value:,}" if isinstance(value, int) else shown)
    Console().print(table)
    if (planes := found.get("information")) is not None:
        Console().print(_information_table(planes))


def _information_table(planes: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """By block what the state tells of the token read and of the next one, the reference's figures first."""
    order = [name for name in ("reference", "model") if name in planes]
    table = Table(title="Nats (CS-QMI) that the state after a block has of the token read and of the next one")
    for heading in ("block", *(f"{which}, {name}" for name in order for which in ("read", "next"))):
        table.add_column(heading, justify="right")
    columns = [planes[name][which] for name in order for which in ("read", "next")]
    for i in range(max(map(len, columns))):
        table.add_row(str(i), *(f"{of[i]:.4f}" if i < len(of) else "" for of in columns))
    return table


def _print_tasks(scored: Mapping[str, Any], model: str, options: EvaluateTasks) -> None:
    """Figures with their standard errors, after those of the reference."""
    table = Table(title=escape(f"{model}, tasks of lm-evaluation-harness {scored['lm_eval']}"))
    names = [] if options.reference is None else [options.reference]
    for heading in ("task", "metric", "documents", *names, model):
        table.add_column(escape(heading), justify="left" if heading in ("task", "metric") else "right")
    for task, metrics in scored["tasks"].items():
        for metric, of in metrics.items():
            cells = [_with_error(of, "reference_", "reference")] if names else []
            documents = scored["documents"].get(task)
            shown = "" if documents is None else f"{documents:,}"
            table.add_row(escape(task), escape(metric), shown, *cells, _with_error(of, "", "value"))
    Console().print(table)


def _with_error(of: Mapping[str, float], prefix: str, name: str) -> str:
    error = of.get(f"{prefix}stderr")
    return f"{of[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
