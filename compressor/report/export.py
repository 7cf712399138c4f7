"""The page of an export, what it says in one sentence, and how each format is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.report.html import (
    HERE,
    OWN_LINES,
    VLLM_LINES,
    Report,
    about,
    as_json,
    changed_row,
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
from compressor.report.common import notes, recovered_phrase, recovered_section
from compressor.report.distillation import language_figures, sizes

RUNTIME_NAMES = {
    "safetensors": "a plain checkpoint", "onnx": "ONNX", "gguf": "GGUF", "bnb-nf4": "NF4 of bitsandbytes",
    "bnb-fp4": "FP4 of bitsandbytes", "bnb-int8": "INT8 of bitsandbytes",
}  # fmt: skip
ONNX_LINES = f"""\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
given = tokenizer("Once upon a time", return_tensors="np")
session = onnxruntime.InferenceSession("{HERE}/model.onnx")
ids = {{name: given[name].astype(np.int64) for name in ("input_ids", "attention_mask")}}
(logits,) = session.run(["logits"], ids)"""
GGUF_LINES = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{HERE}", gguf_file="model.gguf")
tokenizer = AutoTokenizer.from_pretrained("{HERE}")"""
GGUF_CONFIG_LINES = f"""\
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained("{HERE}")
model = AutoModelForCausalLM.from_pretrained("{HERE}", gguf_file="model.gguf", config=config)
tokenizer = AutoTokenizer.from_pretrained("{HERE}")"""
LLAMA_LINES = f'llama-cli --model {HERE}/model.gguf --prompt "Once upon a time"'


def exported_page(report: Report, steps: Sequence[Mapping[str, Any]] = ()) -> str:
    """For an export's report; `steps` are its recipe's."""
    size, quality = report["bytes"], report.get("quality")
    rows = [changed_row("megabytes of weights", size["before"] / 1e6, size["after"] / 1e6)]
    if quality is not None:
        rows = [
            changed_row("perplexity, held-out", quality["reference_perplexity"], quality["perplexity"]),
            changed_row("bits per byte", quality["reference_bits_per_byte"], quality["bits_per_byte"]),
            ("mean KL, nats", "0", _small(quality["kl"]), ""),
            ("same most likely token", "100%", f"{quality['top1_agreement']:.1%}", ""),
            *rows,
        ]
    rows.append(("bits per weight of the linears", "", format_number(report["bits_per_weight"]), ""))
    head = heading(history(steps, "exported"), f"Exported to {RUNTIME_NAMES[report['to']]}", exported_verdict(report))
    parts = [
        section("Before and after"),
        about("Before: what it was made from, as parewell runs it. After: as its runtime runs it."),
        table(("", "before", "after", "change"), rows),
        *(about(note) for note in notes(report)),
        *recovered_section(report),
        loading(_lines_of(report), report["loaders"]["notes"]),
        recipe(steps),
        downloads(),
    ]
    return document(f"parewell: {RUNTIME_NAMES[report['to']]}", head, parts, {"report.json": as_json(report)})


def _lines_of(report: Report) -> dict[str, str]:
    if report["to"] == "onnx":
        return {"onnxruntime": ONNX_LINES}
    if report["to"] == "gguf":
        given = any("AutoConfig" in loader for loader in report["loaders"]["loaders"])
        lines = GGUF_CONFIG_LINES if given else GGUF_LINES
        return {"llama.cpp (not tried here)": LLAMA_LINES, "transformers": lines}
    found = {report["loaders"]["loaders"][0]: transformers_lines("AutoModelForCausalLM")}
    if "vLLM" in report["loaders"]["loaders"]:
        found["vLLM (a plain checkpoint; not tried here)"] = VLLM_LINES
    if "compressor.load" in report["loaders"]["loaders"]:
        found["Python"] = OWN_LINES
    return found


def exported_verdict(report: Report) -> str:
    """The report in one sentence."""
    size, quality = report["bytes"], report.get("quality")
    sentence = (
        f"{format_number(size['before'] / 1e6)} MB became {format_number(size['after'] / 1e6)} MB, "
        f"{report['bits_per_weight']:.3g} bits per weight of the linears"
    )
    if quality is None:
        return f"{sentence}; not run, as {report['not_run']}{recovered_phrase(report)}."
    worse = quality["perplexity"] / quality["reference_perplexity"] - 1
    return (
        f"{sentence}; run by {report['runtime']} on {quality['tokens']:,} held-out tokens, perplexity went from "
        f"{quality['reference_perplexity']:.3f} to {quality['perplexity']:.3f} ({worse:+z.1%}), with a KL of "
        f"{_small(quality['kl'])} nats and the same most likely token in {quality['top1_agreement']:.1%}"
        f"{recovered_phrase(report)}."
    )


def _small(kl: float) -> str:
    """What is below the last digits of single precision is not told, nor its sign."""
    return f"{kl:.2g}" if kl >= 1e-6 else "less than 1e-6"


def exported_figures(report: Report) -> dict[str, float]:
    """By what they are called when compared."""
    figures = language_figures(report) if "quality" in report else sizes(report)
    return figures | {"bits per weight of the linears": report["bits_per_weight"]}
