"""The model card of an output: README.md as the hub reads it, with metadata, figures, loading lines and the recipe in
short."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.report.html import (
    HERE,
    OWN_LINES,
    OWN_LOADERS,
    STATE_LINES,
    VLLM_LINES,
    Report,
    format_number,
    transformers_lines,
)

_Steps = Sequence[Mapping[str, Any]]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?/snapshots/[0-9a-f]{40}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORD = re.compile(r"[\w.+/-]{1,100}", re.ASCII)  # a licence, a language, a data set
_SEAL = re.compile(r"<!-- parewell wrote what stands above; sha256 ([0-9a-f]{64}) -->\n")
_FENCED = re.compile(r"^```.*?^```", re.M | re.S)
_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
}
_PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "tensors": None,
}  # of the tasks of unlearning and of distillation
_MADE = {
    "quantize": "quantized",
    "distill": "distilled",
    "unlearn": "unlearned",
    "export": "exported",
    "soup": "averaged",
}
_TAGS = {"quantize": "quantized", "distill": "distillation", "unlearn": "unlearning"}
_CONVERTED = ("onnx", "gguf", "mlx")
_ADAPTER_LINES = f"""\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")"""
_FIGURES = {
    "perplexity": "perplexity, held-out",
    "bits_per_byte": "bits per byte",
    "kl": "mean KL to the original, nats per token",
    "top1_agreement": "same most likely token",
    "tell_apart": "tell-apart rate from one token (50%: alike)",
    "cosine": "mean cosine with the original's embeddings",
    "rank_correlation": "rank correlation of cosines between texts",
    "nats": "cross-entropy, nats",
    "right": "accuracy",
    "extraction": "extraction strength",
    "min_k_auc": "attack by least likely tokens (AUC; 0.5: blind)",
}
_LANGUAGE = ("perplexity", "bits_per_byte", "kl", "top1_agreement", "tell_apart", "cosine", "rank_correlation")
_OF_THE_SAME = {  # of a model beside itself
    "kl": 0.0, "top1_agreement": 1.0, "tell_apart": 0.5, "cosine": 1.0, "rank_correlation": 1.0,
}  # fmt: skip
_SHARES = ("top1_agreement", "tell_apart")
_OPTIONS = (  # of a step, that a card names: what is neither a path nor about a machine
    "scheme", "target_bits", "rounding", "learn", "student_scheme", "layers", "heads", "ffn", "hidden", "lora", "loss",
    "method", "to", "dtype", "steps", "tune_steps", "epochs", "lr", "seed",
)  # fmt: skip


def read_metadata_of(card: Path) -> dict[str, Any]:
    """Read the metadata of a model card with the hub's own parser.

    Args:
        card: a README.md, which need not be there.

    Returns:
        The YAML block at its start; empty without a card, without a block, or where that is no mapping.
    """
    from huggingface_hub.repocard import metadata_load

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except Exception:  # YAML that anyone may have written; the library raises as it comes
        return {}


def is_own_card(text: str) -> bool:
    """Whether a README.md is as parewell wrote it: nobody has changed a letter since."""
    above, found = _SEAL.sub("", text), _SEAL.search(text)
    return found is not None and text.endswith(found[0]) and _digest(above) == found[1]


def model_card(report: Report, steps: _Steps, config: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Write the model card of an output.

    Args:
        report: as in report.json.
        steps: the recipe, oldest step first, as in parewell.json.
        config: the output's config.json; empty where it has none.
        source: metadata of the card of the model that the output was made from; its licence, language and data sets
            are carried over.

    Returns:
        Markdown with a YAML block, the same for the same job. Names of local folders appear without their path.
    """
    from huggingface_hub import ModelCard, ModelCardData

    parts = [_heading(report, steps), _figures(report), _loading(report, steps), _making(steps)]
    data = ModelCardData(**{name: value for name, value in _metadata(report, steps, config, source).items() if value})
    return _sealed(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n\n").content)


def with_repository(card: str, repository: str) -> str:
    """A card whose lines to copy name the `repository` on the hub instead of a folder."""
    text = _FENCED.sub(lambda block: re.sub(rf"\b{HERE}\b", lambda _: repository, block[0]), card)
    text = text.replace(f"`{HERE}` stands for the folder of this file.\n\n", "")
    return _sealed(_SEAL.sub("", text)) if is_own_card(card) else text


def hub_name(model: Mapping[str, Any]) -> str | None:
    """The name on the hub of a model as a recipe has it; None for a local folder, wherever that came from."""
    given, name = str(model.get("given", "")), str(model.get("name", ""))
    if (cached := _CACHED.search(given)) is not None:
        return "/".join(part for part in cached.groups() if part)
    fetched = _COMMIT.fullmatch(name) and _REPOSITORY.fullmatch(given)  # the hub's folders are called by their commit
    return given if fetched else None


def _sealed(text: str) -> str:
    return f"{text}<!-- parewell wrote what stands above; sha256 {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _origin(steps: _Steps) -> Mapping[str, Any]:
    """The model whose weights the first step began with: a student where one was given."""
    found = (steps[0].get("student") or steps[0].get("model")) if steps else None
    return found if isinstance(found, Mapping) else {}


def _name(model: Mapping[str, Any]) -> str:
    return hub_name(model) or str(model.get("name", "")) or "a model"


def _pipeline(report: Report) -> str | None:
    if report["job"] == "unlearn":
        return _PIPELINES.get(report.get("task", ""))
    if "class" in report.get("loaders", {}):  # another than that of causal language models
        return next(
            (pipeline for pipeline, kind in _CLASSES.items() if kind == report["loaders"]["class"]),
            "feature-extraction",
        )
    if "task" in report:  # of images or tensors, or of language models that are not causal
        return _PIPELINES[report["task"]]
    return "text-classification" if report["job"] == "classify" else "text-generation"


def _metadata(report: Report, steps: _Steps, config: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    base = hub_name(_origin(steps))
    last = next((step for step in reversed(steps) if step.get("job") != "export"), {})
    adapters = _is_adapters(report, steps)
    rounded = bool(config.get("quantization_config")) or report.get("to") in _CONVERTED or last.get("job") == "quantize"
    relation = "adapter" if adapters else "quantized" if rounded else "finetune" if last else None
    schemes = [str(last[name]) for name in ("scheme",) if isinstance(last.get(name), str)]
    jobs = [_TAGS[step["job"]] for step in steps if step.get("job") in _TAGS]
    exported = [str(report["to"])] if "to" in report else []
    license = _word(source.get("license")) or _word(config.get("license"))
    return {
        "language": _words(source.get("language")),
        "license": license,
        "license_name": _word(source.get("license_name")) if license else None,
        "license_link": _link(source.get("license_link")) if license else None,
        "library_name": _library(report, adapters),
        "pipeline_tag": _pipeline(report),
        "base_model": base,
        "base_model_relation": relation if base else None,
        "datasets": _words(source.get("datasets")),
        "tags": list(dict.fromkeys(["parewell", *jobs, *schemes, *exported])),
    }


def _library(report: Report, adapters: bool) -> str | None:
    if adapters:
        return "peft"
    if report.get("task") == "tensors" or report.get("to") in _CONVERTED:
        return {"gguf": "gguf", "mlx": "mlx"}.get(report.get("to", ""))
    loaders = report.get("loaders", {}).get("loaders", ["transformers"])
    return "transformers" if any(loader.startswith("transformers") for loader in loaders) else "parewell"


def _is_adapters(report: Report, steps: _Steps) -> bool:
    options = steps[-1].get("options", {}) if steps else {}
    return report["job"] == "distill" and bool(options.get("lora")) and not options.get("merge")


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _words(value: object) -> list[str] | None:
    listed = value if isinstance(value, list) else [value]
    return [word for word in map(_word, listed[:200]) if word] or None


def _link(value: object) -> str | None:
    """Where a licence can be read: a page, or a file that lies beside the card."""
    return value if isinstance(value, str) and re.fullmatch(r"(https?://)?[\w./%#~?=&-]{1,300}", value) else None


def _heading(report: Report, steps: _Steps) -> str:
    origin, base = _name(_origin(steps)), hub_name(_origin(steps))
    linked = f"[{base}](https://huggingface.co/{base})" if base else _plain(origin)
    title = f"# {_plain(origin.rpartition('/')[2])}, {_done(report)}"
    made = " and ".join(dict.fromkeys(_MADE.get(str(step.get("job")), str(step.get("job"))) for step in steps))
    about = f"Made from {linked} with parewell{f' ({made})' if made else ''}."
    damage = report.get("damage", {})
    if damage.get("found") or damage.get("lost"):
        about += " **This model is damaged: it was kept although it is much worse than what it was made from.**"
    return f"{title}\n\n{about} `report.html` has everything that was measured, `parewell.json` the whole recipe."


def _done(report: Report) -> str:
    """What the last job made of it."""
    return {
        "quantize": f"quantized to {report.get('scheme')}",
        "distill": f"distilled ({_plain(str(report.get('student')))})",
        "classify": f"distilled ({_plain(str(report.get('student')))})",
        "unlearn": f"unlearned ({report.get('method')})",
        "export": f"exported to {report.get('to')}",
        "soup": f"averaged with {len(report.get('models', [1])) - 1} more",
    }[report["job"]]


def _figures(report: Report) -> str:
    """The table of what was and what is."""
    stages = report.get("quality_by_stage", {})
    quality = report.get("quality")
    if quality is None and not stages:
        rows, columns, on = list[tuple[str, list[str]]](), ["before", "after"], "Not run by the job that wrote it"
    elif quality is not None and "reference_perplexity" in quality:
        columns, rows = _language_rows(quality, stages.get("before") if report["job"] == "distill" else None)
        on = f"Measured on {quality['tokens']:,} held-out tokens"
    else:
        columns, rows = list(stages), _rows_of_groups(stages)
        on = "Measured on the rows that the recipe names"
    size, last = report.get("bytes", {}), len(columns) - 1
    if "before" in size and "after" in size:
        megabytes = [format_number(size[when] / 1e6) for when in ("before", "after")]
        rows.append(("megabytes of weights", [megabytes[0], *[""] * (last - 1), megabytes[1]]))
    if counts := report.get("parameters"):
        rows.append(("parameters", [f"{counts['teacher']:,}", *[""] * (last - 1), f"{counts['student']:,}"]))
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join(["## Figures", "", f"{on}.", "", *head, *(f"| {t} | {' | '.join(c)} |" for t, c in rows)])


def _language_rows(
    quality: Mapping[str, Any], before: Mapping[str, Any] | None
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows of a language model beside the one that it was made from; `before`: of a student, training."""
    reference = {name: quality.get(f"reference_{name}", _OF_THE_SAME.get(name)) for name in _LANGUAGE}
    first = {"original": reference} if before is None else {"teacher": reference, "before": before}
    found = first | {"after": quality}
    rows = [
        (_FIGURES[name], [_shown(name, of.get(name)) for of in found.values()])
        for name in _LANGUAGE
        if quality.get(name) is not None
    ]
    return list(found), rows


def _rows_of_groups(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Figures by stage, or by stage and group of rows."""
    flat = {stage: dict[str, Any]() for stage in stages}
    for stage, of in stages.items():
        for name, value in of.items():
            if isinstance(value, Mapping):
                flat[stage] |= {f"{name}: {_FIGURES.get(n, n.replace('_', ' '))}": v for n, v in value.items()}
            elif name not in ("rows", "tokens") and not name.endswith("_error"):
                flat[stage][_FIGURES.get(name, name.replace("_", " "))] = value
    names = dict.fromkeys(name for of in flat.values() for name, v in of.items() if isinstance(v, int | float))
    return [(name, [format_number(of.get(name)) for of in flat.values()]) for name in names]


def _shown(name: str, value: float | None) -> str:
    return f"{value:.1%}" if name in _SHARES and value is not None else format_number(value)


def _loading(report: Report, steps: _Steps) -> str:
    """Lines to copy, by what runs them."""
    served = report.get("loaders", {"loaders": ["transformers"], "notes": []})
    notes, kind = served["notes"], _pipeline(report)
    lines = dict[str, str]()
    if _is_adapters(report, steps):
        lines["peft"] = _ADAPTER_LINES
    elif kind is None:
        lines["safetensors"] = STATE_LINES
    elif report.get("to") not in _CONVERTED:
        for loader in served["loaders"]:
            if loader.startswith("transformers"):
                zero_points = any("CompressedTensorsConfig" in note for note in notes)
                lines[loader] = transformers_lines(served.get("class", _CLASSES[kind]), zero_points=zero_points)
            elif loader == "vLLM":
                lines[loader] = VLLM_LINES
        if kind not in ("text-classification", "image-classification") and (
            OWN_LOADERS & set(served["loaders"]) or "loaders" not in report
        ):
            lines["parewell"] = OWN_LINES
    shown = [f"With {loader}:\n\n```{_syntax(text)}\n{text}\n```" for loader, text in lines.items()]
    if not lines:
        shown = ["\n".join(f"- {loader}" for loader in served["loaders"])]
    where = [f"`{HERE}` stands for the folder of this file."] if lines else []
    return "\n\n".join(["## Load it", *where, *shown, *(f"Note: {_plain(note)}." for note in notes)])


def _syntax(text: str) -> str:
    return "" if text.startswith("vllm") else "python"


def _making(steps: _Steps) -> str:
    """The recipe in short."""
    lines = ["## How it was made", ""]
    for number, step in enumerate(steps, 1):
        named = _named(step.get("options", {}))
        data = (
            f"{of['rows']:,} {name.replace('_', '-')} rows"
            for name, of in step.get("data", {}).items()
            if isinstance(of, Mapping) and isinstance(of.get("rows"), int)
        )
        model = step.get("model", {})
        what = _plain(_name(model).rpartition("/")[2] if hub_name(model) is None else _name(model))
        lines.append(f"{number}. {step.get('job')} of {what}: {', '.join(map(_plain, [*named, *data]))}")
    versions = steps[-1].get("versions", {}) if steps else {}
    with_which = ", ".join(f"{name} {_plain(str(version))}" for name, version in versions.items())
    return "\n".join([*lines, "", f"Versions: {with_which}. `parewell replay` makes it again from its recipe."])


def _named(options: Mapping[str, Any]) -> list[str]:
    """Options that say what a step did, with their values."""
    idle = () if options.get("learn", True) else ("learn", "steps", "loss")
    found = {name: options[name] for name in _OPTIONS if name in options and name not in idle}
    found = {n: v for n, v in found.items() if isinstance(v, str | int | float) and (v or n == "seed")}
    return [f"{name.replace('_', '-')} {value}" if value is not True else name for name, value in found.items()]


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
