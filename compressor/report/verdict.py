"""Whether an output of a compression is still good, in words: one function a job, for the console and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.report.html import Report, Verdict, format_number
from compressor.report.common import recovered_phrase

# Share of held-out positions whose most likely token is another than the reference's. Greedy decoding parts from the
# reference after 1 / share tokens on average: twenty are a sentence, four are no phrase. Beyond a half the job fails
# (compressor.engine.damage).
GOOD_CHANGED, POOR_CHANGED = 0.05, 0.25
# KL from the reference, nats per token. On text that the reference writes, perplexity rises by the factor exp(KL): by 5%
# and by 35%.
GOOD_KL, POOR_KL = 0.05, 0.3
# Perplexity of a student over its teacher's, less one. A student is smaller, so more is granted than to rounding: 10% is
# about what the next smaller model of a family loses, and at one and a half times it has lost its teacher's quality.
GOOD_EXCESS, POOR_EXCESS = 0.1, 0.5
# What a classifier may lose of accuracy, F1 or correlation (of 1): one in a hundred answers is within the chance of a
# usual held-out set (sqrt(0.9 * 0.1 / 1000) = 0.0095), one in twenty is seen in use.
GOOD_LOST, POOR_LOST = 0.01, 0.05
# KL from the teacher at which a student began as its teacher (nats): what rounding to 16 bits costs, and no way to go.
AT_TEACHER = 1e-3
MANY_ROWS = 128  # the default of `quantize --samples`

_GRADES = {"good": "Good", "doubtful": "Noticeable loss", "bad": "Large loss"}
_LEVELS = tuple(_GRADES)


def level_of(*measured: tuple[float, float, float]) -> str:
    """The worst of (value, up to which it is good, beyond which it is bad). What is no number is bad."""
    return _LEVELS[max(0 if value <= good else 1 if value <= bad else 2 for value, good, bad in measured)]


def likeness(quality: Mapping[str, Any]) -> tuple[str, str]:
    """Level and phrase of a language model beside the one it was made from."""
    changed, kl = 1 - quality["top1_agreement"], quality["kl"]
    level = level_of((changed, GOOD_CHANGED, POOR_CHANGED), (kl, GOOD_KL, POOR_KL))
    return level, f"{_GRADES[level]}: {changed:z.1%} of top tokens changed, KL {small_kl(kl)} nats"


def small_kl(kl: float) -> str:
    """What is below the last digits of single precision is not shown, nor its sign."""
    return f"{kl:.2g}" if not kl < 1e-6 else "less than 1e-6"


def quantized_verdict(report: Report) -> Verdict:
    """Of a quantization: against the float model."""
    quality, size, stages = report["quality"], report["bytes"], report["quality_by_stage"]
    level, phrase = likeness(quality)
    tuned = f", {stages['rounded']['perplexity']:.3f} before tuning" if "tuned" in stages else ""
    worse = quality["perplexity"] / quality["reference_perplexity"] - 1
    return _unless_damaged(report, level, f"{phrase}{_advice(report) if level != 'good' else ''}.", (
        f"{format_number(size['before'] / 1e6)} MB became {format_number(size['after'] / 1e6)} MB; perplexity on "
        f"{quality['tokens']:,} held-out tokens went from {quality['reference_perplexity']:.3f} to "
        f"{quality['perplexity']:.3f} ({worse:+z.1%}{tuned}){recovered_phrase(report)}."
    ))  # fmt: skip


def _advice(report: Report) -> str:
    """What usually helps, of what was not done."""
    rows = report.get("data", {}).get("calibration", {}).get("rows", MANY_ROWS)
    more = [*(["more rows"] if rows < MANY_ROWS else []), *([] if "learn" in report.get("curves", {}) else ["learning"])]
    if not more:
        return "; more bits, or smaller groups, usually help"
    return f"; {rows:,} calibration rows were used, {' or '.join(more)} usually help{'' if len(more) > 1 else 's'}"


def distilled_verdict(report: Report) -> Verdict:
    """Of a distillation: against the teacher, and against where the student began."""
    before, after = (report["quality_by_stage"][when] for when in ("before", "after"))
    changed, excess = 1 - after["top1_agreement"], after["perplexity"] / after["reference_perplexity"] - 1
    level = level_of((excess, GOOD_EXCESS, POOR_EXCESS))
    beside = f"perplexity is {abs(excess):.1%} {'above' if excess > 0 else 'below'} the teacher's"
    if excess > 1:
        beside = f"perplexity is {1 + excess:.1f} times the teacher's"
    steps = max((len(curve) for curve in report["curves"].values()), default=0)
    rows = report.get("data", {}).get("training", {}).get("rows")
    done = f"{steps:,} steps were trained" + ("" if rows is None else f" on {rows:,} rows")
    advice = "" if level == "good" else f"; {done}, more usually help"
    if before["kl"] < AT_TEACHER:
        way = f"the student began at its teacher (KL {small_kl(before['kl'])} nats) and ended {small_kl(after['kl'])} from it"
    else:
        closed = f" ({1 - after['kl'] / before['kl']:.0%} of the way)" if 0 < after["kl"] < before["kl"] else ""
        way = f"the KL from the teacher went from {before['kl']:.3f} to {after['kl']:.3f} nats{closed}"
    return _unless_damaged(
        report, level, f"{_GRADES[level]}: {beside}, and {changed:z.1%} of top tokens differ{advice}.", (
            f"{_sizes(report)}; on {after['tokens']:,} held-out tokens {way}, perplexity from "
            f"{before['perplexity']:.3f} to {after['perplexity']:.3f} (teacher {after['reference_perplexity']:.3f})"
            f"{recovered_phrase(report)}."
        ),
    )  # fmt: skip


def _sizes(report: Report) -> str:
    return f"{report['parameters']['teacher']:,} parameters became {report['parameters']['student']:,}"


# Of a classifier: by the first of these that it has. A name, what it is called, and what is told beside it.
_ANSWERS = (
    ("pearson", "the Pearson correlation", "mse", "the mean squared error"),
    ("f1_micro", "micro F1", "f1_macro", "macro F1"),
    ("accuracy", "accuracy", "ece", "the calibration error"),
)


def classified_verdict(report: Report) -> Verdict:
    """Of a classifier's distillation: against the teacher, on labels."""
    stages = [report["quality_by_stage"][when] for when in ("teacher", "before", "after")]
    name, text, other, other_text = next(answer for answer in _ANSWERS if answer[0] in stages[2])
    teacher, _, after = (stage[name] for stage in stages)
    level = level_of((teacher - after, GOOD_LOST, POOR_LOST))
    beside = f"{abs(teacher - after):.3f} {'below' if after < teacher else 'above'} the teacher's"
    told = [
        f"{what} went from {stages[1][key]:.3g} to {stages[2][key]:.3g} (teacher {stages[0][key]:.3g})"
        for key, what in ((name, text), (other, other_text))
    ]
    return _unless_damaged(
        report, level, f"{_GRADES[level]}: {text} is {after:.3f}, {beside}.",
        f"{_sizes(report)}; on {stages[2]['rows']:,} held-out rows {', '.join(told)}.",
    )  # fmt: skip


def exported_verdict(report: Report) -> Verdict:
    """Of an export: as its runtime runs it, against what it was made from."""
    size, quality = report["bytes"], report.get("quality")
    sentence = (
        f"{format_number(size['before'] / 1e6)} MB became {format_number(size['after'] / 1e6)} MB, "
        f"{report['bits_per_weight']:.3g} bits per weight of the linears"
    )
    if quality is None:
        figures = f"{sentence}{recovered_phrase(report)}."
        return Verdict("doubtful", f"Not judged: not run, as {report['not_run']}.", figures)
    level, phrase = likeness(quality)
    worse = quality["perplexity"] / quality["reference_perplexity"] - 1
    return _unless_damaged(report, level, f"{phrase}.", (
        f"{sentence}; run by {report['runtime']} on {quality['tokens']:,} held-out tokens, perplexity went from "
        f"{quality['reference_perplexity']:.3f} to {quality['perplexity']:.3f} ({worse:+z.1%}){recovered_phrase(report)}."
    ))  # fmt: skip


def _unless_damaged(report: Report, level: str, judgment: str, figures: str) -> Verdict:
    if (found := report.get("damage", {}).get("found")) is not None:
        return Verdict("bad", f"Bad: {found}; written all the same, as --allow-damage was given.", figures)
    return Verdict(level, judgment, figures)
