"""What a report says beside its figures: what they rest on, what the method won, what was not kept or was allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from calib.report.html import (
    Report,
    about,
    format_number,
    section,
    table,
)

FEW_TOKENS = 2_000  # with fewer, another draw of rows may give quite other figures
_LEARNED = {
    "learn": ("Learning", "the transforms that it began with were kept"),
    "tune": ("Tuning", "scales and gains were kept as they were rounded"),
}


def notes(report: Report) -> list[str]:
    """Sentences, for the report of a language model that was quantized, distilled or exported."""
    return [
        *_damage(report), *_errors(report), *_nearest(report), *_not_kept(report), *_few(report), *cut_rows(report),
    ]  # fmt: skip


def cut_rows(report: Report) -> Iterator[str]:
    """Texts that were longer than a row, of any job's data."""
    for name, of in report.get("data", {}).items():
        if isinstance(of, Mapping) and of.get("cut_rows"):
            lost = f", {of['cut_tokens']:,} tokens in all" if "cut_tokens" in of else ""
            kind = name.replace("_", "-")
            yield f"{of['cut_rows']:,} texts of the {kind} data were longer than --length and were cut{lost}."


def _damage(report: Report) -> Iterator[str]:
    if (found := report.get("damage", {}).get("found")) is not None:
        yield f"Damaged, as was allowed: {found}."


def _errors(report: Report) -> Iterator[str]:
    quality = report.get("quality", {})
    if (error := quality.get("perplexity_error")) is not None:
        kl = quality.get("kl_error")
        yield (
            f"Over {quality['tokens']:,} held-out tokens the standard error of the perplexity is {error:.2g}"
            + (f", of the KL {kl:.2g} nats (by rows)." if kl is not None else " (by rows).")
        )


def _nearest(report: Report) -> Iterator[str]:
    """What the method won."""
    stages = report.get("quality_by_stage", {})
    if "nearest" in stages:
        nearest, quality = stages["nearest"], report["quality"]
        yield (
            f"Rounding to nearest in the same bits, without transforms or calibration, costs {nearest['kl']:.3g} nats "
            f"of KL (perplexity {nearest['perplexity']:.3f}); this costs {quality['kl']:.3g}."
        )


def _not_kept(report: Report) -> Iterator[str]:
    for name, found in report.get("checks", {}).items():
        if not found["kept"]:
            what, instead = _LEARNED[name]
            yield (
                f"{what} ended worse than it began on {found['rows']} calibration rows ({found['tokens']:,} tokens) "
                f"kept back from it, {found['before']:.4g} -> {found['after']:.4g} nats, so {instead}."
            )


def _few(report: Report) -> Iterator[str]:
    tokens = report.get("quality", {}).get("tokens", FEW_TOKENS)
    yield from few_tokens(tokens, "Figures", "--held-out")
    if "precision" in report:
        yield from few_tokens(report["precision"]["tokens"], "The bits that parts got", "--profile-rows")
    if "samples" in report and tokens < FEW_TOKENS:
        yield "Whether more calibration rows would help rests on the same held-out tokens."


def few_tokens(tokens: int, what: str, option: str) -> Iterator[str]:
    if tokens < FEW_TOKENS:
        yield (
            f"{what} rest on {tokens:,} tokens, fewer than {FEW_TOKENS:,}: other rows may give quite other ones; take "
            f"more ({option})."
        )


KNOWN = {"probability": "probability of a token", "right": "decisions that are right", "extraction": "extraction"}


def recovered_section(report: Report) -> list[str]:
    """What a gate measured, where there was one."""
    if "recovery" not in report:
        return []
    found = report["recovery"]
    limit = "any may" if found["threshold"] is None else f"at most {found['threshold']:.0%} may"
    parts = [
        section("Recovered after quantization"),
        about(
            "What the model knows of the forget set: before and after unlearning, and now. The share is of the "
            f"knowledge that unlearning removed, beyond what a model retrained without the rows has; {limit} recover."
        ),
    ]
    for one in found["unlearnings"]:
        rows = [
            (text, *(format_number(of.get(measure)) for of in one["known"].values()),
             f"{one['back'][measure]:.1%}" if measure in one["back"] else "–")
            for measure, text in KNOWN.items()
        ]  # fmt: skip
        stages = ("now" if stage == "quantized" else stage for stage in one["known"])
        parts.append(table(("", *stages, "recovered"), rows))
    return parts


def recovered_phrase(report: Report) -> str:
    """Of what was forgotten, in a sentence."""
    return (
        f"; {report['recovery']['worst']:.0%} of the forgotten knowledge is recovered" if "recovery" in report else ""
    )
