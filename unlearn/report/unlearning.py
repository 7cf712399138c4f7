"""The page of an unlearning, and the figures by which two are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.report.charts import AFTER, WEIGHTED, Axis, Chart, Line, chart
from calib.report.html import (
    STATE_LINES,
    Steps,
    Table,
    as_json,
    described_steps,
    done_to,
    load_lines,
    loss_charts,
    render_page,
    transformers_lines,
)
from unlearn.report.verdict import ORACLE, unlearned_verdict

MEASURES = {
    "nats": "loss, nats per token or row",
    "right": "accuracy",
    "extraction": "extraction strength",
    "min_k_auc": "Min-K% membership attack (AUC; 0.5: chance)",
}
SCALE_NAMES = {
    "score": "linear datamodeling score",
    "slope": "slope of truth on prediction",
    "cosine": "cosine",
    "error": "relative error",
}

_ASKED = {"Tell-apart rate": "tell_apart", "Utility": "utility", "Facts": "facts", "Alternatives": "alternatives"}
_LIBRARY = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def unlearned_page(report: Mapping[str, Any], steps: Steps = ()) -> str:
    """Render the page of an unlearning's report, as `unlearn` makes it; `steps` are its recipe's."""
    asked, scale = report.get("asked", {}), report.get("scale")
    warnings = [*report.get("notes", [])]
    if scale and "raw" not in scale:
        warnings.append("the predictions were not validated on deletions that were held out")
    found = report.get("audit")
    return render_page(
        Path(__file__).parent / "templates/unlearning.html", title=f"parewell: {report['method']}",
        eyebrow=done_to(steps, "unlearned"), heading=f"Unlearned: {report['method']}",
        verdict=unlearned_verdict(report), warnings=warnings, files={"report.json": as_json(report)},
        chosen=report.get("chosen"), figures=_figures(report), rate=report.get("rate"),
        quality=asked.get("forget_quality"), leak=asked.get("privacy_leak"),
        tables={title: _by_stage(of) for title, name in _ASKED.items() if (of := asked.get(name))},
        scale=scale, scale_names=SCALE_NAMES, audit=found, audit_table=_audit_table(found) if found else None,
        margins=_margins(found) if found else [],
        curves=loss_charts(report.get("curves", {}), WEIGHTED), lines_of=_lines_of(report["task"]),
        steps=described_steps(steps), oracle=ORACLE,
    )  # fmt: skip


def _figures(report: Mapping[str, Any]) -> Table:
    """Before and after, beside an oracle where there was one."""
    stages = dict(report["quality_by_stage"])
    if "oracle" in (asked := report.get("asked", {})):
        stages[ORACLE] = asked["oracle"]
    rows: list[tuple[Any, ...]] = [
        (f"{group}: {text}", *(of.get(group, {}).get(measure) for of in stages.values()))
        for group in stages["after"] for measure, text in MEASURES.items() if measure in stages["after"][group]
    ]  # fmt: skip
    if size := report.get("bytes"):
        rows.append(("megabytes of weights", *(size[s] / 1e6 if s in size else "" for s in stages)))
    return ("", *stages), rows


def _by_stage(found: Mapping[str, Mapping[str, float]]) -> Table:
    return ("", *found), [(measure, *(of[measure] for of in found.values())) for measure in next(iter(found.values()))]


def _lines_of(task: str) -> dict[str, str]:
    if task == "causal-lm":
        return load_lines(["transformers", "vLLM", "parewell.load"])
    return {"transformers": transformers_lines(_LIBRARY[task])} if task in _LIBRARY else {"Python": STATE_LINES}


def unlearned_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Figures of an unlearning, by the names under which outputs are compared."""
    after = report["quality_by_stage"]["after"]
    found = {
        f"{group}: {text}": of[measure]
        for group, of in after.items() for measure, text in MEASURES.items() if measure in of
    }  # fmt: skip
    for name, of in report.get("audit", {}).get("table", {}).get(report["method"], {}).items():
        found[f"{name}: KLoM, 95th percentile"] = of["p95"]
    if "bytes" in report:
        found["megabytes of weights"] = report["bytes"]["after"] / 1e6
    return found


def _audit_table(found: Mapping[str, Any]) -> Table:
    """KLoM of every group of rows, with margins as they are and, where that is not the same, as Gaussians."""
    groups = list(next(iter(found["table"].values())))
    kinds = {"": ""} if found["estimator"] == "gaussian" else {"": "", "gaussian_": ", Gaussian"}
    rows = [
        (
            name,
            *(f"{of[g][f'{kind}p95']:.2f} ({of[g][f'{kind}mean']:.2f})" for kind in kinds for g in groups),
            of["forget"]["attack"],
        )
        for name, of in found["table"].items()
    ]
    return ("models", *(f"{g}{kind}" for kind in kinds.values() for g in groups), "attack"), rows


def _margins(found: Mapping[str, Any]) -> list[Chart]:
    """Sorted margins of rows of the forget set: of oracles, and of models that forgot."""
    lines = {"oracles": Line("reference", "oracles"), "unlearned": AFTER}
    return [
        chart(
            {line: sorted(shown[name]) for name, line in lines.items()},
            f"Row {shown['row']}, {shown['which']}: {shown['distance']:.2f}",
            x=Axis("models, by margin", "rank"), y=Axis("margin", "nats"),
            at=range(1, 1 + max(len(shown[name]) for name in lines)),
        )
        for shown in found["shown"]
    ]  # fmt: skip
