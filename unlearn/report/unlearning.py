"""The page of an unlearning's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.report.charts import grid, legend, lines
from calib.report.html import (
    HERE,
    OWN_LINES,
    VLLM_LINES,
    about,
    as_json,
    curves,
    document,
    downloads,
    format_number,
    heading,
    loading,
    recipe,
    section,
    table,
    transformers_lines,
)
from unlearn.report.verdict import verdict

MEASURES = {
    "nats": "nats a decision",
    "right": "decisions that are right",
    "extraction": "extraction strength",
    "min_k_auc": "attack by least likely tokens (AUC; 0.5: blind)",
}

FACTS = "Facts: probability a token of the description given the name, and reversed"

_LIBRARY = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
_STATE = f"""\
from safetensors.torch import load_file

# module: what the factory makes
module.load_state_dict(load_file("{HERE}/model.safetensors"))"""


def unlearned_page(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]] = ()) -> str:
    """For a report as `unlearn` makes it; `steps` are its recipe's."""
    stages = report["quality_by_stage"]
    columns = dict(stages)
    asked = report.get("asked", {})
    if "oracle" in asked:
        columns["never saw it"] = asked["oracle"]
    rows = [
        (f"{group}: {text}", *(format_number(of.get(group, {}).get(measure)) for of in columns.values()))
        for group in stages["after"] for measure, text in MEASURES.items() if measure in stages["after"][group]
    ]  # fmt: skip
    if size := report.get("bytes"):
        rows.append(("megabytes of weights", *(format_number(size[s] / 1e6) if s in size else "" for s in columns)))
    model = f"parewell · {steps[-1]['model']['name']}, unlearned" if steps else "parewell · unlearned"
    head = heading(model, f"Unlearned: {report['method']}", verdict(report))
    parts = [
        section("Before and after"),
        table(("", *columns), rows),
        *(about(f"{note[:1].upper()}{note[1:]}.") for note in report.get("notes", [])),
    ]
    if rate := report.get("rate"):
        parts += [section("Learning rate"), _rate(rate)]
    if quality := asked.get("forget_quality"):
        parts += [
            section("Forget quality"),
            about(
                "p-value of truth ratios against those of the model that never saw the rows (Kolmogorov and Smirnov); "
                "near 0: told apart."
            ),
            table(("", *quality), [("p", *(format_number(p) for p in quality.values()))]),
        ]
    if leak := asked.get("privacy_leak"):
        parts += [
            section("Privacy leak"),
            about(
                "The attack on the least likely tokens beside that on the model that never saw the rows, in percent "
                "(MUSE's PrivLeak): below 0 they are still recognised, above 0 they stand out by being avoided."
            ),
            table(("", *leak), [("%", *(format_number(v) for v in leak.values()))]),
        ]
    for name, title in (("utility", "Utility: questions that should still be answered"), ("facts", FACTS)):
        if found := asked.get(name):
            measures = next(iter(found.values()))
            rows = [(measure, *(format_number(of[measure]) for of in found.values())) for measure in measures]
            parts += [section(title), table(("", *found), rows)]
    if scale := report.get("scale"):
        parts += [section("How good predictions are"), _scale(scale)]
    if found := report.get("audit"):
        parts += [section("How far from models that never saw the rows"), _audit(found)]
    parts += [curves(report.get("curves", {})), loading(_lines_of(report["task"])), recipe(steps), downloads()]
    return document(f"parewell: {report['method']}", head, parts, {"report.json": as_json(report)})


def _lines_of(task: str) -> dict[str, str]:
    if task not in _LIBRARY:
        return {"Python": _STATE}
    found = {"transformers": transformers_lines(_LIBRARY[task])}
    if task == "causal-lm":
        found |= {"vLLM (a plain checkpoint; not tried here)": VLLM_LINES, "Python": OWN_LINES}
    return found


def unlearned_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """By what they are called when two outputs are compared."""
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


def _rate(rate: Mapping[str, Any]) -> str:
    rows = [(f"{of['lr']:g}", "no number" if of["nats"] is None else format_number(of["nats"])) for of in rate["tried"]]
    return about(
        f"{rate['lr']:g}: the largest that was tried after {rate['steps']} steps of which the nats of {rate['rows']} "
        f"retained rows, {format_number(rate['before'])} before, rose by less than {format_number(rate['bound'])}; "
        "else the least. These rows are not among those measured above."
    ) + table(("rate", "nats after"), rows)


def _scale(scale: Mapping[str, Any]) -> str:
    own, others = format_number(scale["own"]), format_number(scale["others"])
    sentence = f"Predictions are multiplied by {own} on rows that go, by {others} elsewhere"
    if "raw" not in scale:
        bounded = f"{scale['bounded']:.1%} of decisions" if "bounded" in scale else "none"
        return about(
            f"{sentence}; this was not checked on other deletions. A change is at most as large as the range of the "
            f"row's own logits, to which {bounded} had to be scaled down."
        )
    names = {
        "score": "linear datamodeling score",
        "slope": "slope of truth on prediction",
        "cosine": "cosine",
        "error": "relative error",
    }
    rows = [
        (text, format_number(scale["raw"][name]), format_number(scale["held_out"][name]))
        for name, text in names.items()
    ]
    return about(f"{sentence}, as fitted to deletions of rows that belong together.") + table(
        ("on deletions that were held out", "as predicted", "scaled by the others"), rows
    )


def _audit(found: Mapping[str, Any]) -> str:
    groups = list(next(iter(found["table"].values())))
    rows = [
        (
            name,
            *(f"{of[g]['p95']:.2f} ({of[g]['mean']:.2f})" for g in groups),
            *(f"{of[g]['gaussian_p95']:.2f} ({of[g]['gaussian_mean']:.2f})" for g in groups),
            format_number(of["forget"]["attack"]),
        )
        for name, of in found["table"].items()
    ]
    head = ("models", *groups, *(f"{g}, Gaussian" for g in groups), "attack")
    drawn = [
        lines(
            {name: sorted(shown[name]) for name in ("oracles", "unlearned")},
            f"Row {shown['row']}, {shown['which']}: {shown['distance']:.2f}",
            unit="models, by margin",
            first=1,
        )
        for shown in found["shown"]
    ]
    return "".join(
        [
            about(
                f"KLoM, 95th percentile (mean), {found['models']} models a side, {found['estimator']}; and how often "
                "an attacker tells a model from one that never saw a row (0.5: not at all)."
            ),
            table(head, rows, sortable=True),
            "<h3>Margins of rows to forget</h3>",
            legend(("oracles", "unlearned")),
            grid(drawn),
        ]
    )
