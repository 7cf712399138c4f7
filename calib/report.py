"""One self-contained HTML page for a report: charts drawn as SVG here, no script, nothing fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Series = Mapping[str, Sequence[float]]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 60, 28
_COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#8a63d2")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --paper: #fdfdfb; --faint: #8884; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e0; --paper: #1a1a18; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } svg { width: 100%; height: auto; max-width: 44rem; }
svg text { fill: var(--ink); font-size: 11px; } .grid { stroke: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
pre { background: var(--faint); padding: .7rem; overflow-x: auto; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page for a quantization's report."""
    quality, size, layers = report["quality"], report["bytes"], report["layers"]
    short = [layer["name"] for layer in layers]
    parts = [
        f"<h1>Quantized to {escape(report['scheme'])}</h1>",
        f"<p>{escape(verdict(report))}</p>",
        _table(
            ("", "before", "after"),
            [
                ("perplexity, held-out", _number(quality["reference_perplexity"]), _number(quality["perplexity"])),
                ("bits per byte", _number(quality["reference_bits_per_byte"]), _number(quality["bits_per_byte"])),
                ("mean KL to the float model, nats", "0", _number(quality["kl"])),
                ("same most likely token", "100%", f"{quality['top1_agreement']:.1%}"),
                ("megabytes of weights", _number(size["before"] / 1e6), _number(size["after"] / 1e6)),
            ],
        ),
        f"<p>Runs in: {escape(', '.join(report['loaders']['loaders']))}.</p>",
        *(f"<p>Mind: {escape(note)}.</p>" for note in report["loaders"]["notes"]),
    ]
    if report["untied"]:
        parts.append(
            "<p>Embedding and head were one tensor and are two now: only the head takes the final norm's gain.</p>"
        )
    for what, title in (("activations", "inputs"), ("weights", "weights")):
        parts += [
            f"<h2>QSUR of {title}, as a share of the ceiling</h2>",
            _lines({when: [layer[when][what]["ratio"] for layer in layers] for when in ("before", "after")}, short),
        ]
    worst = max(layers, key=lambda layer: _outlier(layer["before"]["activations"]["channel_range"]))
    parts += [
        f"<h2>Ranges of input channels, smallest to largest: {escape(worst['name'])}</h2>",
        "<p>The layer whose largest channel stood out most before.</p>",
        _lines(
            {when: worst[when]["activations"]["channel_range"] for when in ("before", "after")},
            None,
            logarithmic=True,
            unit="quantiles of the channels",
        ),
        "<h2>Range of input channels: largest over median</h2>",
        _lines(
            {
                when: [_outlier(layer[when]["activations"]["channel_range"]) for layer in layers]
                for when in ("before", "after")
            },
            short,
            logarithmic=True,
        ),
        "<h2>Relative output error of each layer</h2>",
        _lines({"error": [layer["output_error"] for layer in layers]}, short, logarithmic=True),
    ]
    for name, curve in report["curves"].items():
        parts += [f"<h2>Loss of every step ({escape(name)}), nats</h2>", _lines({"loss": curve}, None, unit="steps")]
    rows = [
        (
            layer["name"],
            f"{layer['output_error']:.2e}",
            *(f"{layer[w][what]['ratio']:.3f}" for what in ("activations", "weights") for w in ("before", "after")),
            *(f"{_outlier(layer[w]['activations']['channel_range']):.3g}" for w in ("before", "after")),
        )
        for layer in layers
    ]
    head = ("layer", "error", "inputs before", "after", "weights before", "after", "range before", "after")
    parts += ["<h2>Every layer</h2>", _table(head, rows)]
    facts = {key: report[key] for key in ("job", "scheme", "data", "quality", "bytes")}
    parts += ["<h2>Facts</h2>", f"<pre>{escape(json.dumps(facts, indent=1))}</pre>"]
    title = f"parewell: {report['scheme']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def verdict(report: Mapping[str, Any]) -> str:
    """The report in one sentence."""
    quality, size, stages = report["quality"], report["bytes"], report["quality_by_stage"]
    tuned = f", {stages['rounded']['perplexity']:.3f} before tuning" if "tuned" in stages else ""
    worse = quality["perplexity"] / quality["reference_perplexity"] - 1
    return (
        f"{size['before'] / 1e6:,.1f} MB became {size['after'] / 1e6:,.1f} MB; perplexity on "
        f"{quality['tokens']:,} held-out tokens went from {quality['reference_perplexity']:.3f} to "
        f"{quality['perplexity']:.3f} ({worse:+.1%}{tuned})."
    )


def _outlier(quantiles: Sequence[float]) -> float:
    median = quantiles[len(quantiles) // 2]
    return quantiles[-1] / median if median else 0.0


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table></div>'


def _lines(
    series: Series,
    names: Sequence[str] | None,
    *,
    logarithmic: bool = False,
    unit: str = "layers, in order of the data",
) -> str:
    """A chart of values over their index; points carry their name and value as tooltips."""
    tiny = min((v for values in series.values() for v in values if v > 0), default=1.0)

    def height(v: float) -> float:
        return math.log10(max(v, tiny)) if logarithmic else v

    heights = [height(v) for values in series.values() for v in values]
    low, high = (min(heights), max(heights)) if logarithmic else (min(0.0, *heights), max(heights))
    span = high - low or 1.0
    count = max(len(values) for values in series.values())

    def x(i: int) -> float:
        return _LEFT + i * (_WIDTH - _LEFT - 10) / max(count - 1, 1)

    def y(v: float) -> float:
        return 10 + (high - height(v)) / span * (_HEIGHT - 10 - _BOTTOM)

    shapes = []
    for step in range(5):
        level = low + span * step / 4
        value = 10**level if logarithmic else level
        at = y(value)
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for colour, (label, values) in zip(_COLOURS, series.items(), strict=False):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        shapes.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        if names:
            shapes += [
                f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}">'
                f"<title>{escape(names[i])}, {escape(label)}: {v:.4g}</title></circle>"
                for i, v in enumerate(values)
            ]
    shapes.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{unit}</text>')
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{escape(label)}'
        for colour, label in zip(_COLOURS, series, strict=False)
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(shapes)}</svg><div>{keys}</div>'
