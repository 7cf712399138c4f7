"""TOFU's fictitious authors, learned by stories260k and forgotten again: forget quality and what is left of the rest.

    python -m benchmarks.tofu --data DIR --model DIR --cache DIR [--seeds 0 1 2] [--sets forget01 forget10]
    python -m benchmarks.tofu ... --prepare     # only train the models: all rows, and without each forget set

Trained on forget10 (400 questions) and on the first 440 of retain90, which are all that have perturbed answers. Forget
quality is the p-value of truth ratios against those of a model of the same seed that never saw the forget set, after
the sheet of TOFU (arXiv:2401.06121); utility the harmonic mean of probability, ROUGE-L recall and truth score on
retained, real authors' and world facts' questions (the first 60 of each). Cost is in rows that pass in training,
percent of a retrain.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import record
from calib import BadInput
from calib.fit import Diverged
from unlearn import Unlearn, unlearn
from unlearn.data import read_data
from unlearn.ensemble import Training, train
from unlearn.models import open_model

HOW = Training(optimiser="adamw", epochs=15, batch=8, lr=3e-3, decay=0.0, warmup=0.1)
RETAINED, ASKED, LENGTH = 440, 60, 256
SETS = {"forget01": 40, "forget10": 400}
USEFUL = {
    "retained": "retain_perturbed.jsonl",
    "authors": "real_authors_perturbed.json",
    "world": "world_facts_perturbed.json",
}
CPU = torch.device("cpu")


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / name).read_text().split("\n") if line.strip()]


def prepared(args: argparse.Namespace) -> None:
    """Files of rows, and models trained on all of them and without each forget set, in the cache."""
    cache, data = args.cache, args.data
    cache.mkdir(exist_ok=True)
    forget, retain = rows_of(data, "forget10.jsonl"), rows_of(data, "retain90.jsonl")[:RETAINED]
    everything = forget + retain
    write(cache / "train.jsonl", everything)
    for name, count in SETS.items():
        write(cache / f"{name}.jsonl", forget[:count])
        write(cache / f"{name}-probes.jsonl", rows_of(data, "forget10_perturbed.jsonl")[:count])
    for name, file in USEFUL.items():
        write(cache / f"{name}.jsonl", rows_of(data, file)[:ASKED])
    (cache / "training.json").write_text(json.dumps(asdict(HOW)))
    for seed in args.seeds:
        for name, left in {"full": 0, **SETS}.items():
            if name not in ("full", *args.sets) or (cache / f"{name}-{seed}/config.json").exists():
                continue
            opened = open_model(args.model, "causal-lm", device=CPU)
            rows = read_data(cache / "train.jsonl", opened, LENGTH).examples
            mask = torch.ones(1, len(rows), dtype=torch.bool)
            mask[:, :left] = False
            trained = train(opened.one(), rows, mask, [seed], HOW)
            place = cache / f"{name}-{seed}"
            place.mkdir(exist_ok=True)
            opened.write(place, {n: p[0] for n, p in trained.params.items()})
            print("trained", place.name, flush=True)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ways(name: str) -> dict[str, dict[str, Any]]:
    """Options of every method on a forget set."""
    epochs = 4 if name == "forget10" else 8
    shared = {"epochs": epochs, "batch": 8, "retain_multiplier": 1.0 if name == "forget10" else 4.0}
    found: dict[str, dict[str, Any]] = {
        method: {"method": method, "lr": 1e-3} | shared
        for method in ("ascent", "difference", "retain", "npo", "npo-js", "simnpo", "scrub", "rmu")
    }
    found["ascent"]["lr"] = 1e-4
    found["difference, kl"] = found["difference"] | {"retain_loss": "kl"}
    found["npo, kl"] = found["npo"] | {"retain_loss": "kl"}
    found["dmm"] = {"method": "dmm", "lr": 1e-3, "multiplier": 1.0, "width": 16} | shared
    return found


def run(args: argparse.Namespace, seed: int, name: str, label: str, options: dict[str, Any]) -> dict[str, Any]:
    """One method on one forget set."""
    cache, out = args.cache, args.cache / f"out-{name}-{seed}-{label.replace(', ', '-')}"
    how = Unlearn(
        train=cache / "train.jsonl", forget=cache / f"{name}.jsonl", oracle=cache / f"{name}-{seed}",
        probes=cache / f"{name}-probes.jsonl", utility=",".join(str(cache / f"{u}.jsonl") for u in USEFUL),
        length=LENGTH, seed=seed, **options,
    )  # fmt: skip
    if not (out / "report.json").exists():
        unlearn(cache / f"full-{seed}", out, how, resume=False)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def row(name: str, label: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    def of(*path: str) -> list[float]:
        values = list[Any](reports)
        for key in path:
            values = [value[key] for value in values]
        return values

    useful = {when: of("asked", "utility", when, "utility") for when in ("before", "after", "oracle")}
    shares = {
        when: spread([a / b for a, b in zip(useful[when], useful["oracle"], strict=True)])
        for when in ("before", "after")
    }

    def beside(group: str, measure: str, places: int) -> str:
        found = [mean(of("quality_by_stage", when, group, measure)) for when in ("before", "after")]
        oracle = mean(of("asked", "oracle", group, measure))
        return f"{found[1]:.{places}f} ({found[0]:.{places}f}, {oracle:.{places}f})"

    return {
        "set": name,
        "method": label,
        "p, each seed": ", ".join(f"{p:.2g}" for p in of("asked", "forget_quality", "after")),
        "p before": ", ".join(f"{p:.2g}" for p in of("asked", "forget_quality", "before")),
        "utility, share of the oracle's": shares["after"],
        "before": shares["before"],
        "forget nats (before, oracle)": beside("forget", "nats", 2),
        "retain nats": beside("retain", "nats", 3),
        "extraction": beside("forget", "extraction", 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "model", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--prepare", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepared(args)
    if args.prepare:
        return
    rows = list[dict[str, Any]]()
    for name in args.sets:
        for label, options in ways(name).items():
            if args.methods and label not in args.methods:
                continue
            try:
                rows.append(row(name, label, [run(args, seed, name, label, options) for seed in args.seeds]))
            except (Diverged, BadInput) as error:
                rows.append({"set": name, "method": label, "p, each seed": str(error)})
            print(rows[-1], flush=True)
        record.write("tofu", rows, str(__doc__).split("\n")[0])


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
