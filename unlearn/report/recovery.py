"""The page of an audit in fewer bits, and what it says in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from calib.report.charts import grid, legend, lines, panels
from calib.report.html import (
    Report,
    about,
    as_csv,
    as_json,
    document,
    downloads,
    format_number,
    heading,
    recipe,
    section,
    table,
)

BACK = {"probability": "by probability of a token", "right": "by what is right", "extraction": "by extraction"}
LOOKED = ("trained on", "asked for")  # halves of the rows, of a relearning


def audited_page(report: Report, name: str, steps: Sequence[Mapping[str, Any]] = ()) -> str:
    """For a report as `audited` makes it of the model called `name`; `steps` are of its recipe."""
    head_of_rows, rows = known_rows(report)
    flips = {form: found for form, found in report["flips"].items() if found["layers"]}
    head = heading(f"parewell · {name}, audited", "What fewer bits bring back", audited_verdict(report))
    back = [
        (form, *("–" if of[measure] is None else f"{of[measure]:.2f}" for measure in BACK))
        for form, of in report["recovery"].items()
    ]
    sentence = (
        f"Of {report['rows']['forget']:,} rows that were forgotten, and of those retained, in every form: the model "
        "before, the unlearned one, and one that never saw the rows."
    )
    parts = [
        section("What came back"),
        about("0: no more is known of the rows than by a model that never saw them. 1: as much as before."),
        table(("", *BACK.values()), back),
        section("What is known of the rows"),
        about(sentence),
        table(head_of_rows, [(*row[:2], *map(format_number, row[2:])) for row in rows], sortable=True, tall=True),
    ]
    files = {"report.json": as_json(report), "known.csv": as_csv(head_of_rows, rows)}
    if flips:
        of_all = [
            (form, *("–" if found.get(of) is None else f"{found[of]:.2%}" for of in ("same scales", "own scales")))
            for form, found in flips.items()
        ]
        by_layer = [(form, layer, share) for form, found in flips.items() for layer, share in found["layers"].items()]
        parts += [
            section("Codes that unlearning changed"),
            about("Where few change, rounding undoes what unlearning did."),
            table(("", "on the scales of the model before", "each on its own scales"), of_all),
            *(
                f"<h3>{escape(form)}</h3>{panels({form: list(found['layers'].items())}, span=(0, 1))}"
                for form, found in flips.items()
            ),
        ]
        files["codes.csv"] = as_csv(("form", "layer", "share changed"), by_layer)
    if found := report.get("relearning"):
        parts += _relearning(found)
        files["relearning.csv"] = as_csv(*_relearned_rows(found))
    return document(f"parewell: {name} in fewer bits", head, [*parts, recipe(steps), downloads()], files)


def known_rows(report: Report) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """A head, then a row for each form and model."""
    measures = [
        (f"{group}: {text}", group, measure)
        for group in ("forget", "retain")
        for measure, text in (("nats", "nats a token"), ("right", "right"), ("extraction", "extraction"))
    ]
    rows = [
        (form, model, *(of[group][measure] for _, group, measure in measures))
        for form, models in report["table"].items()
        for model, of in models.items()
    ]
    return ("form", "model", *(text for text, *_ in measures)), rows


def _relearning(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    steps = next(iter(found.values()))["steps"]
    drawn = [
        lines({of: one[of] for of in LOOKED}, name, unit=f"looks, the last at step {steps[-1]:.0f}", span=(0, 1))
        for name, one in found.items()
    ]
    head, rows = _relearned_rows(found)
    return [
        section("How fast it comes back in training"),
        about("Trained on half of the forgotten rows: probability of a token of those, and of the others."),
        legend(LOOKED),
        grid(drawn),
        table(head, [tuple(map(format_number, row)) for row in rows]),
    ]


def _relearned_rows(found: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[list[str], list[list[float]]]:
    columns = [(f"{name}, {of}", one[of]) for name, one in found.items() for of in LOOKED]
    steps = next(iter(found.values()))["steps"]
    return ["steps", *(name for name, _ in columns)], [
        [step, *(values[i] for _, values in columns)] for i, step in enumerate(steps)
    ]


def audited_verdict(report: Report) -> str:
    """The report in one sentence."""
    back = {form: of["probability"] for form, of in report["recovery"].items() if of["probability"] is not None}
    if not back:
        return "The model before knew no more of these rows than one that never saw them: nothing can come back."
    worst = max(back, key=lambda form: back[form])
    here = f"{next(iter(back.values())):.0%} is left as the model is"
    fewer = f", and at most {back[worst]:.0%} ({worst}) in fewer bits" if len(back) > 1 else ""
    return f"Of what was known of the rows {here}{fewer}: 0% is a model that never saw them."
