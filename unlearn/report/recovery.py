"""The page of an audit: what an unlearned model recovers once quantized, and once trained again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.report.charts import ERROR, STEP, Axis, Chart, Line, chart, chart_by_block, charts_by_kind
from calib.report.html import Report, Steps, Table, as_csv, as_json, described_steps, render_page
from unlearn.report.verdict import ORACLE, audited_verdict

RECOVERED = {"probability": "by probability of a token", "right": "by accuracy", "extraction": "by extraction strength"}
HALVES = {"trained on": "trained on", "asked for": "not trained on"}  # of the forget set, in a relearning
_ROLES = ("before", "after", "reference")
_LINES = {name: Line(role, name) for name, role in zip(("original", "unlearned", "oracle"), _ROLES, strict=True)}
_SHARE = Axis("changed codes", "share")


def audited_page(report: Report, name: str, steps: Steps = ()) -> str:
    """Render the page of an audit of the model called `name`, as `audit_recovery` reports it; `steps` are of its
    recipe."""
    known = known_table(report)
    flips = {form: found for form, found in report["flips"].items() if found["layers"]}
    files = {"report.json": as_json(report), "known.csv": as_csv(*known)}
    if flips:
        by_layer = [(form, layer, share) for form, found in flips.items() for layer, share in found["layers"].items()]
        files["codes.csv"] = as_csv(("form", "layer", "share changed"), by_layer)
    relearning = report.get("relearning")
    if relearning:
        files["relearning.csv"] = as_csv(*_relearned(relearning))
    percent = ("same scales", "own scales")
    return render_page(
        Path(__file__).parent / "templates/recovery.html", title=f"parewell: {name} in fewer bits",
        eyebrow=f"parewell · {name}, audited", heading="Knowledge recovered in fewer bits",
        verdict=audited_verdict(report), files=files,
        recovered=(
            ("", *RECOVERED.values()),
            [(form, *(of[measure] for measure in RECOVERED)) for form, of in report["recovery"].items()],
        ),
        known=known, rows=report["rows"]["forget"], oracle=ORACLE,
        codes=(
            ("", "on the scales of the original", "each on its own scales"),
            [
                (form, *(None if found.get(of) is None else f"{found[of]:.2%}" for of in percent))
                for form, found in flips.items()
            ],
        ),
        code_charts=[
            chart_by_block({ERROR: list(found["layers"].items())}, form, _SHARE, span=(0, 1))
            for form, found in flips.items()
        ],
        kinds_of_codes={
            form: charts_by_kind({ERROR: list(found["layers"].items())}, y=_SHARE, span=(0, 1))
            for form, found in flips.items()
        },
        relearning=_relearned(relearning) if relearning else None,
        relearning_charts=_relearning_charts(relearning) if relearning else [], steps=described_steps(steps),
    )  # fmt: skip


def known_table(report: Report) -> Table:
    """A row for each form and model."""
    measures = [
        (f"{group}: {text}", group, measure)
        for group in ("forget", "retain")
        for measure, text in (("nats", "nats per token"), ("right", "accuracy"), ("extraction", "extraction strength"))
    ]
    rows = [
        (form, model, *(of[group][measure] for _, group, measure in measures))
        for form, models in report["table"].items()
        for model, of in models.items()
    ]
    return ("form", "model", *(text for text, *_ in measures)), rows


def _relearning_charts(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Chart]:
    """One panel for each half of the forget set."""
    at = next(iter(found.values()))["steps"]
    y = Axis("probability of a token", "0 to 1")
    return [
        chart({_LINES[name]: one[half] for name, one in found.items()}, f"Rows {text}", x=STEP, y=y, at=at, span=(0, 1))
        for half, text in HALVES.items()
    ]


def _relearned(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    columns = [(f"{name}, {text}", one[half]) for name, one in found.items() for half, text in HALVES.items()]
    steps = next(iter(found.values()))["steps"]
    return ["steps", *(name for name, _ in columns)], [
        [str(round(step)), *(values[i] for _, values in columns)] for i, step in enumerate(steps)
    ]
