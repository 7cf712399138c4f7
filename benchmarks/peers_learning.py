"""Learning beside auto-round's, each tool at its defaults: the embedded model, 4-bit weights, groups of 64, symmetric.

    python -m benchmarks.peers_learning

Both get the same float32 folder and the same 128 x 256 tokens of the embedded text, and write a checkpoint that is
loaded back by transformers: parewell learns transforms in 100 steps and tunes scales in 50, auto-round takes 200 steps
of signed gradient descent a block. Beside them parewell without learning. Seconds are from the call that opens the
model to the end of the one that saves, one thread each, the tools in turn; memory is the process's peak (VmHWM) in that
time, less that of an interpreter with the same libraries imported. Perplexity, and KL from the float model in nats a
token, are on held-out topics; three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__:
    from benchmarks.peers import Timed, interpreter, peak, quality
else:  # in another tool's environment
    from peers import Timed, interpreter, peak, quality

AUTO_ROUND = ("torch==2.13.0", "auto-round==0.16.1")
ROWS, TEST, LENGTH = 128, 40, 256


def with_parewell(model: str, rows: Path, out: Path, seed: int, begin: Timed, end: Timed, *, learn: bool = True) -> Any:
    from transformers import AutoModelForCausalLM

    from compressor import Quantize, quantize

    begin()
    options = Quantize(scheme="w4a16-g64", data=rows, held_out=16, samples=ROWS, seed=seed)
    quantize(model, out, options if learn else options.without_learning(), resume=False)
    end()
    return AutoModelForCausalLM.from_pretrained(out)


def without_learning(model: str, rows: Path, out: Path, seed: int, begin: Timed, end: Timed) -> Any:
    return with_parewell(model, rows, out, seed, begin, end, learn=False)


def with_auto_round(model: str, rows: Path, out: Path, seed: int, begin: Timed, end: Timed) -> Any:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begin()
    ids = load_file(rows)["input_ids"][:ROWS]
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    rounded = AutoRound(
        model, scheme="W4A16", tokenizer=AutoTokenizer.from_pretrained(model), dataset=data, group_size=64, sym=True,
        nsamples=ROWS, seqlen=LENGTH, seed=seed, device_map="cpu",
    )  # fmt: skip
    _, place = rounded.quantize_and_save(str(out), format="auto_round")
    end()
    return AutoModelForCausalLM.from_pretrained(place if isinstance(place, str) else place[0])


RUNS = {"parewell": with_parewell, "parewell --no-learn": without_learning, "auto-round": with_auto_round}


def run(tool: str, model: str, folder: Path, seed: int) -> None:
    """Prints one line of JSON, the last."""
    measured: dict[str, float] = {}

    def begin() -> None:
        measured["bytes"], measured["seconds"] = -peak(), -time.monotonic()

    def end() -> None:
        measured["seconds"] += time.monotonic()
        measured["bytes"] += peak()

    out = folder / "out"
    made = RUNS[tool](model, folder / "rows.safetensors", out, seed, begin, end)
    measured |= quality(made, model, folder / "test.safetensors")
    print(json.dumps(measured | {"stored": sum(f.stat().st_size for f in out.rglob("*.safetensors"))}))


def prepare(folder: Path) -> Path:
    """The same rows, and the model in float32, for everybody."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calib.embedded import MODEL, python_topics

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for kind, name, count in (("train", "rows", ROWS + 16), ("held-out", "test", TEST)):
        ids = [i for text in python_topics(kind) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        whole = torch.tensor(ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)]).view(-1, LENGTH - 1)
        drawn = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:count]]
        led = torch.cat([torch.full((len(drawn), 1), tokenizer.bos_token_id), drawn], 1)
        save_file({"input_ids": led.contiguous()}, folder / f"{name}.safetensors")
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/parewell-benchmarks")
    parser.add_argument("--run", nargs=4, metavar=("TOOL", "MODEL", "FOLDER", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        tool, model, folder, seed = args.run
        run(tool, model, Path(folder), int(seed))
        return
    from benchmarks import peers, record

    peers.PEERS["auto-round"] = AUTO_ROUND
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in RUNS}
    for seed in args.seeds:
        for tool in RUNS:
            with tempfile.TemporaryDirectory() as scratch:
                model = prepare(Path(scratch))
                own = tool != "auto-round"
                script = ["-m", "benchmarks.peers_learning"] if own else [Path(__file__).resolve()]
                command = [interpreter(tool, args.cache), *script, "--run", tool, model, scratch, str(seed)]
                alone = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, cwd=None if own else scratch, env=alone
                )
                if done.returncode:
                    raise SystemExit(f"{tool}: {done.stderr[-3000:]}")
                found[tool].append(json.loads(done.stdout.splitlines()[-1]))
                print(tool, seed, found[tool][-1], flush=True)

    def spread(tool: str, name: str) -> str:
        values = [one[name] for one in found[tool]]
        return f"{statistics.mean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")

    rows = [
        {
            "tool": f"auto-round {AUTO_ROUND[1].partition('==')[2]}" if tool == "auto-round" else tool,
            "seconds": spread(tool, "seconds"),
            "peak MB": statistics.median(one["bytes"] for one in found[tool]) / 1e6,
            "stored MB": statistics.median(one["stored"] for one in found[tool]) / 1e6,
            "perplexity": spread(tool, "perplexity"),
            "KL": spread(tool, "kl"),
        }
        for tool in RUNS
    ]
    record.write("peers-learning", rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
