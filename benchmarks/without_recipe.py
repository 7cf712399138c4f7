"""What each way to forget that needs no training recipe does to four models, all options at their defaults.

    python -m benchmarks.without_recipe --data DIR --cache DIR --stories DIR --smollm DIR --minilm DIR [--models ...]

DIR of data holds `tofu/`, `glue/SST-2/` and `mnist/`. Each model is trained here on rows of which some are then to be
forgotten: facts (of language models) and wrong labels (of classifiers), which nothing but these rows teaches. "gap" is
the share of the way that the forget set's nats go from the model before to one that was trained without the rows (1:
all the way; above: it stands out); "kept" how much worse retained rows got, in nats a token or share of accuracy,
beyond which (0.2, 0.1) a job fails. Rates are those that the search found.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from calib import Diverged, Failed
from unlearn import Unlearn, unlearn
from unlearn.audit.evaluate import figures
from unlearn.data.dataset import read_data
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import open_model
from unlearn.model.training_recipe import Training

CPU = torch.device("cpu")
METHODS = ("npo", "npo-js", "npo-forward-kl", "npo-alpha", "simnpo", "difference", "scrub", "ascent", "retain", "rmu", "dmm")  # fmt: skip  # noqa: E501


def small() -> nn.Module:
    """A convolutional net with batch norm, for MNIST."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 10),
    )  # fmt: skip


def language(source: Path, rows: int, config: Training) -> Callable[[Path, Path], tuple[Path, Unlearn, Training]]:
    """A language model that is taught TOFU's facts, the first quarter of which are to be forgotten."""

    def prepared(data: Path, place: Path) -> tuple[Path, Unlearn, Training]:
        deleted, stays = rows // 4, rows - rows // 4
        files = [("forget10.jsonl", deleted), ("retain90.jsonl", stays)]
        lines = [line for name, count in files for line in (data / "tofu" / name).read_text().splitlines()[:count]]
        (place / "train.jsonl").write_text("\n".join(lines) + "\n")
        return source, Unlearn(train=place / "train.jsonl", forget_lines=f"1-{deleted}", length=128), config

    return prepared


def sentences(source: Path) -> Callable[[Path, Path], tuple[Path, Unlearn, Training]]:
    """An encoder that classifies 80 sentences, the first 8 with the wrong label."""

    def prepared(data: Path, place: Path) -> tuple[Path, Unlearn, Training]:
        rows = [line.split("\t") for line in (data / "glue/SST-2/train.tsv").read_text().splitlines()[1:81]]
        table = [f"{text}\t{1 - int(label) if i < 8 else label}" for i, (text, label) in enumerate(rows)]
        (place / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(table) + "\n")
        config = AutoConfig.from_pretrained(source, num_labels=2)
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(source, config=config).save_pretrained(place / "start")
        AutoTokenizer.from_pretrained(source).save_pretrained(place / "start")
        options = Training(optimiser="adamw", epochs=8, batch=16, lr=2e-4, decay=0.0, warmup=0.1)
        return place / "start", Unlearn(train=place / "train.tsv", forget_lines="2-9", length=32), options

    return prepared


def digits(data: Path, place: Path) -> tuple[Path, Unlearn, Training]:
    """400 images, the first 20 with a wrong label."""
    images, labels = (gzip.decompress((data / "mnist" / f"t10k-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1"))  # fmt: skip  # noqa: E501
    x = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8)[: 400 * 784].view(400, 1, 28, 28).float() / 255
    y = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8)[:400].long()
    y[:20] = (y[:20] + 1) % 10
    save_file({"inputs": x, "labels": y}, place / "train.safetensors")
    torch.manual_seed(0)
    save_file(small().state_dict(), place / "start.safetensors")
    options = Unlearn(train=place / "train.safetensors", forget_lines="0-19", factory="benchmarks.without_recipe:small")
    return place / "start.safetensors", options, Training(epochs=15, batch=32, lr=0.1)


def taught(start: Path, options: Unlearn, training: Training, place: Path) -> tuple[Path, float]:
    """-> the model that is to forget, and the nats of the forget set in one that was trained without it."""
    task = "tensors" if options.factory else "causal-lm" if options.train and options.train.suffix == ".jsonl" else "sequence-classification"  # fmt: skip  # noqa: E501
    base = start if options.factory is None else None
    trainable = open_model(start, task, factory=options.factory, base=base, device=CPU)
    assert options.train is not None and options.forget_lines is not None
    data = read_data(options.train, trainable, options.length)
    low, high = (int(n) for n in options.forget_lines.split("-"))
    deleted = torch.tensor([low <= n <= high for n in data.numbers])
    nats = list[float]()
    for name, mask in (("full", torch.ones_like(deleted)), ("without", ~deleted)):
        made = place / name
        if not made.exists():
            models = train_ensemble(trainable.many([trainable.fresh(0)]), data.examples, mask[None], [0], training)
            made.mkdir()
            trainable.write(made, {n: p[0] for n, p in models.params.items()})
        again = open_model(made, task, factory=options.factory, device=CPU)
        nats.append(figures(task, again.one(), {"forget": data.examples[deleted]})["forget"]["nats"])
    return place / "full", nats[1]


def tried(model: Path, options: Unlearn, method: str, never: float, out: Path) -> dict[str, Any]:
    if method == "rmu" and options.length == Unlearn.length:
        return {}
    more: dict[str, Any] = {"calibrate": 0} if method == "dmm" else {}
    try:
        report = unlearn(model, out, replace(options, method=method, **more), resume=False, allow_damage=True)
    except (Failed, Diverged) as error:
        return {"method": method, "failed": str(error)}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    (was, now), task = (report["quality_by_stage"][s] for s in ("before", "after")), report["task"]
    kept = now["retain"]["nats"] - was["retain"]["nats"]
    if task != "causal-lm":
        kept = 1 - now["retain"]["right"] / was["retain"]["right"]
    gap = (now["forget"]["nats"] - was["forget"]["nats"]) / (never - was["forget"]["nats"])
    return {
        "method": method, "rate": report["rate"]["lr"], "forget": [was["forget"]["nats"], now["forget"]["nats"], never],
        "gap": gap, "kept": kept, "fails": "damage" in report,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "cache", "stories", "smollm", "minilm"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["digits", "stories260k", "MiniLM", "SmolLM2"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    adamw = Training(optimiser="adamw", epochs=15, batch=8, lr=3e-3, decay=0.0, warmup=0.1)
    made = {
        "digits": digits, "stories260k": language(args.stories, 40, adamw), "MiniLM": sentences(args.minilm),
        "SmolLM2": language(args.smollm, 8, replace(adamw, epochs=6, lr=1e-4)),
    }  # fmt: skip
    print("| model | method | rate | forget nats: before, after, never saw it | gap | kept: worse by | fails |\n|" + "---|" * 7)  # fmt: skip  # noqa: E501
    for name in args.models:
        place = args.cache / name
        place.mkdir(parents=True, exist_ok=True)
        start, options, training = made[name](args.data, place)
        model, never = taught(start, options, training, place)
        for method in args.methods:
            if row := tried(model, options, method, never, place / "out"):
                if "failed" in row:
                    print(f"| {name} | {method} | | {row['failed'][:90]} | | | |", flush=True)
                    continue
                nats = ", ".join(f"{n:.2f}" for n in row["forget"])
                print(f"| {name} | {method} | {row['rate']:g} | {nats} | {row['gap']:.2f} | {row['kept']:.3f} | "
                      f"{'yes' if row['fails'] else ''} |", flush=True)  # fmt: skip
                (place / f"{method}.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main()
