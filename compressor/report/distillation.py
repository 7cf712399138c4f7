"""The HTML page of a distillation."""

from __future__ import annotations

from calib.report.html import (
    HERE,
    OWN_LINES,
    VLLM_LINES,
    Report,
    about,
    as_json,
    curves,
    document,
    downloads,
    format_number,
    heading,
    history,
    loading,
    recipe,
    section,
    table,
    transformers_lines,
)
from compressor.report.common import cut_rows, notes, recovered_phrase, recovered_section
from compressor.report.quantization import (
    _WHEN,
    Steps,
    _lines_of,
)


def distilled_page(report: Report, steps: Steps = ()) -> str:
    """For a distillation's report; `steps` are its recipe's."""
    stages, size = report["quality_by_stage"], report["bytes"]
    before, after = stages["before"], stages["after"]
    rows = [
        ("perplexity, held-out", after["reference_perplexity"], before["perplexity"], after["perplexity"]),
        ("bits per byte", after["reference_bits_per_byte"], before["bits_per_byte"], after["bits_per_byte"]),
    ]
    head = heading(history(steps, "distilled"), f"Distilled: {report['student']}", distilled_verdict(report))
    parts = [
        section("Before and after"),
        table(
            ("", "teacher", "before", "after"),
            [
                *((text, *(format_number(v) for v in values)) for text, *values in rows),
                ("mean KL from the teacher, nats", "0", format_number(before["kl"]), format_number(after["kl"])),
                ("same most likely token", "100%", f"{before['top1_agreement']:.1%}", f"{after['top1_agreement']:.1%}"),
                ("megabytes of weights", format_number(size["before"] / 1e6), "", format_number(size["after"] / 1e6)),
                ("parameters", f"{report['parameters']['teacher']:,}", "", f"{report['parameters']['student']:,}"),
            ],
        ),
        *(about(note) for note in notes(report)),
        *recovered_section(report),
        curves({f"{name}, weighted": curve for name, curve in report["curves"].items()}),
        _loading_student(report, steps),
        recipe(steps),
        downloads(),
    ]
    return document(f"parewell: {report['student']}", head, parts, {"report.json": as_json(report)})


ADAPTERS = f"""\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")"""


def _loading_student(report: Report, steps: Steps) -> str:
    if served := report.get("loaders"):
        return loading(_lines_of(served), served["notes"])
    options = steps[-1]["options"] if steps else {}
    if options.get("lora") and not options.get("merge"):
        return loading({"peft": ADAPTERS}, [f"{HERE} holds adapters only, and names the student that they belong to"])
    return loading(
        {
            "transformers": transformers_lines("AutoModelForCausalLM"),
            "vLLM (a plain checkpoint; not tried here)": VLLM_LINES,
            "Python": OWN_LINES,
        }
    )


def distilled_verdict(report: Report) -> str:
    """The report in one sentence."""
    before, after = (report["quality_by_stage"][when] for when in _WHEN)
    moved = 0 < after["kl"] < before["kl"]  # of a student that began at its teacher there is no way to go
    closed = f" ({1 - after['kl'] / before['kl']:.0%} of the way)" if moved else ""
    return (
        f"{report['parameters']['teacher']:,} parameters became {report['parameters']['student']:,}; on "
        f"{after['tokens']:,} held-out tokens the KL from the teacher went from {before['kl']:.3f} to "
        f"{after['kl']:.3f} nats{closed}, perplexity from {before['perplexity']:.3f} to {after['perplexity']:.3f} "
        f"(teacher {after['reference_perplexity']:.3f}){recovered_phrase(report)}."
    )


SKILLS = {
    "accuracy": "accuracy",
    "mcc": "Matthews correlation",
    "f1": "F1",
    "ece": "calibration error (ECE)",
    "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
    "subset_accuracy": "all labels right (subset accuracy)",
    "mse": "mean squared error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "kl": "mean KL from the teacher, nats",
    "top1_agreement": "same answer as the teacher",
    "same_labels": "same labels as the teacher",
    "teacher_mse": "mean squared error from the teacher",
}


def skills_of(figures: Report) -> dict[str, str]:
    """Figures of a classifier by name, in words: accuracy and the like, or those of several labels or of numbers."""
    return {name: text for name, text in SKILLS.items() if name in figures}


def classified_page(report: Report, steps: Steps = ()) -> str:
    """For a classifier's distillation; `steps` are its recipe's."""
    stages = report["quality_by_stage"]
    rows = [
        (text, *(format_number(stages[when][name]) for when in stages))
        for name, text in skills_of(stages["after"]).items()
    ]
    counts = report["parameters"]
    rows.append(("parameters", *(f"{counts['teacher' if when == 'teacher' else 'student']:,}" for when in stages)))
    if size := report.get("bytes"):
        sentence = {"teacher": format_number(size["before"] / 1e6), "after": format_number(size["after"] / 1e6)}
        rows.append(("megabytes of weights", *(sentence.get(when, "") for when in stages)))
    head = heading(history(steps, "distilled"), f"Distilled: {report['student']}", classified_verdict(report))
    parts = [
        section("Before and after"),
        table(("", *stages), rows),
        *(about(note) for note in cut_rows(report)),
        curves({f"{name}, weighted": curve for name, curve in report["curves"].items()}),
        loading({"transformers": transformers_lines("AutoModelForSequenceClassification")}),
        recipe(steps),
        downloads(),
    ]
    return document(f"parewell: {report['student']}", head, parts, {"report.json": as_json(report)})


def classified_verdict(report: Report) -> str:
    """The report in one sentence."""
    teacher, before, after = (report["quality_by_stage"][when] for when in ("teacher", "before", "after"))
    start = (
        f"{report['parameters']['teacher']:,} parameters became {report['parameters']['student']:,}; on "
        f"{after['rows']:,} held-out rows "
    )
    if "mse" in after:
        return (
            f"{start}the mean squared error went from {before['mse']:.3g} to {after['mse']:.3g} (teacher "
            f"{teacher['mse']:.3g}), the Pearson correlation from {before['pearson']:.3f} to {after['pearson']:.3f}."
        )
    if "f1_micro" in after:
        return (
            f"{start}micro F1 went from {before['f1_micro']:.1%} to {after['f1_micro']:.1%} (teacher "
            f"{teacher['f1_micro']:.1%}), macro F1 from {before['f1_macro']:.1%} to {after['f1_macro']:.1%}."
        )
    return (
        f"{start}accuracy went from {before['accuracy']:.1%} to {after['accuracy']:.1%} "
        f"(teacher {teacher['accuracy']:.1%}), the calibration error from {before['ece']:.3f} to {after['ece']:.3f}."
    )


COMPARED = {
    "perplexity": "perplexity, held-out",
    "bits_per_byte": "bits per byte",
    "kl": "mean KL from what it was made from, nats",
    "top1_agreement": "same most likely token, share",
}


def language_figures(report: Report) -> dict[str, float]:
    """Of a language model, quantized or distilled, by what they are called when compared."""
    quality = {text: report["quality"][name] for name, text in COMPARED.items()}
    return {text: value for text, value in quality.items() if value is not None} | sizes(report)


def classified_figures(report: Report) -> dict[str, float]:
    return {text: report["quality"][name] for name, text in skills_of(report["quality"]).items()} | sizes(report)


def sizes(report: Report) -> dict[str, float]:
    found = {}
    if "bytes" in report:
        found["megabytes of weights"] = report["bytes"]["after"] / 1e6
    if "parameters" in report:
        found["parameters"] = report["parameters"]["student"]
    return found
