"""Other tools beside parewell: the same float32 folder, the same tokens, one thread each, one after another.

    PAREWELL_DATA=... python -m benchmarks.peers --model smollm2 --schemes w4a16-g64 [--tools ...] [--seeds ...]

stories260k (its neurons padded with zeros to a width that auto-round quantizes) calibrates on 100 x 256 tokens of
stories and is measured on 40 rows of others, each story led by the start token; real models on 128 x 512 tokens of C4
(--rows), and on 20 rows of WikiText-2 (10,240 tokens), each row led by a start token where the model has one. Every
tool writes a folder, which transformers loads. Perplexity, and KL from the float model in nats a token. CPU seconds are
from the call that opens the model to the end of the one that saves; memory is the process's peak (VmHWM) in that time,
less that of an interpreter with the same libraries imported. Other tools run in virtual environments made under
--cache. Bytes are of the safetensors files; auto-round's weights are written as they are dequantized, so it has none.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENTS = {
    "llm-compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1"),
    "GPTQModel": ("torch==2.13.0", "gptqmodel==7.6.0"),
    "auto-round": ("torch==2.13.0", "auto-round==0.16.1"),
}
NAMED = {"wnvfp4a16": "NVFP4A16", "wmxfp4a16": "MXFP4A16", "wmxfp8a16": "MXFP8A16", "wfp8afp8": "FP8_DYNAMIC"}
MODELS = ("stories260k", "smollm2", "gemma3", "qwen2")


@dataclass(frozen=True)
class Task:
    """What a tool is to do: its folder has `rows.safetensors` and `test.safetensors`, "input_ids" (N, T) each."""

    model: str
    folder: Path
    scheme: str
    seed: int
    begin: Callable[[], None]
    end: Callable[[], None]

    @property
    def bits(self) -> int:
        return int(self.scheme[1])

    @property
    def group(self) -> int | None:
        """Columns a group; None where each channel has one."""
        kind = self.scheme.split("-")[1]
        return None if kind == "channel" else int(kind.removeprefix("g"))

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def ids(self) -> Any:
        from safetensors.torch import load_file

        return load_file(self.folder / "rows.safetensors")["input_ids"]

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in self.ids.tolist()]


# What runs in each tool's own environment: libraries are imported where they exist.


def with_parewell(task: Task, preset: str = "default", **options: Any) -> Any:
    from compressor import Quantize, load, quantize

    task.begin()
    job = Quantize.preset(
        preset,
        **{"scheme": task.scheme, "seed": task.seed, "samples": len(task.ids), "device": "cpu"}
        | {"data": task.folder / "rows.safetensors", "held_out_data": task.folder / "test.safetensors", "held_out": 2}
        | options,
    )
    quantize(task.model, task.out, job, resume=False, allow_damage=True)
    task.end()
    return load(task.out)


def with_auto_round(task: Task, iters: int) -> Any:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task.begin()
    ids = task.ids
    AutoRound(
        task.model, scheme=f"W{task.bits}A16", tokenizer=AutoTokenizer.from_pretrained(task.model), sym=True,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids],
        group_size=-1 if task.group is None else task.group, nsamples=len(ids), seqlen=ids.shape[1], iters=iters,
        seed=task.seed, device_map="cpu",
    ).quantize_and_save(str(task.out), format="fake")  # fmt: skip
    task.end()
    (place,) = {file.parent for file in task.out.rglob("config.json")}
    made = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    for name, p in made.named_parameters():
        some = p.reshape(-1, task.group or p.shape[-1])[0]
        if ".layers." in name and p.dim() == 2 and len(some.unique()) > 2**task.bits:
            raise RuntimeError(f"{name} was left in 16 bits")
    return made


def with_llm_compressor(task: Task, method: str) -> Any:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    task.begin()
    modifier = {"GPTQ": GPTQModifier, "AWQ": AWQModifier, "to nearest": QuantizationModifier}[method]
    if task.scheme in NAMED:
        recipe = modifier(targets="Linear", scheme=NAMED[task.scheme], ignore=["lm_head"])
    else:
        strategy = {"strategy": "channel"} if task.group is None else {"strategy": "group", "group_size": task.group}
        weights = {"num_bits": task.bits, "type": "int", "symmetric": True, **strategy}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = modifier(config_groups=groups, ignore=["lm_head"])
    data = Dataset.from_list(task.rows)
    opened = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    oneshot(model=opened, dataset=data, recipe=recipe, max_seq_length=task.ids.shape[1],
            num_calibration_samples=len(data))  # fmt: skip
    opened.save_pretrained(task.out, save_compressed=True)
    task.end()
    return AutoModelForCausalLM.from_pretrained(task.out)


def with_gptqmodel(task: Task) -> Any:
    os.cpu_count = lambda: 4  # with two cores it reserves all of them and then has none  # type: ignore[assignment]
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import GPTQConfig
    from transformers import AutoModelForCausalLM

    task.begin()
    config = GPTQConfig(bits=task.bits, group_size=-1 if task.group is None else task.group)
    opened = GPTQModel.load(task.model, config, dtype=torch.float32, device="cpu")
    opened.quantize(task.rows, batch_size=1)
    opened.save(str(task.out))
    task.end()
    # Its own kernels run in half precision only; weights are taken out of them for the comparison.
    packed = GPTQModel.load(str(task.out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    plain = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    for name, linear in packed.named_modules():
        if hasattr(linear, "dequantize_weight"):
            plain.get_submodule(name).weight.data = linear.dequantize_weight().mT.float()
    return plain


@dataclass(frozen=True)
class Tool:
    run: Callable[..., Any]
    environment: str | None = None  # None: this one
    options: dict[str, Any] = field(default_factory=dict)


NEAREST = {"init": "none", "learn": False, "block_steps": 0, "tune_steps": 0, "rounding": "rtn"}
GPTQ_ALONE = {"init": "none", "learn": False, "block_steps": 0, "tune_steps": 0}
TOOLS = {
    "parewell GPTQ": Tool(with_parewell, options=GPTQ_ALONE),
    "parewell to nearest": Tool(with_parewell, options=NEAREST),
    "parewell fast": Tool(with_parewell, options={"preset": "fast"}),
    "parewell": Tool(with_parewell),
    "parewell ostquant": Tool(with_parewell, options={"preset": "ostquant"}),
    "parewell best": Tool(with_parewell, options={"preset": "best"}),
    "auto-round light": Tool(with_auto_round, "auto-round", {"iters": 50}),
    "auto-round": Tool(with_auto_round, "auto-round", {"iters": 200}),
    "llm-compressor GPTQ": Tool(with_llm_compressor, "llm-compressor", {"method": "GPTQ"}),
    "llm-compressor to nearest": Tool(with_llm_compressor, "llm-compressor", {"method": "to nearest"}),
    "llm-compressor AWQ": Tool(with_llm_compressor, "llm-compressor", {"method": "AWQ"}),
    "GPTQModel": Tool(with_gptqmodel, "GPTQModel"),
}


def quality(model: Any, folder_of_float: str, test: Path) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder_of_float, dtype=torch.float32)
    nats, own, kl, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for row in load_file(test)["input_ids"]:
            log_q, log_p = (m(row[None]).logits[0, :-1].float().log_softmax(-1) for m in (model, reference))
            nats -= float(log_q.gather(-1, row[1:, None]).sum())
            own -= float(log_p.gather(-1, row[1:, None]).sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            count += len(row) - 1
    return {"perplexity": math.exp(nats / count), "float": math.exp(own / count), "KL": kl / count}


def peak() -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(tool: str, model: str, folder: Path, scheme: str, seed: int) -> None:
    """Prints one line of JSON, the last."""
    import torch

    torch.set_num_threads(1)
    measured: dict[str, float] = {}

    def begin() -> None:
        measured["peak MB"], measured["CPU seconds"] = -peak() / 1e6, -time.process_time()

    def end() -> None:
        measured["CPU seconds"] += time.process_time()
        measured["peak MB"] += peak() / 1e6

    task = Task(model, folder, scheme, seed, begin, end)
    made = TOOLS[tool].run(task, **TOOLS[tool].options)
    measured |= quality(made, model, folder / "test.safetensors")
    if TOOLS[tool].environment != "auto-round":
        measured["stored MB"] = sum(f.stat().st_size for f in task.out.rglob("*.safetensors")) / 1e6
    print(json.dumps(measured))


def interpreter(environment: str | None, cache: Path) -> Path:
    """Of a tool's environment, made if it is not there yet."""
    if environment is None:
        return Path(sys.executable)
    home = cache / f"venv-{environment}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[environment]], check=True)
        (home / "complete").touch()
    return python


def prepare(name: str, folder: Path, cache: Path, count: int) -> Path:
    """Write the same tokens for everybody, `count` rows of a real model's calibration; -> the model's folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from benchmarks.real_models import real_model
    from benchmarks.settings import STORIES, scored, stories
    from benchmarks.stories import model

    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    if name == "stories260k":
        place, length, counts = padded(model(), folder / "model"), 256, (100, 40)
        texts = [stories()[:STORIES], scored(stories())]
    else:
        place, length, counts = real_model(name, cache), 512, (count, 20)
        crawled = (text / "c4-sample-1000.jsonl").read_text().splitlines()
        texts = [[json.loads(line)["text"] for line in crawled], [(text / "wikitext2-raw-test.txt").read_text()]]
    tokenizer = AutoTokenizer.from_pretrained(place)
    leads = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    begin = [tokenizer.bos_token_id] if leads and name != "stories260k" else []  # whose stories have one each
    own = length - len(begin)
    for part, written, wanted in zip(("rows", "test"), texts, counts, strict=True):
        ids = [i for one in written for i in tokenizer(one, add_special_tokens=not begin, verbose=False)["input_ids"]]
        found = min(wanted, len(ids) // own)
        rows = torch.tensor([begin + ids[i * own : (i + 1) * own] for i in range(found)])
        save_file({"input_ids": rows}, folder / f"{part}.safetensors")
    return place


def padded(model: Path, folder: Path, multiple: int = 32) -> Path:
    """Add zeros for neurons, as many as make their number a multiple; the function stays. auto-round leaves linears in
    16 bits where a width is no multiple of 32."""
    import torch
    from torch.nn.functional import pad
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = type(small.config)(**small.config.to_dict())
    config.intermediate_size = -(-config.intermediate_size // multiple) * multiple
    wide = type(small)(config)
    old = small.state_dict()
    wide.load_state_dict(
        {n: pad(old[n], (0, w.shape[-1] - old[n].shape[-1], *([0, len(w) - len(old[n])] * (w.dim() > 1)))) for n, w in
         wide.state_dict().items()}
    )  # fmt: skip
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def measured(tool: str, scheme: str, seed: int, model: str, cache: Path, rows: int) -> dict[str, float]:
    """One run of a tool, in a process and an environment of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        place = prepare(model, Path(scratch), cache, rows).resolve()
        environment = TOOLS[tool].environment
        script = ["-m", "benchmarks.peers"] if environment is None else [Path(__file__).resolve()]
        done = subprocess.run(
            [interpreter(environment, cache), *script, "--run", tool, place, scratch, scheme, str(seed)],
            capture_output=True, text=True, check=False, cwd=scratch if environment else None,  # some leave logs there
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{tool}, {scheme}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="stories260k")
    parser.add_argument("--schemes", nargs="+", default=["w4a16-g64"])
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=128, help="of calibration, for real models")
    parser.add_argument("--name", help="of the results; peers-MODEL by default")
    parser.add_argument("--add", nargs="+", metavar="NAME", default=[], help="results whose lines are taken along")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/parewell-benchmarks")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        tool, model, folder, scheme, seed = args.run
        run(tool, model, Path(folder), scheme, int(seed))
        return
    from benchmarks import record

    name = args.name or f"peers-{args.model}"
    earlier = [json.loads((record.RESULTS / f"{one}.json").read_text()) for one in args.add]
    rows: list[dict[str, Any]] = [row for one in earlier for row in one["rows"]]
    versions = ", ".join(packages[1] for packages in ENVIRONMENTS.values())
    notes = f"{__doc__.partition(chr(10))[0]} Means of seeds. {versions}"
    if earlier:
        notes += "\n\nLines of other runs: " + "; ".join(f"`{one['command']}` ({one['machine']})" for one in earlier)
    for scheme in args.schemes:
        for tool in args.tools:
            row: dict[str, Any] = {"scheme": scheme, "tool": tool}
            rows = [one for one in rows if (one["scheme"], one["tool"]) != (scheme, tool)]
            try:
                found = [measured(tool, scheme, seed, args.model, args.cache, args.rows) for seed in args.seeds]
            except RuntimeError as error:  # a scheme that a tool does not do is a line of the table
                print(error, flush=True)
                rows.append(row | {"note": "fails: " + str(error).strip().splitlines()[-1][:100]})
                continue
            row |= {name: statistics.fmean(one[name] for one in found) for name in found[0]}
            if len(found) > 1:
                row["KL, spread"] = max(one["KL"] for one in found) - min(one["KL"] for one in found)
            rows.append(row)
            record.write(name, rows, notes)
    record.write(name, rows, notes)


if __name__ == "__main__":
    main()
