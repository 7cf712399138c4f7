"""Whether a model that forgot is still good for anything, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Stages = Mapping[str, Mapping[str, Mapping[str, float]]]  # of before and after, of groups of rows, measures

KEPT_SETS = {"retain": "retained rows", "validation": "validation rows"}  # which must not get worse
NATS, SHARE = 0.2, 0.1  # that they may lose by default: of language models, of the accuracy of classifiers
POOR = 0.8  # relative error of predictions beyond which a verdict warns of them
FORGOTTEN_NATS, FORGOTTEN_RIGHT = 0.02, 0.01  # changes below which nothing was forgotten
EXACT = ("retrain", "exact")  # methods after which no row that went has any part in the model
_NAMES = {"forget": "Forget set", "retain": "Retain set", "validation": "Validation set", "earlier": "Earlier requests"}


def retain_loss_bound(task: str, asked: float | None) -> float:
    """What `--max-retain-loss` comes to."""
    return asked if asked is not None else NATS if task == "causal-lm" else SHARE


def losses(task: str, stages: Stages, bound: float) -> dict[str, float]:
    """How much worse rows that are to be kept got, by group, where that is more than the bound: nats a token of a
    language model, else the share of accuracy that was lost."""
    found = {
        group: _loss(task, stages["before"][group], of) for group, of in stages["after"].items() if group in KEPT_SETS
    }
    return {group: loss for group, loss in found.items() if loss > bound}


def _loss(task: str, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    if task == "causal-lm":
        return after["nats"] - before["nats"]
    return (before["right"] - after["right"]) / max(before["right"], 1e-12)


def lost(task: str, damage: Mapping[str, float], bound: float) -> str:
    """The same in words."""
    if task == "causal-lm":
        each = ", ".join(f"{KEPT_SETS[group]} by {loss:.3f} nats a token" for group, loss in damage.items())
        return f"the model got worse on {each}, where {bound:g} are allowed"
    each = ", ".join(f"{KEPT_SETS[group]} by {loss:.1%} of its accuracy" for group, loss in damage.items())
    return f"the model got worse on {each}, where {bound:.1%} are allowed"


def figures_of(report: Mapping[str, Any]) -> str:
    """Before and after, by group of rows."""
    stages: Stages = report["quality_by_stage"]
    what = "token accuracy" if report.get("task") == "causal-lm" else "accuracy"
    parts = []
    for group, after in stages["after"].items():
        before = stages["before"].get(group, after)
        parts.append(
            f"{_NAMES.get(group, group)}: {what} {before['right']:.1%} -> {after['right']:.1%} "
            f"({before['nats']:.3f} -> {after['nats']:.3f} nats)."
        )
    return " ".join(parts)


def judgement(report: Mapping[str, Any]) -> str:
    """Good or bad, and why."""
    stages: Stages = report["quality_by_stage"]
    before, after = (stages[stage]["forget"] for stage in ("before", "after"))
    bad, doubts = list[str](), list[str]()
    if damage := report.get("damage"):
        bad.append(f"{lost(report['task'], damage['lost'], damage['bound'])} (kept as damage was allowed)")
    if back := _back(stages):
        bad.append(f"rows of earlier requests are known again ({back})")
    never = report.get("asked", {}).get("oracle", {}).get("forget")
    if report["method"] not in EXACT:
        if _known_as_before(before, after):
            if never is None or not _known_as_before(before, never):
                bad.append("nothing was forgotten, as the rows to forget are known as well as before")
        elif (reference := never or stages["after"].get("validation")) is not None:
            rest = reference["nats"] - after["nats"]
            if rest > 0.5 * (reference["nats"] - before["nats"]) > 0:
                which = "a model that never saw them knows them" if never else "rows never seen are known"
                doubts.append(f"less than half of it was forgotten ({after['nats']:.3f} nats; {which} at "
                              f"{reference['nats']:.3f})")  # fmt: skip
    if error := (report.get("scale", {}).get("held_out") or {}).get("error", 0.0):
        doubts += [f"predictions were poor on other deletions (relative error {error:.2f})"] if error > POOR else []
    if bad:
        return f"bad: {'; '.join(bad + doubts)}"
    kept = "no row that was to go has a part in the model" if report["method"] in EXACT else "the rows are known less"
    return f"good: {kept}, and what is retained is kept{'; but ' if doubts else ''}{'; '.join(doubts)}"


def _known_as_before(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    nats, right = after["nats"] - before["nats"], before["right"] - after["right"]
    return nats < FORGOTTEN_NATS and right < FORGOTTEN_RIGHT


def _back(stages: Stages) -> str | None:
    """Of rows that were forgotten before, where they are likelier again by more than retained rows may lose."""
    if "earlier" not in stages["after"]:
        return None
    before, after = (stages[stage]["earlier"]["nats"] for stage in ("before", "after"))
    return f"{before:.3f} -> {after:.3f} nats" if before - after > NATS else None


def verdict(report: Mapping[str, Any]) -> str:
    """The report in a few sentences: figures, then good or bad."""
    rows = report["rows"]
    if not rows["forget"]:
        return (
            f"Nothing of {rows['train']:,} rows was to be forgotten: the model is the same, byte for byte. "
            "Verdict: nothing was forgotten, as no row was chosen."
        )
    asked = f"{rows['forget']:,} of {rows['train']:,} rows were to be forgotten. {figures_of(report)}"
    if found := report.get("audit"):
        of, floor = found["table"], "oracles against oracles"
        asked += (
            f" KLoM on them is {of[report['method']]['forget']['p95']:.2f} at the 95th percentile, doing nothing "
            f"{of['do nothing']['forget']['p95']:.2f}, floor {of[floor]['forget']['p95']:.2f}."
        )
    return f"{asked} Verdict: {judgement(report)}."
