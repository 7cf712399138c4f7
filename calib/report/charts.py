"""Line charts as inline SVG: small panels of one size, whose text stays readable on a phone.

A chart has one series, or two: the first then is dashed and grey (what was), the second solid and coloured (what is).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[float]]
AxisRange = tuple[float, float]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 240, 132, 38, 6, 8, 20
_MOST = 200  # points drawn; of more, means of neighbours
_GREATEST = 1e100  # what is beyond is no measurement, and sums overflow


def lines(
    series: Series,
    title: str,
    *,
    unit: str = "",
    first: int = 0,
    logarithmic: bool = False,
    span: AxisRange | None = None,
) -> str:
    """A figure of values over their index, which starts at `first` and counts `unit`s; `span` is what the axis holds.

    Values that are no numbers, or beyond 1e100, are left out, and on a logarithmic axis those that are not positive.
    """
    drawn = {label: _usable(values, first, logarithmic) for label, values in series.items()}
    values = [v for points in drawn.values() for _, v in points]
    if not values:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>No values to draw.</p></figure>"
    low, high = span or axis_range(values, logarithmic=logarithmic)
    last = first + max(len(values) for values in series.values()) - 1

    def x(i: float) -> float:
        return _LEFT + (i - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(v: float) -> float:
        a, b, c = (math.log10(u) if logarithmic else u for u in (low, v, high))
        return _TOP + (c - b) / ((c - a) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    marks = ticks(low, high, logarithmic=logarithmic)
    rules = "".join(f"M{_LEFT} {y(v):.1f}H{_WIDTH - _RIGHT}" for v in marks)
    shapes = [f'<path class="rule" d="{rules}"/>']
    shapes += [f'<text class="y" x="{_LEFT - 5}" y="{y(v) + 3.5:.1f}">{_short(v)}</text>' for v in marks]
    ends = [(first, _LEFT, ""), (last, _WIDTH - _RIGHT, ' class="y"')][: 1 + (last > first)]
    shapes += [f'<text x="{at}" y="{_HEIGHT - 5}"{name}>{i}</text>' for i, at, name in ends]
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    shapes.append(f'<text class="unit" x="{middle}" y="{_HEIGHT - 5}">{escape(unit)}</text>')
    for name, points in zip(("was", "now")[-len(drawn) :], drawn.values(), strict=True):
        near = [(x(i), y(v)) for i, v in _thinned(points)]
        if len(near) == 1:  # a line needs two ends
            near = [(near[0][0] - 2, near[0][1]), (near[0][0] + 2, near[0][1])]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in near)
        shapes.append(f'<polyline class="{name}" points="{path}"/>')
    summary = "; ".join(f"{label} {_range(points)}" for label, points in drawn.items() if points)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>{''.join(shapes)}</svg></figure>"
    )


def panels(
    values: Mapping[str, Sequence[tuple[str, float]]], *, logarithmic: bool = False, span: AxisRange | None = None
) -> str:
    """One chart for each kind of layer, over the blocks, all with one axis.

    `values` are by series, each of (layer's name, value). Layers of a block whose names differ in numbers alone, as a
    mixture's experts do, are averaged; kinds whose values are the same throughout share a chart.
    """
    by_kind = {label: _by_kind(layers) for label, layers in values.items()}
    kinds = list(dict.fromkeys(kind for of in by_kind.values() for kind in of))
    usable = [v for of in by_kind.values() for series in of.values() for v in series if _fits(v, logarithmic)]
    span = span or (axis_range(usable, logarithmic=logarithmic) if usable else None)
    alike: dict[tuple[tuple[str, tuple[float, ...]], ...], list[str]] = {}
    for kind in kinds:
        alike.setdefault(tuple((label, tuple(of.get(kind, ()))) for label, of in by_kind.items()), []).append(kind)
    short = {kind: kind.rpartition(".")[2] for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}
    short |= {kind: f"{short[kind]} (mean)" for kind in kinds if ".experts." in f".{kind}"}
    drawn = (
        lines(dict(series), ", ".join(short[k] for k in of), unit="block", logarithmic=logarithmic, span=span)
        for series, of in alike.items()
    )
    return legend(values) + grid(drawn)


def grid(figures: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def legend(labels: Iterable[str]) -> str:
    """Of two series; one needs none."""
    pairs = list(zip(("was", "now"), labels, strict=False))
    if len(pairs) < 2:
        return ""
    keys = (
        f'<span><svg class="key" viewBox="0 0 28 8" aria-hidden="true"><polyline class="{name}" points="1,4 27,4"/>'
        f"</svg>{escape(label)}</span>"
        for name, label in pairs
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def place(layer: str) -> tuple[int | None, str]:
    """Block and kind: "model.layers.3.mlp.up_proj" -> 3, "mlp.up_proj".  None where the name has no number."""
    found = re.fullmatch(r"\D*?\.([0-9]{1,6})\.(.+)", layer, re.DOTALL)
    return (int(found[1]), found[2]) if found else (None, layer)


def axis_range(values: Sequence[float], *, logarithmic: bool) -> AxisRange:
    """What an axis holds: zero too, where it is not logarithmic."""
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


def _by_kind(layers: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    gathered: dict[str, dict[int, list[float]]] = {}
    for i, (name, value) in enumerate(layers):
        block, kind = place(name)
        kind = re.sub(r"\.\d+\.", ".", kind) if block is not None else "all layers"
        gathered.setdefault(kind, {}).setdefault(i if block is None else block, []).append(value)
    return {kind: [sum(v) / len(v) for _, v in sorted(of.items())] for kind, of in gathered.items()}


def _fits(value: float, logarithmic: bool) -> bool:
    return abs(value) < _GREATEST and (value > 1 / _GREATEST or not logarithmic)


def _usable(values: Sequence[float], first: int, logarithmic: bool) -> list[tuple[float, float]]:
    return [(float(i), float(v)) for i, v in enumerate(values, first) if _fits(v, logarithmic)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MOST)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    means = [(sum(i for i, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
    return means or list(points)


def _range(points: Sequence[tuple[float, float]]) -> str:
    values = [v for _, v in points]
    return f"from {values[0]:.3g} to {values[-1]:.3g}, least {min(values):.3g}, greatest {max(values):.3g}"
