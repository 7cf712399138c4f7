"""Whether an output of a compression is still good, in words: a function for each job, for the console and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.report.html import Report, Verdict, format_number
from compressor.report.common import recovered_phrase

# Share of held-out positions whose most likely token is another than the reference's. Greedy decoding leaves the
# reference's text after 1 / share tokens on average: twenty are a sentence, four are no phrase. Beyond a half the job
# fails (compressor.engine.damage).
GOOD_CHANGED, POOR_CHANGED = 0.05, 0.25
# KL from the reference, nats per token. On text that the reference writes, perplexity rises by the factor exp(KL): 5%,
# and 35%.
GOOD_KL, POOR_KL = 0.05, 0.3
# Perplexity of a student over its teacher's, less one. A student is smaller, so more is granted than to rounding: 0.1
# nats per token (ln 1.1) are twice GOOD_KL; 0.4 (ln 1.5) are more than POOR_KL.
GOOD_EXCESS, POOR_EXCESS = 0.1, 0.5
# What a classifier may lose of accuracy, F1 or correlation (of 1): one answer in a hundred is within the standard error
# of a usual held-out set (sqrt(0.9 * 0.1 / 1000) = 0.0095), one in twenty is five of them.
GOOD_LOST, POOR_LOST = 0.01, 0.05
# 1 - cosine of an embedding with the float model's, and 1 - rank correlation of the cosines of pairs. What two texts'
# cosine may change by is about the root of twice the first: 0.14 and 0.45.
GOOD_TURNED, POOR_TURNED = 0.01, 0.1
_ORDER = 0.02, 0.1
# KL from the teacher, nats, below which a student began as its teacher: 16-bit storage alone costs about 1e-4.
AT_TEACHER = 1e-3
MANY_ROWS = 128  # the default of `quantize --samples`

_GRADES = {"good": "Good", "doubtful": "Noticeable loss", "bad": "Large loss"}


def level_of(*measured: tuple[float, float, float]) -> str:
    """The worst of (value, up to which it is good, beyond which it is bad). What is no number is bad."""
    return list(_GRADES)[max(0 if value <= good else 1 if value <= poor else 2 for value, good, poor in measured)]


def small_kl(kl: float) -> str:
    """Format a KL; what single precision cannot tell from zero is "less than 1e-6"."""
    return f"{kl:.2g}" if not kl < 1e-6 else "less than 1e-6"


def quantized_verdict(report: Report) -> Verdict:
    """Judge a quantization against the float model."""
    stages = report["quality_by_stage"]
    if "cosine" in report["quality"]:
        return _embedding_verdict(report)
    level, likeness = _likeness(report["quality"])
    tuned = f", {stages['rounded']['perplexity']:.3f} before tuning" if "tuned" in stages else ""
    rows = report.get("data", {}).get("calibration", {}).get("rows", MANY_ROWS)
    more = ["more rows"] * (rows < MANY_ROWS) + ["tuning"] * (not report.get("curves") and "blocks" not in report)
    used = f"{rows:,} calibration rows were used, {' or '.join(more)} usually help{'s' * (more == ['tuning'])}"
    advice = "" if level == "good" else f"; {used if more else 'more bits, or smaller groups, usually help'}"
    figures = f"{_megabytes(report)}; {_perplexity(report, tuned)}."
    return _unless_damaged(report, level, f"{likeness}{advice}.", figures)


def _embedding_verdict(report: Report) -> Verdict:
    """Judge a quantized embedding model against the float one."""
    quality = report["quality"]
    cosine, alike = quality["cosine"], quality["rank_correlation"]
    level = level_of((1 - cosine, GOOD_TURNED, POOR_TURNED), (1 - (1 if alike is None else alike), *_ORDER))
    ranks = "" if alike is None else f", pairs of texts keep their order with a rank correlation of {alike:.4f}"
    judgment = f"{_GRADES[level]}: the mean cosine with the float model's embeddings is {cosine:.4f}{ranks}."
    return _unless_damaged(report, level, judgment, f"{_megabytes(report)}; on {quality['rows']:,} held-out texts.")


def exported_verdict(report: Report) -> Verdict:
    """Judge an export, as its runtime runs it, against the model that it was made from."""
    size = f"{_megabytes(report)}, {report['bits_per_weight']:.3g} bits per weight of the linears"
    if "quality" not in report:
        judgment = f"Not judged: not run, as {report['not_run']}."
        return Verdict("doubtful", judgment, f"{size}{recovered_phrase(report)}.")
    level, likeness = _likeness(report["quality"])
    return _unless_damaged(report, level, f"{likeness}.", f"{size}; run by {report['runtime']}, {_perplexity(report)}.")


def _likeness(quality: Mapping[str, Any]) -> tuple[str, str]:
    """Level and phrase of a language model beside the one it was made from."""
    changed, kl = 1 - quality["top1_agreement"], quality["kl"]
    level = level_of((changed, GOOD_CHANGED, POOR_CHANGED), (kl, GOOD_KL, POOR_KL))
    return level, f"{_GRADES[level]}: {changed:z.1%} of top tokens changed, KL {small_kl(kl)} nats"


def _megabytes(report: Report) -> str:
    return " MB became ".join(format_number(report["bytes"][when] / 1e6) for when in ("before", "after")) + " MB"


def _perplexity(report: Report, more: str = "") -> str:
    quality = report["quality"]
    before, after = quality["reference_perplexity"], quality["perplexity"]
    return (
        f"perplexity on {quality['tokens']:,} held-out tokens went from {before:.3f} to {after:.3f} "
        f"({after / before - 1:+z.1%}{more}){recovered_phrase(report)}"
    )


def distilled_verdict(report: Report) -> Verdict:
    """Judge a distillation against the teacher, and against the student before training."""
    if "on_policy" in report:
        return _rewarded_verdict(report)
    before, after = (report["quality_by_stage"][when] for when in ("before", "after"))
    excess = after["perplexity"] / after["reference_perplexity"] - 1
    level = level_of((excess, GOOD_EXCESS, POOR_EXCESS))
    beside = f"{abs(excess):.1%} {'above' if excess > 0 else 'below'} the teacher's"
    beside = f"{1 + excess:.1f} times the teacher's" if excess > 1 else beside
    steps = max((len(curve) for curve in report["curves"].values()), default=0)
    rows = report.get("data", {}).get("training", {}).get("rows")
    written = report.get("written_rows")
    of = "" if rows is None else f" on {rows:,} rows" + (f" and {written:,} that the teacher wrote" if written else "")
    trained = f"; {steps:,} steps were trained{of}, more usually help"
    way = f"the KL from the teacher went from {before['kl']:.3f} to {after['kl']:.3f} nats"
    if before["kl"] < AT_TEACHER:
        way = f"the student began at its teacher and is now {small_kl(after['kl'])} nats of KL from it"
    elif 0 < after["kl"] < before["kl"]:
        way += f" ({1 - after['kl'] / before['kl']:.0%} of the way)"
    return _unless_damaged(
        report, level,
        f"{_GRADES[level]}: perplexity is {beside}, and {1 - after['top1_agreement']:z.1%} of top tokens differ"
        f"{'' if level == 'good' else trained}.",
        f"{_parameters(report)}; on {after['tokens']:,} held-out tokens {way}, perplexity from "
        f"{before['perplexity']:.3f} to {after['perplexity']:.3f} (teacher {after['reference_perplexity']:.3f})"
        f"{recovered_phrase(report)}.",
    )  # fmt: skip


def _rewarded_verdict(report: Report) -> Verdict:
    """Judge a student by the rewards of its answers."""
    figures = report["on_policy"]["figures"]
    teacher, before, after = (figures[when] for when in ("teacher", "before", "after"))
    if teacher["reward"] > 0:
        lost = (teacher["reward"] - after["reward"]) / teacher["reward"]
        level = level_of((lost, GOOD_LOST, POOR_LOST))
        beside = f"{abs(lost):.1%} {'below' if lost > 0 else 'above'} the teacher's"
    else:  # a share of nothing says nothing
        level = "good" if after["reward"] > max(before["reward"], teacher["reward"]) else "doubtful"
        beside = f"the teacher's {teacher['reward']:.3f}"
    several = max(after["pass_at"], key=int)
    return _unless_damaged(
        report, level, f"{_GRADES[level]}: the mean reward of its answers is {after['reward']:.3f}, {beside}.",
        f"{_parameters(report)}; on {after['prompts']:,} held-out prompts the mean reward went from "
        f"{before['reward']:.3f} to {after['reward']:.3f} (teacher {teacher['reward']:.3f}), pass@{several} from "
        f"{before['pass_at'][several]:.1%} to {after['pass_at'][several]:.1%}.",
    )  # fmt: skip


# Of a classifier: by the first of these that it has. A figure and its name, and one that is told beside it.
_ANSWERS = (
    ("pearson", "the Pearson correlation", "mse", "the mean squared error"),
    ("f1_micro", "micro F1", "f1_macro", "macro F1"),
    ("accuracy", "accuracy", "ece", "the calibration error"),
)


def classified_verdict(report: Report) -> Verdict:
    """Judge a classifier's distillation against the teacher, on labels."""
    teacher, before, after = (report["quality_by_stage"][when] for when in ("teacher", "before", "after"))
    name, text, other, other_text = next(answer for answer in _ANSWERS if answer[0] in after)
    lost = teacher[name] - after[name]
    level = level_of((lost, GOOD_LOST, POOR_LOST))
    told = [
        f"{what} went from {before[key]:.3g} to {after[key]:.3g} (teacher {teacher[key]:.3g})"
        for key, what in ((name, text), (other, other_text))
    ]
    return _unless_damaged(
        report, level,
        f"{_GRADES[level]}: {text} is {after[name]:.3f}, {abs(lost):.3f} {'below' if lost > 0 else 'above'} the "
        "teacher's.",
        f"{_parameters(report)}; on {after['rows']:,} held-out rows {', '.join(told)}.",
    )  # fmt: skip


def _parameters(report: Report) -> str:
    return f"{report['parameters']['teacher']:,} parameters became {report['parameters']['student']:,}"


def _unless_damaged(report: Report, level: str, judgment: str, figures: str) -> Verdict:
    if (found := report.get("damage", {}).get("found")) is not None:
        return Verdict("bad", f"Bad: {found}; written all the same, as --allow-damage was given.", figures)
    return Verdict(level, judgment, figures)
