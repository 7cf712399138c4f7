"""Reports as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.compare import Comparison
from compressor.report.common import cut_rows, notes, tell_apart_rows
from compressor.report.distillation import answer_rows, skills_of
from compressor.report.quantization import (
    cheapest_bits_phrase,
    law_phrase,
    limit_phrase,
    profile_phrase,
    published_qsur_phrase,
    sample_size_phrase,
    table_phrases,
    text_shift_phrase,
    unreached,
    unreached_phrase,
)
from compressor.report.soup import soup_rows, soup_verdict
from compressor.report.verdict import classified_verdict, distilled_verdict, exported_verdict, quantized_verdict
from unlearn.report.unlearning import MEASURES
from unlearn.report.verdict import unlearned_verdict


def print_quantization(report: Mapping[str, Any], console: Console | None = None) -> None:
    """QSUR and error of every layer, then the verdict."""
    console = console or Console(highlight=False, markup=False)
    table = Table(title=f"{report['scheme']}: QSUR as a share of the ceiling, relative output error")
    table.add_column("layer", no_wrap=True)
    for heading in ("inputs", "→", "weights", "→", "error"):
        table.add_column(heading, justify="right")
    for layer in report["layers"]:
        qsur = [layer[when][what]["ratio"] for what in ("activations", "weights") for when in ("before", "after")]
        error = layer["output_error"]
        shares = ("–" if q is None else f"{q:.3f}" for q in qsur)
        table.add_row(layer["name"], *shares, "–" if error is None else f"{error:.1e}")
    console.print(table)
    if published := published_qsur_phrase(report):
        console.print(published)
    console.print(str(quantized_verdict(report)))
    for note in notes(report):
        console.print(note)
    if "tell_apart" in report:
        console.print(cheapest_bits_phrase(report["tell_apart"]))
    if (precision := report.get("precision")) is not None:
        console.print(profile_phrase(precision))
        if precision["law"] is not None:
            console.print(law_phrase(precision["law"]))
    if limit := limit_phrase(report):
        console.print(limit)
    if "like" in report:
        console.print(text_shift_phrase(report["like"]))
    if "samples" in report:
        console.print(sample_size_phrase(report["samples"]))
    if unreached(report):
        console.print(unreached_phrase(report))
    for phrase in table_phrases(report):
        console.print(phrase)
    for transform, reason in report.get("left_out", {}).items():
        console.print(f"Left out: {transform.replace('_', ' ')}, as {reason}.")
    if "export" in report:
        console.print(f"{report['export']['to']}: {exported_verdict(report['export'])}")
    _print_loaders(report["loaders"], console)


def print_distillation(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Figures before and after, then the verdict."""
    console = console or Console(highlight=False, markup=False)
    stages = report["quality_by_stage"]
    before, after = stages["before"], stages["after"]
    table = Table(title=f"{report['student']}, on {after['tokens']:,} held-out tokens")
    for heading in ("", "teacher", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "perplexity", *(f"{v:.3f}" for v in (after["reference_perplexity"], before["perplexity"], after["perplexity"]))
    )
    table.add_row("KL from the teacher", "0", f"{before['kl']:.4f}", f"{after['kl']:.4f}")
    table.add_row("same top token", "100%", *(f"{stage['top1_agreement']:.1%}" for stage in (before, after)))
    for text, *values in answer_rows(report):
        table.add_row(text, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    for row in tell_apart_rows(before, after):
        table.add_row(*row)
    console.print(table)
    for note in notes(report):
        console.print(note)
    console.print(str(distilled_verdict(report)))
    for note in report.get("loaders", {}).get("notes", []):
        console.print(f"Note: {note}.")


def print_soup(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Perplexity of the models and of their mean, then the verdict."""
    console = console or Console(highlight=False, markup=False)
    table = Table(title=f"on {report['quality']['tokens']:,} held-out tokens")
    for heading in ("", "share", "perplexity"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, share, perplexity in soup_rows(report):
        table.add_row(name, share, f"{perplexity:.3f}")
    console.print(table)
    for note in notes(report):
        console.print(note)
    console.print(str(soup_verdict(report)))


def print_classification(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Figures of teacher and student, then the verdict."""
    console = console or Console(highlight=False, markup=False)
    stages = report["quality_by_stage"]
    table = Table(title=f"{report['student']}, on {stages['after']['rows']:,} held-out rows")
    for heading in ("", *stages):
        table.add_column(heading, justify="right" if heading else "left")
    for name, text in skills_of(stages["after"]).items():
        table.add_row(text, *(f"{stage[name]:.4f}" for stage in stages.values()))
    console.print(table)
    console.print(str(classified_verdict(report)))
    for note in cut_rows(report):
        console.print(note)


def print_unlearning(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Figures before and after, distances from oracles, then the verdict."""
    console = console or Console(highlight=False, markup=False)
    stages = dict(report["quality_by_stage"])
    asked = report.get("asked", {})
    if "oracle" in asked:
        stages["oracle"] = asked["oracle"]
    table = Table(title=f"{report['method']}, {report['rows']['forget']:,} rows")
    for heading in ("", *stages):
        table.add_column(heading, justify="right" if heading else "left")
    for group, found in stages["after"].items():
        for measure in found:
            values = (stage.get(group, {}).get(measure) for stage in stages.values())
            table.add_row(f"{group}: {MEASURES[measure]}", *("" if v is None else f"{v:.4f}" for v in values))
    console.print(table)
    if quality := asked.get("forget_quality"):
        console.print("Forget quality (p): " + ", ".join(f"{k} {v:.3g}" for k, v in quality.items()))
    if leak := asked.get("privacy_leak"):
        console.print("Privacy leak (%, 0: none): " + ", ".join(f"{k} {v:.3g}" for k, v in leak.items()))
    for name, of in asked.get("tell_apart", {}).items():
        console.print(f"Tell-apart rate from the oracle, {name}: " + ", ".join(f"{k} {v:.1%}" for k, v in of.items()))
    for name, of in (("utility", "utility"), ("facts", "reversed"), ("alternatives", "preferred")):
        if values := asked.get(name):
            console.print(f"{name.capitalize()} ({of}): " + ", ".join(f"{k} {v[of]:.3g}" for k, v in values.items()))
    if found := report.get("audit"):
        table = Table(title=f"KLoM, 95th percentile (mean), {found['models']} models a side, {found['estimator']}")
        groups = list(next(iter(found["table"].values())))
        for heading in ("", *groups, "attack"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, of in found["table"].items():
            cells = (f"{of[g]['p95']:.2f} ({of[g]['mean']:.2f})" for g in groups)
            table.add_row(name, *cells, "" if of["forget"]["attack"] is None else f"{of['forget']['attack']:.2f}")
        console.print(table)
    for note in [*([report["chosen"]] if "chosen" in report else []), *report.get("notes", [])]:
        console.print(f"Note: {note}.")
    console.print(str(unlearned_verdict(report)))


def print_export(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The verdict, and what loads it."""
    console = console or Console(highlight=False, markup=False)
    console.print(f"{report['to']}: {exported_verdict(report)}")
    if (first := report.get("source", {})).get("job") == "quantize":
        console.print(f"Made from {first['scheme']}: {quantized_verdict(first)}")
    for note in notes(report):
        console.print(note)
    _print_loaders(report["loaders"], console)


def _print_loaders(served: Mapping[str, Any], console: Console) -> None:
    console.print(f"Runs in: {', '.join(served['loaders'])}.")
    for note in served["notes"]:
        console.print(f"Note: {note}.")


def print_comparison(comparison: Comparison) -> None:
    """Figures of two outputs and how they differ, then layers."""
    console = Console(highlight=False, markup=False)
    for rows in (comparison.figure_rows(), comparison.layer_rows()):
        table = Table()
        for i, heading in enumerate(rows[0]):
            table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        if rows[1:]:
            console.print(table)
    for note in comparison.notes:
        console.print(note)
