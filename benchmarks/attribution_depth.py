"""Memory of attribution against depth: random LLaMA-type checkpoints of the same width, read block by block.

    python -m benchmarks.attribution_depth [--depths 4 8 16 32]

48 training rows and 8 queries of 128 random tokens, gradients projected to 16 x 16 numbers a weight. Each job runs in a
process of its own; its peak is what the operating system accounts it (VmHWM), less that of an interpreter with the same
libraries imported. Beside it the same scores from the model in memory, with chunks of as many tokens and its graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks import record
from benchmarks.peers import peak
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import skeleton
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.jobs.output_folder import Shards, write_json
from calib.model.config import read_config
from calib.model.per_example_gradients import projections
from calib.model.weights import Weights, read_file
from calib.runtime.memory import limit_malloc_cache
from unlearn.datamodels.attribute import blockwise_scores
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.model.examples import Examples
from unlearn.model.model import open_model
from unlearn.options.attribution import Attribute

DEPTHS = (4, 8, 16, 32)
WIDTHS = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
VOCAB, TRAIN, QUERIES, TOKENS, CHUNK = 4096, 48, 8, 128, 1024
BUDGET = 2**22  # bytes of hidden states in RAM
HOW = Attribute(train=Path(), query=Path(), micro_batch_tokens=CHUNK)


def make(layers: int, folder: Path) -> Path:
    """Weights drawn at random, in float32: about 12 MB a block."""
    folder.mkdir()
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, head_dim=64, tie_word_embeddings=False, **WIDTHS)
    generator, shards = torch.Generator().manual_seed(0), Shards(folder, limit=2**25)
    for name, p in skeleton(config, torch.device("cpu")).named_parameters():
        norm = name.endswith("norm.weight")
        shards.add({name: torch.ones(p.shape) if norm else 0.02 * torch.randn(p.shape, generator=generator)})
    shards.close()
    write_json(folder / "config.json", config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    ids = torch.randint(VOCAB, (TRAIN + QUERIES, TOKENS), generator=generator)
    save_file({"input_ids": ids}, folder.parent / "ids.safetensors")
    return folder


def rows_of(ids: torch.Tensor) -> Examples:
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return Examples({"input_ids": ids}, labels)


def job(folder: Path, held: bool) -> None:
    """One attribution in this process; prints its peak less that of what it started with, and keeps the scores."""
    torch.set_num_threads(1)
    limit_malloc_cache(BUDGET)
    ids = read_file(folder.parent / "ids.safetensors")[0]["input_ids"]
    train, query = rows_of(ids[:TRAIN]), rows_of(ids[TRAIN:])
    bare, began = peak(), time.monotonic()
    scores = in_memory(folder, train, query) if held else walked(folder, train, query)
    save_file({"scores": scores}, folder.parent / f"{held}.safetensors")
    print(json.dumps({"bytes": peak() - bare, "seconds": time.monotonic() - began}))


def walked(folder: Path, train: Examples, query: Examples) -> torch.Tensor:
    stream = BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        return blockwise_scores(stream, train, query, HOW, RunContext(Journal(Path(scratch)), BUDGET))


def in_memory(folder: Path, train: Examples, query: Examples) -> torch.Tensor:
    trainable = open_model(folder, "causal-lm", device=torch.device("cpu"))
    projected = projections(trainable.linears, HOW.width, HOW.seed)
    seen = Seen(trainable.forward, trainable.state, trainable.linears, projected, trainable.forward, CHUNK)
    each = [seen.gradients(train[some], i) for i, some in enumerate(seen.chunks(train))]
    own, drawn = (torch.cat(parts) for parts in zip(*each, strict=True))
    asked = torch.cat([seen.of_outputs(query[some]) for some in seen.chunks(query)])
    return Attribution.of(own, second_moment(drawn, seen.blocks), HOW.damping).scores(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args.job, args.held)
        return
    rows: list[dict[str, Any]] = []
    for layers in args.depths:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make(layers, Path(scratch) / "model")
            checkpoint = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            for held in (False, True):
                command = [sys.executable, "-m", "benchmarks.attribution_depth", "--job", str(folder)]
                done = subprocess.run([*command, *(["--held"] * held)], capture_output=True, text=True, check=True)
                result = json.loads(done.stdout)
                rows.append(
                    {
                        "blocks": layers,
                        "checkpoint MB": checkpoint / 1e6,
                        "model": "in memory" if held else "block by block",
                        "peak MB": result["bytes"] / 1e6,
                        "of the checkpoint": f"{result['bytes'] / checkpoint:.0%}",
                        "seconds": result["seconds"],
                    }
                )
            one, other = (read_file(Path(scratch) / f"{held}.safetensors")[0]["scores"] for held in (True, False))
            rows[-1]["scores apart"] = f"{float((one - other).norm() / one.norm()):.1e}"
    record.write("attribution-depth", rows, str(__doc__).partition("\n")[0], "attribution_depth")


if __name__ == "__main__":
    main()
