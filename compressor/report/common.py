"""What stands beside a report's figures: warnings, what they rest on, what the method gained, what was recovered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from calib.report.html import Report, Steps, Table, described_steps, done_to, load_lines

FEW_TOKENS = 2_000  # with fewer, another draw of rows may give quite other figures
_ORACLE = "oracle (retrained without the forget set)"
_LEARNED = {
    "learn": ("Learning", "the transforms that it began with were kept"),
    "tune": ("Tuning", "codes, scales and gains were kept as they were rounded"),
}


def notes(report: Report) -> list[str]:
    """Sentences for the report of a language model that was quantized, distilled or exported; warnings first."""
    return [*warnings(report), *remarks(report)]


def warnings(report: Report) -> list[str]:
    """Why figures or weights are to be taken with care."""
    return [*_damage(report), *_not_kept(report), *_few(report), *cut_rows(report)]


def remarks(report: Report) -> list[str]:
    """The errors of figures, and what the method gained."""
    return [
        *_errors(report),
        *_told_apart(report),
        *_nearest(report),
        *_starts(report),
        *_within_budget(report),
        *_blocks(report),
        *_codes_changed(report),
    ]


def cut_rows(report: Report) -> Iterator[str]:
    """Texts that were longer than a row, of any job's data."""
    for name, of in report.get("data", {}).items():
        if isinstance(of, Mapping) and of.get("cut_rows"):
            lost = f", {of['cut_tokens']:,} tokens in all" if "cut_tokens" in of else ""
            kind = name.replace("_", "-")
            yield f"{of['cut_rows']:,} texts of the {kind} data were longer than --length and were cut{lost}."


def _blocks(report: Report) -> Iterator[str]:
    """What tuning of blocks on their own outputs did."""
    blocks = [one for one in report.get("blocks", ()) if one is not None]
    if not blocks:
        return
    measured, worse = [one for one in blocks if one["before"] is not None], sum(not one["kept"] for one in blocks)
    fell = ""
    if measured:
        means = (sum(one[when] if one["kept"] else one["before"] for one in measured) / len(measured)
                 for when in ("before", "after"))  # fmt: skip
        fell = " on rows kept back their squared error, every token in units of its energy, fell from {:.3g} to {:.3g}"
        fell = f"{fell.format(*means)} of what they add,"
    changed = sum(one["codes_changed"] for one in blocks) / len(blocks)
    yield (
        f"Blocks were tuned on their own outputs:{fell} {changed:.1%} of codes are others than they were rounded to"
        + (f"; {worse} of {len(blocks)} were better as they were rounded." if worse else ".")
    )


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


def _told_apart(report: Report) -> Iterator[str]:
    """What the distance from the reference means to a reader."""
    quality = report.get("quality", {})
    if (rate := quality.get("tell_apart")) is not None and "tokens" in quality:
        error, tokens = quality.get("tell_apart_error"), quality.get("tokens_to_tell")
        yield (
            "Shown one token, an optimal observer who knows this model and its reference names the writer "
            f"in {rate:.1%} of cases{'' if error is None else f' ± {error:.1%}'} (tell-apart rate; 50% is guessing), "
            + ("and never does better." if tokens is None else f"and is 95% sure after about {tokens:,} tokens.")
        )


def tell_apart_rows(*figures: Report) -> list[tuple[str, ...]]:
    """Rows of a table: how surely an optimal observer tells a model with these `figures` from its reference, after what
    it is of the reference itself. None of old reports, which do not have it."""
    if any(of.get("tell_apart") is None for of in figures):
        return []
    tokens = ["never" if (n := of.get("tokens_to_tell")) is None else f"{n:,}" for of in figures]
    return [
        ("tell-apart rate, one token", "50%", *(f"{of['tell_apart']:.1%}" for of in figures)),
        ("tokens until an optimal observer is 95% sure", "never", *tokens),
    ]


def _nearest(report: Report) -> Iterator[str]:
    """What the method gained."""
    stages = report.get("quality_by_stage", {})
    if "nearest" in stages:
        nearest, quality = stages["nearest"], report["quality"]
        if "cosine" in quality:
            yield (
                "Rounded to nearest in the same bits, without transforms or calibration, embeddings have a mean cosine "
                f"of {nearest['cosine']:.4f} with the float model's; these {quality['cosine']:.4f}."
            )
            return
        yield (
            f"Rounding to nearest in the same bits, without transforms or calibration, costs {nearest['kl']:.3g} nats "
            f"of KL (perplexity {nearest['perplexity']:.3f}); this costs {quality['kl']:.3g}."
        )


def _starts(report: Report) -> Iterator[str]:
    if starts := report.get("starts"):
        better, other = sorted(starts, key=starts.__getitem__)
        names = {"none": "no transforms", "hadamard": "Hadamards"}
        yield (
            f"It began from {names[better]}, rather than {names[other]}: rounded on a few rows, that came to a KL of "
            f"{starts[better]:.3g} against {starts[other]:.3g} on calibration rows kept back."
        )


def _within_budget(report: Report) -> Iterator[str]:
    if "budget" in report:
        found = report["budget"]
        yield (
            f"{found['asked']} had time for {found['block_steps']} steps of tuning of each block and "
            f"{found['tune_steps']} of the whole model."
        )


def _codes_changed(report: Report) -> Iterator[str]:
    tuned = report.get("checks", {}).get("tune", {})
    if tuned.get("kept") and "codes_changed" in tuned:
        yield f"Tuning gave {tuned['codes_changed']:.2%} of the codes another level."
    if tuned.get("kept") and "best" in tuned:
        yield (
            f"Tuning is used as it was after {tuned['best']} steps, where it was best on {tuned['rows']} calibration "
            "rows kept back from it."
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
        yield from few_tokens(report["precision"]["tokens"], "Bit widths", "--profile-rows")
    if "samples" in report and tokens < FEW_TOKENS:
        yield "The estimate of what more calibration rows would gain rests on the same held-out tokens."


def few_tokens(tokens: int, what: str, option: str) -> Iterator[str]:
    """A warning about figures that rest on few tokens; nothing where there are enough."""
    if tokens < FEW_TOKENS:
        yield (
            f"{what} rest on {tokens:,} tokens, fewer than {FEW_TOKENS:,}: with other rows they may differ a lot; "
            f"take more ({option})."
        )


KNOWN = {"probability": "probability of a token", "right": "accuracy", "extraction": "extraction strength"}
_STAGES = {"never saw it": _ORACLE, "oracle": _ORACLE, "quantized": "now"}  # old recipes have the first


def recovered(report: Report) -> dict[str, Any] | None:
    """Data of what a gate measured, if there was one: its limit, and a table for each unlearning."""
    if "recovery" not in report:
        return None
    limit = report["recovery"]["threshold"]
    tables: list[Table] = []
    for one in report["recovery"]["unlearnings"]:
        rows = [
            (text, *(of.get(measure) for of in one["known"].values()),
             f"{one['back'][measure]:z.1%}" if measure in one["back"] else None)
            for measure, text in KNOWN.items()
        ]  # fmt: skip
        tables.append((("", *(_STAGES.get(stage, stage) for stage in one["known"]), "recovered"), rows))
    return {"limit": "any share may" if limit is None else f"at most {limit:.0%} may", "tables": tables}


def recovered_phrase(report: Report) -> str:
    """How much of what was forgotten the job recovered, to end a sentence; less than an oracle knows is nothing."""
    if "recovery" not in report:
        return ""
    return f"; {max(report['recovery']['worst'], 0):z.0%} of the forgotten knowledge is recovered"


def page_data(report: Report, steps: Steps, done: str) -> dict[str, Any]:
    """Data that the pages of all jobs here share: heading, warnings, notes, recovered knowledge, recipe."""
    return {
        "eyebrow": done_to(steps, done), "warnings": warnings(report), "notes": remarks(report),
        "recovered": recovered(report), "steps": described_steps(steps),
        "load_notes": [f"Note: {note}" for note in report.get("loaders", {}).get("notes", [])],
    }  # fmt: skip


def quantized_lines(served: Mapping[str, Any]) -> dict[str, str]:
    """How a quantized folder is loaded, by the loaders that run it."""
    kind = served.get("class", "AutoModelForCausalLM")
    return load_lines(served["loaders"], served["notes"], "run as the scheme says", kind)
