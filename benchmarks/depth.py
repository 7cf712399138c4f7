"""Memory against depth: learn + GPTQ on random LLaMA-type checkpoints of 4, 8, 16 and 32 blocks of the same width.

    python -m benchmarks.depth [--steps]

Each job runs in a process of its own; its peak is what the operating system accounts it (VmHWM), less that of an
interpreter with the same libraries imported. Beside it the same job with the model held in memory and the whole model
in one graph while it learns, for as many blocks as that takes less than --most GiB. With --steps: the time of a
streamed step of learning over that of a step in memory, in one process, by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from benchmarks import record
from benchmarks.peers import peak
from calib.blockwise.backward import BlockSequence
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import skeleton
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.jobs.output_folder import Shards, write_json
from calib.losses.top_k import top_k
from calib.model.weights import Weights
from calib.quant.scheme import Scheme
from calib.runtime.memory import limit_malloc_cache
from compressor import Quantize, quantize
from compressor.quantization.learn_transforms import LearnedModel, initial_transforms
from compressor.quantization.objective import CalibrationData, Objective, calibration_gradients

DEPTHS = (4, 8, 16, 32)
WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
VOCAB = 4096
JOB = {
    "scheme": "w4a16-channel",
    "samples": 8,
    "held_out": 2,
    "length": 128,
    "steps": 2,
    "batch": 2,
    "block_steps": 0,
    "tune_steps": 0,
}


matching = sys.modules["compressor.quantization.objective"]


def make(layers: int, folder: Path) -> Path:
    """Weights drawn at random, in float32: about 47 MB a block."""
    folder.mkdir()
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, head_dim=64, tie_word_embeddings=False, **WIDTHS)
    generator, shards = torch.Generator().manual_seed(0), Shards(folder, limit=2**28)
    for name, p in skeleton(config, torch.device("cpu")).named_parameters():
        norm = name.endswith("norm.weight")
        shards.add({name: torch.ones(p.shape) if norm else 0.02 * torch.randn(p.shape, generator=generator)})
    shards.close()
    write_json(folder / "config.json", config.to_dict())
    save_file({"input_ids": torch.randint(VOCAB, (10, 128), generator=generator)}, folder.parent / "ids.safetensors")
    return folder


def job(folder: Path, held: bool) -> None:
    """One job in this process; prints its peak and that of what it started with."""
    torch.set_num_threads(1)
    bare = peak()
    if held:
        hold_models()
    budget = 100.0 if held else 0.005
    began = time.monotonic()
    options = Quantize(data=folder.parent / "ids.safetensors", memory_budget=budget, **JOB)  # type: ignore[arg-type]
    quantize(folder, folder.parent / "out", options, resume=False)
    print(json.dumps({"bytes": peak() - bare, "seconds": time.monotonic() - began}))


def hold_models() -> None:
    """From now on weights are read once and kept, and gradients are those of one graph through the whole model."""
    kept: dict[str, torch.Tensor] = {}
    read = Weights.read

    def read_once(self: Weights, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        kept.update(read(self, [name for name in names if name not in kept]))
        return {name: kept[name] for name in names}

    Weights.read = read_once  # type: ignore[method-assign]
    matching.backward = in_one_graph  # type: ignore[attr-defined]


def in_one_graph(walk: BlockSequence[Any], first: torch.Tensor, last: Any, inputs: Any, batches: Any) -> float:
    """What `calib.blockwise.backward.backward` computes, as anybody would write it first."""
    hidden = first
    for i, raw in walk.reading(range(walk.layers)):
        params = walk.prepare(i, raw)
        hidden = torch.cat([walk.run(i, params, hidden[rows], batch) for rows, batch in batches])
    loss, gradient = last(slice(0, len(first)), hidden.detach())
    hidden.backward(gradient)
    return loss  # type: ignore[no-any-return]


def step_times(folder: Path, pairs: int, tokens: int) -> list[float]:
    """Streamed over in-memory seconds of one learning step, by turns."""
    limit_malloc_cache(2**31)
    torch.set_num_threads(1)
    stream = BlockwiseModel(AutoConfig.from_pretrained(folder), Weights(folder), torch.device("cpu"))
    ids = torch.randint(VOCAB, (4, tokens), generator=torch.Generator().manual_seed(1))
    rows = Corpus(ids, torch.ones_like(ids, dtype=torch.bool), "random", None)
    blocks = [stream.read_block(i) for i in range(stream.layers)]
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        teacher = TeacherCache(Journal(Path(scratch)))
        for row in range(4):
            teacher.write(row, top_k(torch.randn(tokens, VOCAB), 64))
        start = initial_transforms(stream, "hadamard", Scheme.parse("w4a16-channel"), online=False, seed=0)
        model = LearnedModel(stream, start, Scheme.parse("w4a16-channel"), 2**31)
        options, seconds = Objective(steps=1, batch=4, loss="tail", cross_entropy=0.0, seed=0), []

        def held(order: Iterable[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
            return ((i, blocks[i]) for i in order)

        function, data = model.function(), CalibrationData(rows, teacher)
        context = RunContext(Journal(Path(scratch)), 2**30)
        backward = matching.backward  # type: ignore[attr-defined]
        ways_of_walking = ((model.walk, backward), (replace(model.walk, reading=held), in_one_graph))
        for step in range(1, 2 * pairs + 3):
            walk, matching.backward = ways_of_walking[step % 2]  # type: ignore[attr-defined]
            gradients = calibration_gradients(replace(function, blocks=walk), data, options, context)
            began = time.perf_counter()
            model.begin(step)
            gradients([0, 1, 2, 3])
            seconds.append(time.perf_counter() - began)
            for p in [r.tangent for r in model.rotations] + [s for b in model.blocks for s in b.scales]:
                p.grad = None
        matching.backward = backward  # type: ignore[attr-defined]
    for streamed, in_memory in zip(seconds[3::2], seconds[2::2], strict=False):
        ratios.append(streamed / in_memory)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--most", type=float, default=12.0, help="GiB that a job in memory may be expected to take")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="step times instead of memory")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        steps(args.pairs)
        return
    if args.job:
        job(args.job, args.held)
        return
    rows: list[dict[str, Any]] = []
    for layers in args.depths:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make(layers, Path(scratch) / "model")
            checkpoint = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            for held in (False, True):
                if held and 12 * checkpoint > args.most * 2**30:
                    continue
                command = [sys.executable, "-m", "benchmarks.depth", "--job", str(folder), *(["--held"] * held)]
                result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                rows.append(
                    {
                        "blocks": layers,
                        "checkpoint MB": checkpoint / 1e6,
                        "model": "in memory" if held else "streamed",
                        "peak MB": result["bytes"] / 1e6,
                        "of the checkpoint": f"{result['bytes'] / checkpoint:.1%}",
                        "seconds": result["seconds"],
                    }
                )
                record.write("depth", rows, __doc__.partition("\n")[0])
    streamed = {row["blocks"]: row["peak MB"] for row in rows if row["model"] == "streamed"}
    least, most = min(streamed), max(streamed)
    block = 4 * (2 * 1024**2 + 2 * 1024 * 512 + 3 * 1024 * 2816) / 1e6
    if most > least:
        growth = (streamed[most] - streamed[least]) / (most - least)
        of_one = f"{growth / block:.1%} of one"
        plot(rows)
        rows.append({"blocks": "growth per block", "peak MB": growth, "of the checkpoint": of_one})
    record.write("depth", rows, __doc__.partition("\n")[0])


def plot(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for model in ("streamed", "in memory"):
        some = [row for row in rows if row["model"] == model]
        axes.plot([r["blocks"] for r in some], [r["peak MB"] for r in some], marker="o", label=f"peak, model {model}")
    sizes = {row["blocks"]: row["checkpoint MB"] for row in rows}
    axes.plot(sizes.keys(), sizes.values(), linestyle="--", color="gray", label="size of the checkpoint")
    axes.set(xlabel="blocks", ylabel="MB", title="Learn + GPTQ: peak memory above a bare interpreter", ylim=0)
    axes.legend()
    figure.savefig(record.RESULTS / "depth.svg", metadata={"Date": None})


def steps(pairs: int) -> None:
    """The table of step times."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(4, Path(scratch) / "model")
        for tokens in (128, 512):
            ratios = step_times(folder, pairs, tokens)
            row = {"rows x tokens": f"4 x {tokens}", "streamed / in memory": statistics.median(ratios)}
            rows.append(row | {"least": min(ratios), "most": max(ratios), "pairs": pairs})
    record.write("depth-steps", rows, "Seconds of one learning step, 4 blocks, by turns in one process.")


if __name__ == "__main__":
    main()
