"""GPTQ without learning against llm-compressor's and GPTQModel's: SmolLM2-135M, 4-bit weights, groups of 64, symmetric.

    PAREWELL_DATA=... python -m benchmarks.peers

All three get the same float32 folder and the same 32 x 512 tokens of C4, and write a checkpoint. Seconds are from the
call that opens the model to the end of the one that saves; memory is the process's peak (VmHWM) in that time, less
that of an interpreter with the same libraries imported. Each tool runs in a process of its own, the others' in virtual
environments made under --cache. Perplexity, and KL from the float model in nats a token, are on the first 10,240 tokens
of WikiText-2 in rows of 512; bytes are of the safetensors files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = {
    "llm-compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1"),
    "GPTQModel": ("torch==2.13.0", "gptqmodel==7.6.0"),
}
Timed = Callable[[], None]


# What runs in each tool's own environment: libraries are imported where they exist.


def with_parewell(model: str, rows: Path, test: Path, out: Path, begin: Timed, end: Timed) -> Any:
    from transformers import AutoModelForCausalLM

    from compressor import Quantize, quantize

    begin()
    options = Quantize(scheme="w4a16-g64", data=rows, held_out=2, samples=32, init="none", learn=False, tune_steps=0)
    quantize(model, out, options, resume=False)
    end()
    return AutoModelForCausalLM.from_pretrained(out)


def with_llm_compressor(model: str, rows: Path, test: Path, out: Path, begin: Timed, end: Timed) -> Any:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    begin()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    ids = load_file(rows)["input_ids"][:32]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oneshot(model=opened, dataset=data, recipe=recipe, max_seq_length=512, num_calibration_samples=32)
    opened.save_pretrained(out, save_compressed=True)
    end()
    return AutoModelForCausalLM.from_pretrained(out)


def with_gptqmodel(model: str, rows: Path, test: Path, out: Path, begin: Timed, end: Timed) -> Any:
    os.cpu_count = lambda: 4  # with two cores it reserves all of them and then has none  # type: ignore[assignment]
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import GPTQConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    begin()
    ids = load_file(rows)["input_ids"][:32]
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    opened = GPTQModel.load(model, GPTQConfig(bits=4, group_size=64), dtype=torch.float32, device="cpu")
    opened.quantize(data, batch_size=1)
    opened.save(str(out))
    end()
    # Its own kernels run in half precision only; weights are taken out of them for the comparison.
    packed = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, linear in packed.named_modules():
        if hasattr(linear, "dequantize_weight"):
            plain.get_submodule(name).weight.data = linear.dequantize_weight().mT.float()
    return plain


RUNS = {"parewell": with_parewell, "llm-compressor": with_llm_compressor, "GPTQModel": with_gptqmodel}


def quality(model: Any, folder_of_float: str, test: Path) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder_of_float, dtype=torch.float32)
    nats, kl, count = 0.0, 0.0, 0
    with torch.no_grad():
        for row in load_file(test)["input_ids"]:
            log_q, log_p = (m(row[None]).logits[0, :-1].float().log_softmax(-1) for m in (model, reference))
            nats -= float(log_q.gather(-1, row[1:, None]).sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            count += len(row) - 1
    return {"perplexity": math.exp(nats / count), "kl": kl / count}


def peak() -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(tool: str, model: str, folder: Path) -> None:
    """Prints one line of JSON, the last."""
    measured: dict[str, float] = {}

    def begin() -> None:
        measured["bytes"], measured["seconds"] = -peak(), -time.monotonic()

    def end() -> None:
        measured["seconds"] += time.monotonic()
        measured["bytes"] += peak()

    rows, test, out = folder / "rows.safetensors", folder / "test.safetensors", folder / f"out-{tool}"
    made = RUNS[tool](model, rows, test, out, begin, end)
    measured |= quality(made, model, test) | {"stored": sum(f.stat().st_size for f in out.rglob("*.safetensors"))}
    print(json.dumps(measured))


def interpreter(tool: str, cache: Path) -> Path:
    """Of the tool's environment, made if it is not there yet."""
    if tool not in PEERS:
        return Path(sys.executable)
    home = cache / f"venv-{tool}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[tool]], check=True)
        (home / "complete").touch()
    return python


def prepare(model: Path, folder: Path) -> None:
    """The same tokens for everybody."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for line in (text / "c4-sample-1000.jsonl").read_text().splitlines():
        ids += tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]
        if len(ids) >= 34 * 512:
            break
    save_file({"input_ids": torch.tensor(ids[: 34 * 512]).view(34, 512)}, folder / "rows.safetensors")
    wiki = tokenizer((text / "wikitext2-raw-test.txt").read_text(), verbose=False)["input_ids"]
    save_file({"input_ids": torch.tensor(wiki[:10_240]).view(20, 512)}, folder / "test.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tools", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/parewell-benchmarks")
    parser.add_argument("--run", nargs=3, metavar=("TOOL", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        tool, model, folder = args.run
        run(tool, model, Path(folder))
        return
    from benchmarks import record
    from benchmarks.real_models import real_model

    folder_of_model = real_model("smollm2", args.cache)
    results: dict[str, list[dict[str, float]]] = {tool: [] for tool in args.tools}
    for _ in range(args.rounds):
        for tool in args.tools:
            with tempfile.TemporaryDirectory() as scratch:
                prepare(folder_of_model, Path(scratch))
                script = ["-m", "benchmarks.peers"] if tool not in PEERS else [Path(__file__).resolve()]
                command = [interpreter(tool, args.cache), *script, "--run", tool, folder_of_model, scratch]
                where = scratch if tool in PEERS else None  # some leave logs where they run
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
                if done.returncode:
                    raise SystemExit(f"{tool}: {done.stderr[-3000:]}")
                results[tool].append(json.loads(done.stdout.splitlines()[-1]))
                print(tool, results[tool][-1], flush=True)
    rows = [
        {
            "tool": " ".join(["parewell"] if tool not in PEERS else [p.replace("==", " ") for p in PEERS[tool][1:]]),
            "seconds": statistics.median(r["seconds"] for r in results[tool]),
            "peak MB": statistics.median(r["bytes"] for r in results[tool]) / 1e6,
            "stored MB": statistics.median(r["stored"] for r in results[tool]) / 1e6,
            "perplexity": statistics.median(r["perplexity"] for r in results[tool]),
            "KL": statistics.median(r["kl"] for r in results[tool]),
        }
        for tool in args.tools
    ]
    for row in rows:
        others = [other for other in rows if other["tool"] != "parewell"]
        if row["tool"] == "parewell" and others:
            row["of the faster's time"] = row["seconds"] / min(o["seconds"] for o in others)
            row["of the leaner's memory"] = row["peak MB"] / min(o["peak MB"] for o in others)
    record.write("peers", rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
