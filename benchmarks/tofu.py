"""TOFU's fictitious authors, learned by stories260k and forgotten again: forget quality and what is left of the rest.

    python -m benchmarks.tofu --data DIR --model DIR --cache DIR [--seeds 0 1 2] [--sets forget01 forget10]
    python -m benchmarks.tofu ... --prepare     # only train the models: all rows, and without each forget set
    python -m benchmarks.tofu ... --methods npo scrub    # only some, kept in the cache for a table of all: "tofu-some"

Trained on forget10 (400 questions) and on the first 440 of retain90, which are all that have perturbed answers. Forget
quality is the p-value of truth ratios against those of a model of the same seed that never saw the forget set, after
the sheet of TOFU (arXiv:2401.06121). Utility is the harmonic mean of probability, ROUGE-L recall and truth score on 60
retained questions: the other two sets of TOFU's are of the real world, of which a model of 260,000 weights that read
children's stories knows nothing (ROUGE-L recall .00 to .02, which makes a harmonic mean of all nine 0).

Each method's learning rate is, of two, that which on the first seed leaves nats on forgotten and on retained rows
nearest to the oracle's; the other seeds have no part in it. Cost is in rows that pass in training, percent of a
retrain; of dmm without the two models of half the rows each, which serve every forget set.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import record
from calib import BadInput, Diverged
from unlearn import Unlearn, unlearn
from unlearn.audit.evaluate import figures
from unlearn.audit.memorization import forget_quality
from unlearn.audit.probes import read_probes, truth_ratios, utility
from unlearn.data.dataset import read_data
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import open_model
from unlearn.model.training_recipe import Training

HOW = Training(optimiser="adamw", epochs=15, batch=8, lr=3e-3, decay=0.0, warmup=0.1)
RETAINED, ASKED, LENGTH = 440, 60, 256
SETS = {"forget01": 40, "forget10": 400}
PARTS = {"estimator": "folds", "calibrate": 0}
CPU = torch.device("cpu")
Figures = dict[str, dict[str, float]]


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
    write(cache / "retained.jsonl", rows_of(data, "retain_perturbed.jsonl")[:ASKED])
    (cache / "training.json").write_text(json.dumps(asdict(HOW)))
    for seed in args.seeds:
        for name, left in {"full": 0, **SETS}.items():
            if name not in ("full", *args.sets) or (cache / f"{name}-{seed}/config.json").exists():
                continue
            trainable = open_model(args.model, "causal-lm", device=CPU)
            rows = read_data(cache / "train.jsonl", trainable, LENGTH).examples
            mask = torch.ones(1, len(rows), dtype=torch.bool)
            mask[:, :left] = False
            trained = train_ensemble(trainable.one(), rows, mask, [seed], HOW)
            place = cache / f"{name}-{seed}"
            place.mkdir(exist_ok=True)
            trainable.write(place, {n: p[0] for n, p in trained.params.items()})
            print("trained", place.name, flush=True)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ways(name: str) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
    """Of every method on a forget set its options, and the learning rates to choose from."""
    large = name == "forget10"
    shared = {"epochs": 4 if large else 8, "batch": 8, "retain_multiplier": 1.0 if large else 4.0}
    rates: dict[str, tuple[float, ...]] = {"ascent": (3e-5, 1e-4), "difference": (1e-4, 3e-4)}
    rates |= dict.fromkeys(("npo", "npo-js", "simnpo"), (3e-4, 1e-3))
    dmm = {"method": "dmm", "retained": "labels"} | shared
    options: dict[str, dict[str, Any]] = {
        "dmm, folds": dmm | PARTS,
    }
    for method in ("retain", "ascent", "difference", "npo", "npo-js", "simnpo", "scrub", "rmu"):
        options[method] = {"method": method} | shared
    del options["ascent"]["retain_multiplier"]
    return {label: (found, rates.get(label, (1e-3, 3e-3))) for label, found in options.items()}


def run(args: argparse.Namespace, seed: int, name: str, label: str, options: dict[str, Any]) -> tuple[Path, Figures]:
    """One method on one forget set -> the folder of what it leaves, and figures of that."""
    cache = args.cache
    out = cache / f"out-{name}-{seed}-{label.replace(', ', '-').replace(' ', '-')}-{options['lr']:g}"
    if not (out / "report.json").exists():
        if "calibrate" in options:
            trained = {"training": cache / "training.json", "base": args.model, "cache": cache / f"parts-{seed}"}
            options = options | trained
        job = Unlearn(
            train=cache / "train.jsonl", forget=cache / f"{name}.jsonl", length=LENGTH, seed=seed,
            device="cpu", **options,
        )  # fmt: skip
        begun = time.perf_counter()
        report = unlearn(cache / f"full-{seed}", out, job, resume=False)
        print(out.name, round(time.perf_counter() - begun), "s", report["quality_by_stage"]["after"], flush=True)
    return out, json.loads((out / "report.json").read_text())["quality_by_stage"]["after"]


def best(args: argparse.Namespace, name: str, label: str) -> dict[str, Any]:
    """A method's options with the learning rate that does best on the first seed."""
    options, rates = ways(name)[label]
    seed, apart = args.seeds[0], dict[float, float]()
    wanted = measured(args, args.cache / f"{name}-{seed}", name)["figures"]
    for lr in rates:
        try:
            found = run(args, seed, name, label, options | {"lr": lr})[1]
        except Diverged:
            continue
        apart[lr] = sum(abs(found[group]["nats"] - wanted[group]["nats"]) for group in ("forget", "retain"))
    if not apart:
        raise BadInput(f"diverges at every rate of {rates}")
    return options | {"lr": min(apart, key=lambda lr: apart[lr])}


def measured(args: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Of a model: figures of both groups of rows, truth ratios of the forget set's questions, utility; kept."""
    file = folder / f"measured-{name}.json"
    if not file.exists():
        cache, trainable = args.cache, open_model(folder, "causal-lm", device=CPU)
        model = trainable.one()
        rows = read_data(cache / "train.jsonl", trainable, LENGTH).examples
        probes = read_probes(cache / f"{name}-probes.jsonl", trainable, LENGTH, paraphrased=True)
        useful = read_probes(cache / "retained.jsonl", trainable, LENGTH, paraphrased=True)
        groups = {"forget": rows[torch.arange(SETS[name])], "retain": rows[torch.arange(SETS[name], len(rows))]}
        found = {
            "figures": figures(trainable.task, model, groups),
            "truth ratios": truth_ratios(model, probes).tolist(),
            "utility": utility(trainable, model, {"retained": useful}),
        }
        file.write_text(json.dumps(found))
    return dict(json.loads(file.read_text()))


def row(args: argparse.Namespace, name: str, label: str) -> dict[str, Any]:
    """Of one method on all seeds, beside the oracle of the same seed."""
    cache, lr = args.cache, ""
    oracles = [measured(args, cache / f"{name}-{seed}", name) for seed in args.seeds]
    if label == "oracle of the next seed":
        models = oracles[1:] + oracles[:1]
    elif label == "do nothing":
        models = [measured(args, cache / f"full-{seed}", name) for seed in args.seeds]
    else:
        try:
            options = best(args, name, label)
            lr = f"{options['lr']:g}"
            folders = [run(args, seed, name, label, options)[0] for seed in args.seeds]
        except (Diverged, BadInput) as error:
            return {"set": name, "method": label, "forget quality p": str(error)}
        models = [measured(args, folder, name) for folder in folders]
    pairs = list(zip(models, oracles, strict=True))
    quality = [forget_quality(torch.tensor(a["truth ratios"]), torch.tensor(b["truth ratios"])) for a, b in pairs]
    share = [a["utility"]["utility"] / b["utility"]["utility"] for a, b in pairs]

    def of(group: str, measure: str) -> str:
        return spread([one["figures"][group][measure] for one in models])

    return {
        "set": name,
        "method": label,
        "lr": lr,
        "forget quality p": ", ".join(f"{p:.2g}" for p in quality),
        "utility / oracle's": spread(share),
        "utility": spread([one["utility"]["utility"] for one in models]),
        "nats, forgotten": of("forget", "nats"),
        "nats, retained": of("retain", "nats"),
        "extraction": of("forget", "extraction"),
        "cost %": "" if not lr else f"{cost(name, options):.0f}",
    }


def cost(name: str, options: dict[str, Any]) -> float:
    """Rows that pass in training, percent of a retrain; without models that serve all forget sets."""
    each = 1 + options.get("retain_multiplier", 0.0)
    return float(
        100 * options["epochs"] * each * SETS[name] / (HOW.epochs * (SETS["forget10"] + RETAINED - SETS[name]))
    )


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
        for label in args.methods or ["oracle of the next seed", "do nothing", *ways(name)]:
            rows.append(row(args, name, label))
            print(rows[-1], flush=True)
    record.write("tofu-some" if args.methods else "tofu", rows, str(__doc__).split("\n")[0])


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
