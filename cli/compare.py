"""Two outputs side by side: what both reports have, and how it differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.report.charts import Axis, Line, chart_by_block, charts_by_kind
from calib.report.html import Report, Verdict, as_csv, as_json, format_cell, format_change, render_page

SIZE = "megabytes of weights"
_MEASURED_ON = ("held_out", "forget", "validation")


@dataclass(frozen=True)
class Comparison:
    """Figures and errors of layers that two outputs share, each (of the first, of the second), by name."""

    names: tuple[str, str]
    reports: tuple[Report, Report]
    figures: Mapping[str, tuple[float, float]]
    layers: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...]

    def figure_rows(self) -> list[tuple[str, ...]]:
        """A head, then a row for each."""
        head = ("", *self.names, "difference", "in percent")
        pairs = self.figures.items()
        return [
            head,
            *((name, format_cell(a), format_cell(b), _signed(b - a), format_change(a, b)) for name, (a, b) in pairs),
        ]

    def layer_rows(self) -> list[tuple[str, ...]]:
        """A head, then the relative output errors of each linear."""
        head = ("linear", *(f"error, {name}" for name in self.names), "in percent")
        return [
            head,
            *((name, format_cell(a), format_cell(b), format_change(a, b)) for name, (a, b) in self.layers.items()),
        ]

    def verdict(self) -> str:
        """The first figure, the size, and how many layers are of both."""
        sentences = dict.fromkeys([*list(self.figures)[:1], *(name for name in self.figures if name == SIZE)])
        sentence = [
            f"{name}: {format_cell(self.figures[name][0])} and {format_cell(self.figures[name][1])}"
            for name in sentences
        ]
        return "; ".join([*sentence, *([f"{len(self.layers)} linears are in both"] if self.layers else [])]) + "."

    def asdict(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        return {
            "names": list(self.names), "figures": {name: list(pair) for name, pair in self.figures.items()},
            "layers": {name: list(pair) for name, pair in self.layers.items()}, "notes": list(self.notes),
            "reports": list(self.reports),
        }  # fmt: skip


def compare_reports(
    names: tuple[str, str], reports: tuple[Report, Report], figures: tuple[Mapping[str, float], Mapping[str, float]]
) -> Comparison:
    """Compare what two reports share; their figures are given by name."""
    errors = [
        {layer["name"]: error for layer in report.get("layers", []) if (error := layer["output_error"]) is not None}
        for report in reports
    ]
    shared = _shared(*figures)
    notes = _other_rows(*(r.get("data", {}) for r in reports)) if shared.keys() - {SIZE, "parameters"} else []
    return Comparison(names, reports, shared, _shared(*errors), tuple(notes))


def comparison_page(comparison: Comparison) -> str:
    """The comparison as an HTML page."""
    a, b = comparison.names
    kinds = sorted({str(report["job"]) for report in comparison.reports})
    files = {"comparison.json": as_json(comparison.asdict())}
    if comparison.layers:
        rows = [(name, *pair) for name, pair in comparison.layers.items()]
        files["linears.csv"] = as_csv(("linear", a, b), rows)
    lines = (Line("first", a), Line("second", b))
    errors = {line: [(name, pair[i]) for name, pair in comparison.layers.items()] for i, line in enumerate(lines)}
    error = Axis("relative output error, mean", "ratio")
    return render_page(
        Path(__file__).parent / "templates/comparison.html",
        title=f"parewell: {a} and {b}",
        eyebrow=f"parewell · {' and '.join(kinds)}",
        heading=f"{a} and {b}",
        verdict=Verdict("plain", comparison.verdict(), ""),
        warnings=comparison.notes,
        files=files,
        figures=comparison.figure_rows(),
        layers=comparison.layer_rows(),
        charts=[chart_by_block(errors, "Output error", error, logarithmic=True)],
        kinds=charts_by_kind(errors, y=error, logarithmic=True),
    )


def _shared(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (a[name], b[name]) for name in a if name in b}


def _other_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """A note where figures are not of the same rows."""
    digests = [{name: d["sha256"] for name, d in of.items() if isinstance(d, dict) and "sha256" in d} for of in (a, b)]
    others = [name.replace("_", "-") for name, (x, y) in _shared(*digests).items() if x != y and name in _MEASURED_ON]
    if not others:
        return []
    return [f"both were measured on different rows ({', '.join(others)}), so their figures cannot be compared closely."]


def _signed(value: float) -> str:
    return "0" if not value else f"{value:+,}" if isinstance(value, int) else f"{value:+,.4g}"
