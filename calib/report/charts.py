"""Line charts as data for a template to draw: small panels of one size, whose text stays readable on a phone.

A line's color is its role, and a role means the same on every page; `report.css` defines the colors once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

AxisRange = tuple[float, float]

WIDTH, HEIGHT = 240, 144
LEFT, RIGHT, TOP, BOTTOM = 42, 234, 22, 124  # edges of the plot
MAX_POINTS = 200  # drawn; of more, means of neighbors
_GREATEST = 1e100  # what is beyond is no measurement, and sums overflow

COLOR_ROLES = {
    "before": "the model before the job",
    "after": "the model after the job",
    "reference": "what the job is compared with: an oracle, a fit, the fewest bits",
    "error": "distance from the model before: output error, changed codes",
    "loss": "what training lowers",
    "first": "the first of two outputs",
    "second": "the second of two outputs",
}


@dataclass(frozen=True)
class Line:
    """A line of a chart: one of COLOR_ROLES, and the words of the legend."""

    role: str
    label: str


@dataclass(frozen=True)
class Axis:
    """An axis of a chart: what it shows, and in which unit."""

    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})"


@dataclass(frozen=True)
class Chart:
    """One panel, in units of its viewBox: ticks are (position, text), lines are (line, points of a polyline)."""

    title: str
    x: Axis
    y: Axis
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[tuple[Line, str]]
    summary: str


BEFORE, AFTER, ERROR = Line("before", "before"), Line("after", "after"), Line("error", "error")
BLOCK, STEP = Axis("block", "index"), Axis("training step", "count")
WEIGHTED = Axis("term of the loss, weighted", "nats")


def chart(
    series: Mapping[Line, Sequence[float]],
    title: str,
    *,
    x: Axis,
    y: Axis,
    at: Sequence[float] | None = None,
    logarithmic: bool = False,
    span: AxisRange | None = None,
) -> Chart:
    """A panel of values over `at` (default: 0, 1, 2, ...); `span` is what the y axis covers.

    Values that are not finite, or beyond 1e100, are left out, and on a logarithmic axis those that are not positive.
    """
    at = range(max(map(len, series.values()), default=0)) if at is None else at
    drawn = {
        line: [(float(i), float(v)) for i, v in zip(at, values, strict=False) if _fits(v, logarithmic)]
        for line, values in series.items()
    }
    values = [v for points in drawn.values() for _, v in points]
    if not values:
        return Chart(title, x, y, (), (), (), "")
    if logarithmic:
        y = Axis(y.name, f"{y.unit}, log")
    low, high = span or axis_range(values, logarithmic=logarithmic)
    first, last = at[0], at[-1]

    def across(i: float) -> float:
        return LEFT + (i - first) / ((last - first) or 1) * (RIGHT - LEFT)

    def up(v: float) -> float:
        a, b, c = (math.log10(u) if logarithmic else u for u in (low, v, high))
        return BOTTOM - (b - a) / ((c - a) or 1) * (BOTTOM - TOP)

    lines = []
    for line, points in drawn.items():
        near = [(across(i), up(v)) for i, v in _thinned(points)]
        if len(near) == 1:  # a line needs two ends
            near = [(near[0][0] - 2, near[0][1]), (near[0][0] + 2, near[0][1])]
        lines.append((line, " ".join(f"{a:.1f},{b:.1f}" for a, b in near)))
    return Chart(
        title, x, y,
        [(round(across(i), 1), f"{i:.6g}") for i in dict.fromkeys((first, last))],
        [(round(up(v), 1), _short(v)) for v in ticks(low, high, logarithmic=logarithmic)],
        lines,
        "; ".join(f"{line.label} {_range(points)}" for line, points in drawn.items() if points),
    )  # fmt: skip


def charts_by_kind(
    values: Mapping[Line, Sequence[tuple[str, float]]],
    *,
    y: Axis,
    logarithmic: bool = False,
    span: AxisRange | None = None,
) -> list[Chart]:
    """One panel for each kind of linear, over the blocks, all with one axis.

    `values` are (name of a linear, value). Linears of a block whose names differ in numbers alone, as a mixture's
    experts do, are averaged; kinds whose values are the same throughout share a panel.
    """
    by_kind = {line: _by_kind(linears) for line, linears in values.items()}
    kinds = list(dict.fromkeys(kind for of in by_kind.values() for kind in of))
    usable = [v for of in by_kind.values() for series in of.values() for v in series if _fits(v, logarithmic)]
    span = span or (axis_range(usable, logarithmic=logarithmic) if usable else None)
    alike: dict[tuple[tuple[Line, tuple[float, ...]], ...], list[str]] = {}
    for kind in kinds:
        alike.setdefault(tuple((line, tuple(of.get(kind, ()))) for line, of in by_kind.items()), []).append(kind)
    short = {kind: kind.removesuffix(".weight").rpartition(".")[2] for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}
    short |= {kind: f"{short[kind]} (mean)" for kind in kinds if ".experts." in f".{kind}"}
    return [
        chart(dict(series), ", ".join(short[k] for k in of), x=BLOCK, y=y, logarithmic=logarithmic, span=span)
        for series, of in alike.items()
    ]


def chart_by_block(values: Mapping[Line, Sequence[tuple[str, float]]], title: str, y: Axis, **options: Any) -> Chart:
    """One panel over the blocks: means over the linears of each. `values` are (name of a linear, value)."""
    means = {line: _by_block(linears) for line, linears in values.items()}
    at = sorted({block for of in means.values() for block in of})
    series = {line: [of.get(block, math.nan) for block in at] for line, of in means.items()}
    return chart(series, title, x=BLOCK, y=y, at=at, **options)


def split_name(linear: str) -> tuple[int | None, str]:
    """Block and kind: "model.layers.3.mlp.up_proj" -> 3, "mlp.up_proj".  None where the name has no number."""
    found = re.fullmatch(r"\D*?\.([0-9]{1,6})\.(.+)", linear, re.DOTALL)
    return (int(found[1]), found[2]) if found else (None, linear)


def axis_range(values: Sequence[float], *, logarithmic: bool) -> AxisRange:
    """Range of an axis: it includes zero, unless it is logarithmic."""
    low, high = (min(values), max(values)) if logarithmic else (min(0.0, *values), max(0.0, *values))
    if high - low > 1e-9 * max(-low, high, 1e-90):
        return low, high
    return (low / 2, high * 2) if logarithmic else (low, high + 1)


def ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Round values from low to high, two to six of them; the ends where there are no two round ones."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        step = max(1, len(powers) // 4)
        tens = [p for p in powers if p % step == 0]
        found = [10.0**p for p in tens]
        if sum(low <= v <= high for v in found) < 2:
            found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    else:
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step_by = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        found = [i * step_by for i in range(math.ceil(low / step_by), math.floor(high / step_by) + 1)]
    found = [v for v in found if low <= v <= high]
    return found if len(found) > 1 else [low, high]


def _short(value: float) -> str:
    """At most six characters or so: there is no room for more."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _by_block(linears: Sequence[tuple[str, float]]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for name, value in linears:
        if (block := split_name(name)[0]) is not None:
            found.setdefault(block, []).append(value)
    return {block: fmean(of) for block, of in found.items()}


def _by_kind(linears: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    gathered: dict[str, dict[int, list[float]]] = {}
    for i, (name, value) in enumerate(linears):
        block, kind = split_name(name)
        kind = re.sub(r"\.\d+\.", ".", kind) if block is not None else "all linears"
        gathered.setdefault(kind, {}).setdefault(i if block is None else block, []).append(value)
    return {kind: [fmean(v) for _, v in sorted(of.items())] for kind, of in gathered.items()}


def _fits(value: float, logarithmic: bool) -> bool:
    return abs(value) < _GREATEST and (value > 1 / _GREATEST or not logarithmic)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    means = [(fmean(i for i, _ in part), fmean(v for _, v in part)) for part in parts]
    return means or list(points)


def _range(points: Sequence[tuple[float, float]]) -> str:
    values = [v for _, v in points]
    return f"from {values[0]:.3g} to {values[-1]:.3g}, least {min(values):.3g}, greatest {max(values):.3g}"
