"""What a job asks of an accelerator, counted on the pretend one of the tests: kernel launches, copies, waits.

    python -m benchmarks.launches [--before FILE]

A LLaMA of four blocks (width 256, feed-forward 704, 2,000 tokens), w4a16-g64, blocks and hidden states kept on the
device. Counted are one learning step (neither the first nor one that searches clip ratios), and for one block the clip
search and GPTQ. Counts do not depend on the machine. `--before` is the JSON of an earlier version, to stand beside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.losses.top_k import top_k
from calib.model.weights import Weights
from calib.quant.grid import fit_clipped
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.stats.moments import Moments
from compressor.quantization.learn_transforms import initial_transforms, learn_transforms
from compressor.quantization.objective import CalibrationData, Objective
from compressor.quantization.rounding import Rounder, round_linears
from tests import pretend, tiny


def model(folder: Path, layers: int = 4) -> Path:
    config = tiny.config_of(
        "llama", num_hidden_layers=layers, hidden_size=256, intermediate_size=704, vocab_size=2000,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    return tiny.save(tiny.model_of(config, dtype=torch.float32), folder)


def step(folder: Path, device: torch.device, rows: int, tokens: int) -> dict[str, int]:
    """Of one learning step of `rows` rows."""
    from calib.model.config import read_config

    stream = BlockwiseModel(read_config(folder), Weights(folder), device)
    ids = torch.randint(3, 2000, (8, tokens), generator=torch.Generator().manual_seed(0))
    corpus = Corpus(ids, torch.ones_like(ids, dtype=torch.bool), "drawn")
    found = list[dict[str, int]]()

    def after(number: int, loss: float) -> None:
        if number:
            found.append(pretend.counted())
        pretend.reset()

    with tempfile.TemporaryDirectory() as place:
        teacher = TeacherCache(Journal(Path(place)))
        for row in range(len(ids)):
            teacher.write(row, top_k(torch.randn(tokens, 2000), 8))
        scheme = Scheme.parse("w4a16-g64")
        learn_transforms(
            stream, CalibrationData(corpus, teacher),
            initial_transforms(stream, "hadamard", scheme, online=False, seed=0), scheme,
            Objective(steps=3, batch=rows, loss="tail", cross_entropy=0.0, seed=0),
            RunContext(Journal(Path(place)), 2**30, after_step=after), lr_rotation=1e-3, lr_scale=1e-3,
        )  # fmt: skip
    return found[-1]


def of_block(folder: Path, device: torch.device) -> dict[str, int]:
    """Launches of one block's clip search, and of GPTQ without it."""
    from calib.model.config import read_config

    stream, grid = BlockwiseModel(read_config(folder), Weights(folder), device), Grid(4, group=64)
    params, found = stream.read_block(0), {"clip search": 0, "gptq": 0}
    sites = dict[str, dict[str, torch.Tensor]]()
    for linear in stream.linears(0):
        sites.setdefault(linear.site, {})[linear.name] = linear.of(params)
    for weights in sites.values():
        width = next(iter(weights.values())).shape[1]
        inputs = Moments.zero(width, device).add(torch.randn(2 * width, width).to(device))

        def launches(work: Callable[[], Any]) -> int:
            pretend.reset()
            work()
            return pretend.counted()["launches"]

        clip = launches(lambda weights=weights: fit_clipped(torch.cat(list(weights.values())), grid, torch.bfloat16))
        rounded = launches(
            lambda weights=weights, inputs=inputs: round_linears(
                weights, inputs, dict.fromkeys(weights, grid), Rounder("gptq", 0.01), torch.bfloat16
            )
        )
        found["clip search"] += clip
        found["gptq"] += rounded - clip
    return found


def counts() -> list[dict[str, Any]]:
    device = pretend.device()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = model(Path(place) / "model")
        size = sum(entry.bytes for entry in Weights(folder).entries.values())
        found = list[dict[str, Any]]()
        for rows, tokens in ((4, 64), (8, 64), (4, 128)):
            of = step(folder, device, rows, tokens)
            name = f"learning step, {rows} rows of {tokens}"
            found.append({"what": name, "launches": of["launches"], "waits": of["waits"]})
            found[-1]["to the device, share of the model"] = of["to_device_bytes"] / size
        block = of_block(folder, device)
        found += [{"what": f"{name}, one block", "launches": n} for name, n in block.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    asked = parser.parse_args()
    found = counts()
    if asked.before is not None:
        before = {row["what"]: row for row in json.loads(asked.before.read_text())["rows"]}
        found = [
            row | {f"{name}, before": before[row["what"]][name] for name in list(row) if name != "what"}
            for row in found
        ]  # fmt: skip
    for row in found:
        print(row)
    write("launches", found, "Counts on a pretend device.", "launches")


if __name__ == "__main__":
    main()
