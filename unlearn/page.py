"""The page of an unlearning's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from calib.report import document, facts, lines, number, table

MEASURES = {
    "nats": "nats a decision",
    "right": "decisions that are right",
    "extraction": "extraction strength",
    "min_k_auc": "attack by least likely tokens (AUC; 0.5: blind)",
}

POOR = 0.8  # relative error of predictions beyond which a verdict warns of them
FACTS = "Facts: probability a token of the description given the name, and reversed"


def unlearned_page(report: Mapping[str, Any]) -> str:
    """For a report as `unlearn` makes it."""
    stages = report["quality_by_stage"]
    columns = dict(stages)
    asked = report.get("asked", {})
    if "oracle" in asked:
        columns["never saw it"] = asked["oracle"]
    rows = [
        (f"{group}: {text}", *(number(of.get(group, {}).get(measure)) for of in columns.values()))
        for group in stages["after"] for measure, text in MEASURES.items() if measure in stages["after"][group]
    ]  # fmt: skip
    parts = [
        f"<h1>Unlearned: {escape(report['method'])}</h1>",
        f"<p>{escape(unlearned_verdict(report))}</p>",
        table(("", *columns), rows),
    ]
    if quality := asked.get("forget_quality"):
        parts += [
            "<h2>Forget quality</h2>",
            "<p>p-value of truth ratios against those of the model that never saw the rows (Kolmogorov and Smirnov); "
            "near 0: told apart.</p>",
            table(("", *quality), [("p", *(number(p) for p in quality.values()))]),
        ]
    if leak := asked.get("privacy_leak"):
        parts += [
            "<h2>Privacy leak</h2>",
            "<p>The attack on the least likely tokens beside that on the model that never saw the rows, in percent "
            "(MUSE's PrivLeak): below 0 they are still recognised, above 0 they stand out by being avoided.</p>",
            table(("", *leak), [("%", *(number(v) for v in leak.values()))]),
        ]
    for name, title in (("utility", "Utility: questions that should still be answered"), ("facts", FACTS)):
        if found := asked.get(name):
            measures = next(iter(found.values()))
            rows = [(measure, *(number(of[measure]) for of in found.values())) for measure in measures]
            parts += [f"<h2>{title}</h2>", table(("", *found), rows)]
    if scale := report.get("scale"):
        parts += ["<h2>How good predictions are</h2>", _scale(scale)]
    if found := report.get("audit"):
        parts += ["<h2>How far from models that never saw the rows</h2>", _audit(found)]
    parts.append(facts({key: report[key] for key in ("job", "method", "task", "rows", "data", "quality")}))
    return document(f"parewell: {report['method']}", parts)


def unlearned_verdict(report: Mapping[str, Any]) -> str:
    """The report in one sentence."""
    rows, (before, after) = report["rows"], (report["quality_by_stage"][s]["forget" if report["rows"]["forget"] else "retain"] for s in ("before", "after"))  # fmt: skip  # noqa: E501
    if not rows["forget"]:
        return f"Nothing of {rows['train']:,} rows was to be forgotten: the model is the same, byte for byte."
    kept = (report["quality_by_stage"][s]["retain"]["right"] for s in ("before", "after"))
    verdict = (
        f"{rows['forget']:,} of {rows['train']:,} rows were to be forgotten: of their decisions {before['right']:.1%} "
        f"were right and {after['right']:.1%} are ({before['nats']:.3f} and {after['nats']:.3f} nats), of those "
        "retained {:.1%} and {:.1%}".format(*kept)
    )
    if found := report.get("audit"):
        of, floor = found["table"], "oracles against oracles"
        verdict += (
            f"; KLoM on them is {of[report['method']]['forget']['p95']:.2f} at the 95th percentile, doing nothing "
            f"{of['do nothing']['forget']['p95']:.2f}, floor {of[floor]['forget']['p95']:.2f}"
        )
    held_out = report.get("scale", {}).get("held_out")
    if held_out and held_out["error"] > POOR:
        verdict += f"; mind that predictions were poor on other deletions (relative error {held_out['error']:.2f})"
    return verdict + "."


def _scale(scale: Mapping[str, Any]) -> str:
    own, others = number(scale["own"]), number(scale["others"])
    said = f"<p>Predictions are multiplied by {own} on rows that go, by {others} elsewhere"
    if "raw" not in scale:
        return f"{said}; this was not checked on other deletions.</p>"
    names = {"score": "linear datamodeling score", "slope": "slope of truth on prediction", "cosine": "cosine",
             "error": "relative error"}  # fmt: skip
    rows = [(text, number(scale["raw"][name]), number(scale["held_out"][name])) for name, text in names.items()]
    return f"{said}, as fitted to deletions of rows that belong together.</p>" + table(
        ("on deletions that were held out", "as predicted", "scaled by the others"), rows
    )


def _audit(found: Mapping[str, Any]) -> str:
    groups = list(next(iter(found["table"].values())))
    rows = []
    for name, of in found["table"].items():
        rows.append(
            (
                name,
                *(f"{of[g]['p95']:.2f} ({of[g]['mean']:.2f})" for g in groups),
                *(f"{of[g]['gaussian_p95']:.2f} ({of[g]['gaussian_mean']:.2f})" for g in groups),
                number(of["forget"]["attack"]),
            )
        )
    head = ("", *groups, *(f"{g}, Gaussian" for g in groups), "attack")
    parts = [
        f"<p>KLoM, 95th percentile (mean), {found['models']} models a side, {escape(found['estimator'])}; and how "
        "often an attacker tells a model from one that never saw a row (0.5: not at all).</p>",
        table(head, rows),
    ]
    for shown in found["shown"]:
        parts += [
            f"<h2>Margins of row {shown['row']} to forget ({escape(shown['which'])}: {shown['distance']:.2f})</h2>",
            lines({name: _sorted(shown[name]) for name in ("unlearned", "oracles")}, None, unit="models, by margin"),
        ]
    return "".join(parts)


def _sorted(values: Sequence[float]) -> list[float]:
    return sorted(values)
