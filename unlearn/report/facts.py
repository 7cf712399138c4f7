"""The page of an audit of facts: recall in both directions, and curves over the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.report.charts import BLOCK, Axis, Chart, Line, chart
from calib.report.html import Report, Steps, Table, Verdict, as_csv, as_json, described_steps, render_page

_NAMES = {"forward": "description given the name", "reversed": "name given the description"}
_ROLES = {"original": "before", "audited": "after", "oracle": "reference"}
_PARTS = [("mrr", "forward"), ("mrr", "reversed")] + [("entanglement", p) for p in ("forward", "reversed", "within")]
GONE = 0.5  # share of what a model knew beyond which a direction counts as forgotten


def facts_page(report: Report, name: str, steps: Steps = ()) -> str:
    """Render the page of an audit of facts of the model called `name`, as `audit_facts` reports it."""
    recall = recall_table(report)
    curves = (
        [
            (model, block, *(of[kind][part][block] for kind, part in _PARTS))
            for model, of in report["models"].items() for block in range(len(of["mrr"]["forward"]))
        ]
    )  # fmt: skip
    head = ("model", "block", *(f"{kind}, {part}" for kind, part in _PARTS))
    return render_page(
        Path(__file__).parent / "templates/facts.html", title=f"parewell: facts of {name}",
        eyebrow=f"parewell · {name}, audited", heading="Facts in both directions", verdict=facts_verdict(report),
        files={"report.json": as_json(report), "recall.csv": as_csv(*recall), "blocks.csv": as_csv(head, curves)},
        recall=recall, rows=report["rows"], chance=report["chance"],
        ranks=_charts(report, "mrr", _NAMES, Axis("mean reciprocal rank", "0 to 1")),
        cosines=_charts(
            report, "entanglement",
            {"forward": "different names, forward", "reversed": "different names, reversed", "within": "one name"},
            Axis("cosine of gradients", "absolute"),
        ),
        steps=described_steps(steps),
    )  # fmt: skip


def recall_table(report: Report) -> Table:
    """A column for each model: recall in both directions, what a right partner gains over others, and the gap."""
    models = report["models"]
    rows: list[tuple[Any, ...]] = []
    for direction, text in _NAMES.items():
        for measure, unit in (
            ("probability", "probability of a token"),
            ("probability, all hidden at once", "probability of a token, all hidden at once"),
            ("gain", "nats gained over other facts"),
        ):
            if all(measure in of["recall"][direction] for of in models.values()):
                rows.append((f"{text}: {unit}", *(of["recall"][direction][measure] for of in models.values())))
    rows.append(("reversal gap, nats", *(of["recall"]["gap"] for of in models.values())))
    rows.append(("its standard error", *(of["recall"]["gap_error"] for of in models.values())))
    return ("", *models), rows


def _charts(report: Report, kind: str, parts: Mapping[str, str], y: Axis) -> list[Chart]:
    """A panel for each part that has values, with a line for each model."""
    return [
        chart(
            {Line(_ROLES[model], model): of[kind][part] for model, of in report["models"].items()}, text,
            x=BLOCK, y=y, span=(0, 1),
        )
        for part, text in parts.items()
        if all(value is not None for of in report["models"].values() for value in of[kind][part])
    ]  # fmt: skip


def facts_verdict(report: Report) -> Verdict:
    """Judge whether facts were forgotten in both directions, by what the right partner gains over those of other facts,
    beside the original; not judged without it."""
    models = report["models"]
    gains = {model: {d: of["recall"][d]["gain"] for d in _NAMES} for model, of in models.items()}
    told = "; ".join(
        f"{model}: {', '.join(f'{of[d]:+.2f} nats {_NAMES[d]}' for d in _NAMES)}" for model, of in gains.items()
    )
    told = f"What the right partner gains over those of other facts, {report['rows']['facts']:,} facts: {told}."
    if "original" not in gains:
        return Verdict("doubtful", "Not judged: give --original, the model to compare with.", told)
    before, after = gains["original"], gains["audited"]
    known = [d for d in _NAMES if before[d] > 1]
    if not known:
        return Verdict("doubtful", "Not judged: the original does not know the facts.", told)
    kept = [_NAMES[d] for d in known if after[d] > GONE * before[d]]
    if not kept:
        return Verdict("good", "Good: more than half of what was known is forgotten in every direction.", told)
    if len(kept) == len(known):
        return Verdict("bad", f"Bad: still known is the {' and the '.join(kept)}.", told)
    return Verdict("doubtful", f"Doubtful: forgotten one way alone; still known is the {' and the '.join(kept)}.", told)
