"""The page of an export, and how each format is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calib.report.html import HERE, Report, Steps, as_json, changed_row, load_lines, render_page
from compressor.report.common import page_data, tell_apart_rows
from compressor.report.distillation import language_figures, sizes
from compressor.report.verdict import exported_verdict, small_kl

RUNTIME_NAMES = {
    "safetensors": "a plain checkpoint", "onnx": "ONNX", "gguf": "GGUF", "bnb-nf4": "NF4 of bitsandbytes",
    "bnb-fp4": "FP4 of bitsandbytes", "bnb-int8": "INT8 of bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "mlx": "MLX",
    "deepseek-fp8": "FP8 in DeepSeek's layout",
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

MLX_LINES = f"""\
from mlx_lm import generate, load

model, tokenizer = load("{HERE}")
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=20))"""
GPTQMODEL_LINES = f"""\
from gptqmodel import GPTQModel

model = GPTQModel.load("{HERE}")"""


def exported_page(report: Report, steps: Steps = ()) -> str:
    """Render the page of an export's report; `steps` are its recipe's."""
    size, quality, name = report["bytes"], report.get("quality"), RUNTIME_NAMES.get(report["to"], report["to"])
    rows: list[tuple[Any, ...]] = []
    if quality is not None:
        rows = [
            changed_row("perplexity, held-out", quality["reference_perplexity"], quality["perplexity"]),
            changed_row("bits per byte", quality["reference_bits_per_byte"], quality["bits_per_byte"]),
            ("mean KL, nats", 0, small_kl(quality["kl"]), ""),
            ("same most likely token", "100%", f"{quality['top1_agreement']:.1%}", ""),
            *((*row, "") for row in tell_apart_rows(quality)),
        ]
    rows.append(changed_row("megabytes of weights", size["before"] / 1e6, size["after"] / 1e6))
    rows.append(("bits per weight of the linears", "", report["bits_per_weight"], ""))
    if (first := report.get("source", {})).get("job") == "quantize":
        rows += _of_quantization(first)
    return render_page(
        Path(__file__).parent / "templates/export.html", title=f"parewell: {name}",
        heading=f"Exported to {name}", verdict=exported_verdict(report),
        files={"report.json": as_json(report)}, figures=(("", "before", "after", "change"), rows), curves=[],
        lines_of=_lines_of(report), **page_data(report, steps, "exported"),
    )  # fmt: skip


def _of_quantization(report: Report) -> list[tuple[Any, ...]]:
    """Rows of what was exported: how far quantization took it from the float model."""
    quality = report["quality"]
    return [
        changed_row("quantization: perplexity, held-out", quality["reference_perplexity"], quality["perplexity"]),
        ("quantization: mean KL, nats", 0, small_kl(quality["kl"]), ""),
        ("quantization: same most likely token", "100%", f"{quality['top1_agreement']:.1%}", ""),
    ]


def _lines_of(report: Report) -> dict[str, str]:
    if report["to"] == "onnx":
        return {"onnxruntime": ONNX_LINES}
    if report["to"] == "gguf":
        loaders, lines = " ".join(report["loaders"]["loaders"]), {"llama.cpp (not tried here)": LLAMA_LINES}
        if "transformers" in loaders:
            lines["transformers"] = GGUF_CONFIG_LINES if "AutoConfig" in loaders else GGUF_LINES
        return lines
    if report["to"] == "mlx":
        return {"mlx-lm": MLX_LINES}
    if report["to"] in ("awq", "gptq"):
        return {"GPTQModel": GPTQMODEL_LINES} | load_lines(report["loaders"]["loaders"], vllm="by its rules")
    return load_lines(report["loaders"]["loaders"], kind=report["loaders"].get("class", "AutoModelForCausalLM"))


def exported_figures(report: Report) -> dict[str, float]:
    """Figures of an export, by the names under which outputs are compared."""
    figures = language_figures(report) if "quality" in report else sizes(report)
    return figures | {"bits per weight of the linears": report["bits_per_weight"]}
