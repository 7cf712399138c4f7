"""Whether a model that forgot is still good for anything, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.report.html import Verdict

Stages = Mapping[str, Mapping[str, Mapping[str, float]]]  # of before and after, of groups of rows, measures

KEPT_SETS = {"retain": "retained rows", "validation": "validation rows"}  # which must not get worse
NATS, SHARE = 0.2, 0.1  # that they may lose by default: of language models, of the accuracy of classifiers
POOR = 0.8  # relative error of predictions beyond which a verdict warns of them
FORGOTTEN_NATS, FORGOTTEN_RIGHT = 0.02, 0.01  # changes below which nothing was forgotten
EXACT = ("retrain", "exact")  # methods after which no row that went has any part in the model
FLOOR = "oracles against oracles"  # of an audit: what KLoM is between models that are all as wanted
ORACLE = "oracle (retrained without the forget set)"
_NAMES = {"forget": "Forget set", "retain": "Retain set", "validation": "Validation set", "earlier": "Earlier requests"}


def retain_loss_bound(task: str, asked: float | None) -> float:
    """The bound of `--max-retain-loss`, by default 0.2 nats per token, or a tenth of accuracy."""
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
    """Describe groups of rows that got worse than they may."""
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


def judged(report: Mapping[str, Any]) -> tuple[str, str]:
    """Good, doubtful or bad, and why."""
    stages: Stages = report["quality_by_stage"]
    before, after = (stages[stage]["forget"] for stage in ("before", "after"))
    bad, doubts = list[str](), list[str]()
    if damage := report.get("damage"):
        bad.append(f"{lost(report['task'], damage['lost'], damage['bound'])} (kept as damage was allowed)")
    if back := _recovered(stages):
        bad.append(f"rows of earlier requests are recovered ({back})")
    oracle = report.get("asked", {}).get("oracle", {}).get("forget")
    if report["method"] not in EXACT:
        if _known_as_before(before, after):
            if oracle is None or not _known_as_before(before, oracle):
                bad.append("nothing was forgotten, as the forget set is known as well as before")
        elif (reference := oracle or stages["after"].get("validation")) is not None:
            rest = reference["nats"] - after["nats"]
            if rest > 0.5 * (reference["nats"] - before["nats"]) > 0:
                which = "the oracle is" if oracle else "validation rows are"
                doubts.append(f"less than half of it was forgotten ({after['nats']:.3f} nats; {which} at "
                              f"{reference['nats']:.3f})")  # fmt: skip
    scale = report.get("scale", {})
    if (error := (scale.get("held_out") or {}).get("error", 0.0)) and error > POOR:
        doubts.append(f"predictions were poor on other deletions (relative error {error:.2f})")
    if table := report.get("audit", {}).get("table"):
        doubts += _far_from_oracles(
            *(table[models]["forget"]["p95"] for models in (report["method"], "do nothing", FLOOR))
        )
    if scale and "raw" not in scale:
        doubts.append("predictions were not validated on other deletions")
    if bad:
        return "bad", f"Bad: {'; '.join(bad + doubts)}."
    exact = report["method"] in EXACT
    kept = "no row of the forget set has a part in the model" if exact else "the forget set is known less"
    if doubts:
        return "doubtful", f"Doubtful: {kept} and what is retained is kept, but {'; '.join(doubts)}."
    return "good", f"Good: {kept}, and what is retained is kept."


def _far_from_oracles(now: float, nothing: float, floor: float) -> list[str]:
    """A doubt where more than half of the distance from oracles is left that doing nothing leaves."""
    if now - floor <= 0.5 * (nothing - floor):
        return []
    return [f"models that forgot are told from oracles (KLoM {now:.2f}, of doing nothing {nothing:.2f})"]


def _known_as_before(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    nats, right = after["nats"] - before["nats"], before["right"] - after["right"]
    return nats < FORGOTTEN_NATS and right < FORGOTTEN_RIGHT


def _recovered(stages: Stages) -> str | None:
    """Of rows that were forgotten before, where they became likelier by more than retained rows may lose."""
    if "earlier" not in stages["after"]:
        return None
    before, after = (stages[stage]["earlier"]["nats"] for stage in ("before", "after"))
    return f"{before:.3f} -> {after:.3f} nats" if before - after > NATS else None


def unlearned_verdict(report: Mapping[str, Any]) -> Verdict:
    """Judge an unlearning: on the forget set, on retained rows, and on the predictions that were matched."""
    rows = report["rows"]
    if not rows["forget"]:
        return Verdict(
            "doubtful", "Nothing was forgotten, as no row was chosen.",
            f"0 of {rows['train']:,} rows were to be forgotten: the model is the same, byte for byte.",
        )  # fmt: skip
    told = f"{rows['forget']:,} of {rows['train']:,} rows were to be forgotten. {figures_of(report)}"
    if found := report.get("audit"):
        of = found["table"]
        told += (
            f" KLoM of the forget set is {of[report['method']]['forget']['p95']:.2f} at the 95th percentile, of doing "
            f"nothing {of['do nothing']['forget']['p95']:.2f}, of oracles against each other "
            f"{of[FLOOR]['forget']['p95']:.2f}."
        )
    return Verdict(*judged(report), told)


# Shares of the forgotten knowledge that an audit finds recovered. A tenth is what the gate of `quantize` lets pass by
# default (--recovery-threshold); beyond a half more is recovered than stays forgotten.
GOOD_RECOVERED, POOR_RECOVERED = 0.1, 0.5
AS_THEY_ARE = ("float", "as it is")  # forms that are not quantized by the audit


def audited_verdict(report: Mapping[str, Any]) -> Verdict:
    """Judge an audit: the share of forgotten knowledge left in floats, and the largest share recovered in fewer
    bits, by the probability of a token."""
    shares = {form: of["probability"] for form, of in report["recovery"].items() if of["probability"] is not None}
    if not shares:
        return Verdict(
            "doubtful", "Not judged: the original knows no more of the forget set than the oracle, so nothing can be "
            "recovered.", "",
        )  # fmt: skip
    here = [share for form, share in shares.items() if form in AS_THEY_ARE]
    fewer = {form: share for form, share in shares.items() if form not in AS_THEY_ARE}
    told = [f"{max(share, 0):z.0%} of the forgotten knowledge is left as the model is" for share in here]
    if fewer:
        worst = max(fewer, key=lambda form: fewer[form])
        told.append(f"at most {max(fewer[worst], 0):z.0%} ({worst}) is recovered in fewer bits")
    share = max(shares.values())
    level = "good" if share <= GOOD_RECOVERED else "doubtful" if share <= POOR_RECOVERED else "bad"
    grade = {"good": "Good", "doubtful": "Noticeable recovery", "bad": "Bad"}[level]
    return Verdict(
        level,
        f"{grade}: {', and '.join(told)}.",
        f"By the probability of a token; 0% is an {ORACLE}, 100% the original.",
    )
