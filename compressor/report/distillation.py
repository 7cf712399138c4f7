"""The pages of a distillation, of language models and of classifiers, and the figures by which outputs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calib.report.charts import WEIGHTED, Axis, Chart
from calib.report.html import (
    HERE,
    STATE_LINES,
    Report,
    Steps,
    Table,
    Verdict,
    as_json,
    load_lines,
    loss_charts,
    render_page,
    transformers_lines,
)
from compressor.report.common import page_data, quantized_lines, tell_apart_rows
from compressor.report.verdict import classified_verdict, distilled_verdict

TASK_CLASSES = {"seq2seq": "AutoModelForSeq2SeqLM", "masked-lm": "AutoModelForMaskedLM"}  # by --task
ADAPTERS = f"""\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")"""


def distilled_page(report: Report, steps: Steps = ()) -> str:
    """Render the page of a distillation's report; `steps` are its recipe's."""
    before, after = (report["quality_by_stage"][when] for when in ("before", "after"))
    size, count = report["bytes"], report["parameters"]
    rows: list[tuple[Any, ...]] = [
        ("perplexity, held-out", after["reference_perplexity"], before["perplexity"], after["perplexity"]),
        ("bits per byte", after["reference_bits_per_byte"], before["bits_per_byte"], after["bits_per_byte"]),
        ("mean KL from the teacher, nats", 0, before["kl"], after["kl"]),
        ("same most likely token", "100%", *(f"{stage['top1_agreement']:.1%}" for stage in (before, after))),
        *tell_apart_rows(before, after),
        ("megabytes of weights", size["before"] / 1e6, "", size["after"] / 1e6),
        ("parameters", count["teacher"], "", count["student"]),
    ]
    rows[4:4] = answer_rows(report)
    if after.get("accuracy") is not None:
        right = (after["reference_accuracy"], before["accuracy"], after["accuracy"])
        rows.insert(1, ("hidden tokens told right", *(f"{share:.1%}" for share in right)))
    data = page_data(report, steps, "distilled")
    figures = (("", "teacher", "before", "after"), rows)
    return _page(report, figures, distilled_verdict(report), _lines_of(report, steps, data), data)


def answer_rows(report: Report) -> list[tuple[Any, ...]]:
    """Table rows of what teacher and student, before and after, are worth by their own answers; none where nothing
    rewards them."""
    if "on_policy" not in report:
        return []
    figures = report["on_policy"]["figures"]
    stages = [figures[when] for when in ("teacher", "before", "after")]
    rows: list[tuple[Any, ...]] = [("mean reward of its answers", *(stage["reward"] for stage in stages))]
    rows += [(f"pass@{k}", *(f"{stage['pass_at'][k]:.1%}" for stage in stages)) for k in figures["after"]["pass_at"]]
    for name, text in ANSWERS.items():
        if any(stage[name] is not None for stage in stages):
            rows.append((text, *("" if stage[name] is None else stage[name] for stage in stages)))
    return rows


ANSWERS = {
    "length": "tokens of an answer",
    "entropy": "entropy of an answer, nats",
    "reverse_kl": "KL(model || teacher) of an answer, nats",
    "forward_kl": "KL(teacher || model) of an answer, nats",
    "target_kl": "KL(model || target) of an answer, nats",
}


def _page(report: Report, figures: Table, verdict: Verdict, lines_of: dict[str, str], data: dict[str, Any]) -> str:
    return render_page(
        Path(__file__).parent / "templates/job.html", title=f"parewell: {report['student']}",
        heading=f"Distilled: {report['student']}", verdict=verdict, files={"report.json": as_json(report)},
        figures=figures, rate=report.get("rate"), lines_of=lines_of,
        curves=loss_charts(report["curves"], WEIGHTED) + _answer_charts(report), **data,
    )  # fmt: skip


def _answer_charts(report: Report) -> list[Chart]:
    """How answers were rewarded, step by step."""
    return [
        chart for name, curve in report.get("on_policy", {}).get("curves", {}).items()
        for chart in loss_charts({name: curve}, Axis(name, "reward" if name == "reward" else "share"))
    ]  # fmt: skip


def _lines_of(report: Report, steps: Steps, data: dict[str, Any]) -> dict[str, str]:
    """How the student is loaded; adapters alone get a note in `data` too."""
    if served := report.get("loaders"):
        return quantized_lines(served)
    options = steps[-1]["options"] if steps else {}
    if options.get("lora") and not options.get("merge"):
        data["load_notes"] = [f"{HERE} holds adapters only, and names the student that they belong to"]
        return {"peft": ADAPTERS}
    if (kind := TASK_CLASSES.get(str(report.get("task")))) is not None:
        return load_lines(["transformers", "parewell.load"], kind=kind)
    return load_lines(["transformers", "vLLM", "parewell.load"])


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
    "tell_apart": "tell-apart rate from the teacher, one answer (0.5: alike)",
    "same_labels": "same labels as the teacher",
    "teacher_mse": "mean squared error from the teacher",
}


def skills_of(figures: Report) -> dict[str, str]:
    """Figures of a classifier by name, in words: accuracy and the like, or those of several labels or of numbers."""
    return {name: text for name, text in SKILLS.items() if name in figures}


def classified_page(report: Report, steps: Steps = ()) -> str:
    """Render the page of a classifier's distillation; `steps` are its recipe's."""
    stages, counts = report["quality_by_stage"], report["parameters"]
    rows: list[tuple[Any, ...]] = [
        (text, *(stages[when][name] for when in stages)) for name, text in skills_of(stages["after"]).items()
    ]
    rows.append(("parameters", *(counts["teacher" if when.startswith("teacher") else "student"] for when in stages)))
    if size := report.get("bytes"):
        megabytes = {"teacher": size["before"] / 1e6, "after": size["after"] / 1e6}
        rows.append(("megabytes of weights", *(megabytes.get(when, "") for when in stages)))
    kind = "Sequence" if "task" not in report else "Image"  # which reports of texts leave out
    lines_of = {"transformers": transformers_lines(f"AutoModelFor{kind}Classification")}
    if report.get("task") == "tensors":
        lines_of = {"safetensors": STATE_LINES}
    data = page_data(report, steps, "distilled")
    return _page(report, (("", *stages), rows), classified_verdict(report), lines_of, data)


COMPARED = {
    "perplexity": "perplexity, held-out",
    "bits_per_byte": "bits per byte",
    "kl": "mean KL from what it was made from, nats",
    "top1_agreement": "same most likely token, share",
    "accuracy": "hidden tokens told right, share",
    "tell_apart": "tell-apart rate from what it was made from, one token (0.5: alike)",
}


def language_figures(report: Report) -> dict[str, float]:
    """Figures of a language model, quantized or distilled, by the names under which outputs are compared."""
    quality = {text: report["quality"].get(name) for name, text in COMPARED.items()}
    return {text: value for text, value in quality.items() if value is not None} | sizes(report)


def classified_figures(report: Report) -> dict[str, float]:
    """Figures of a distilled classifier, by the names under which outputs are compared."""
    return {text: report["quality"][name] for name, text in skills_of(report["quality"]).items()} | sizes(report)


def sizes(report: Report) -> dict[str, float]:
    """Size of the student in megabytes and parameters, by name."""
    found = {}
    if "bytes" in report:
        found["megabytes of weights"] = report["bytes"]["after"] / 1e6
    if "parameters" in report:
        found["parameters"] = report["parameters"]["student"]
    return found
