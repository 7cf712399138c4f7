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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import record
from calib import BadInput
from calib.fit import Diverged
from unlearn import Unlearn, unlearn
from unlearn.data import read_data
from unlearn.ensemble import Training, train
from unlearn.models import open_model
from unlearn.proof import Probes, answers, read_probes
from unlearn.recall import (
    answer_probability,
    choice_probability,
    model_utility,
    per_token,
    rouge_l_recall,
    truth_ratio,
    truth_score,
)

HOW = Training(optimiser="adamw", epochs=15, batch=8, lr=3e-3, decay=0.0, warmup=0.1)
RETAINED, ASKED, LENGTH = 440, 60, 256
SETS = {"forget01": 40, "forget10": 400}
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


@torch.no_grad()
def utility(folder: Path, data: Path) -> float:
    """The harmonic mean of nine."""
    opened, tokenizer = open_model(folder, "causal-lm", device=CPU), AutoTokenizer.from_pretrained(folder)
    model, one, parts = AutoModelForCausalLM.from_pretrained(folder).eval(), opened.one(), {}
    for name in ("retain_perturbed.jsonl", "real_authors_perturbed.json", "world_facts_perturbed.json"):
        some = rows_of(data, name)[:ASKED]
        for row in some:
            row.setdefault("paraphrased_answer", row["answer"])
        probes = probed(some, opened, folder)
        right, *wrong = [answers(one, rows) for rows in (probes.paraphrased, *probes.perturbed)]
        spoken = [per_token(a.log_p, a.mask) for a in (right, *wrong)]
        parts[f"{name} truth"] = float(truth_score(truth_ratio(spoken[0], torch.stack(spoken[1:], 1))).mean())
        own = answers(one, probed([r | {"paraphrased_answer": r["answer"]} for r in some], opened, folder).paraphrased)
        if name.startswith("retain"):
            probability = answer_probability(own.log_p, own.mask)
        else:
            probability = choice_probability(per_token(own.log_p, own.mask), torch.stack(spoken[1:], 1))
        parts[f"{name} probability"] = float(probability.mean())
        said = written(model, tokenizer, [f"Question: {r['question']}\nAnswer:" for r in some])
        parts[f"{name} rouge"] = mean(rouge_l_recall(r["answer"], s) for r, s in zip(some, said, strict=True))
    return model_utility(parts)


def probed(rows: list[dict[str, Any]], opened: Any, folder: Path) -> Probes:
    file = folder.parent / f".{folder.name}-probes.jsonl"
    write(file, rows)
    try:
        return read_probes(file, opened, LENGTH)
    finally:
        file.unlink()


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """What a model answers, greedily, up to 100 tokens."""
    how = GenerationConfig(do_sample=False, max_new_tokens=100, pad_token_id=0, eos_token_id=2)
    said = []
    by_length = sorted(range(len(prompts)), key=lambda i: len(tokenizer(prompts[i])["input_ids"]))
    for i in by_length:  # one by one: padding on the left would change what small models say
        ids = tokenizer(prompts[i], return_tensors="pt")["input_ids"]
        said.append((i, tokenizer.decode(model.generate(ids, generation_config=how)[0, ids.shape[1] :])))
    return [text for _, text in sorted(said)]


def ways(name: str, fast: bool) -> dict[str, dict[str, Any]]:
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
        probes=cache / f"{name}-probes.jsonl", length=LENGTH, seed=seed, top_k=32, **options,
    )  # fmt: skip
    kept = cache / f"{out.name}.json"
    if not kept.exists():
        report = unlearn(cache / f"full-{seed}", out, how, resume=False)
        found = {"p": report["against_oracle"]["forget_quality"], "utility": utility(out, args.data)}
        found |= {"after": report["quality_by_stage"]["after"], "oracle": report["against_oracle"]["oracle"]}
        kept.write_text(json.dumps(found | {"scale": report.get("scale")}))
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


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
        oracle = [utility(args.cache / f"{name}-{seed}", args.data) for seed in args.seeds]
        for label, options in ways(name, False).items():
            if args.methods and label not in args.methods:
                continue
            try:
                found = [run(args, seed, name, label, options) for seed in args.seeds]
            except (Diverged, BadInput) as error:
                rows.append({"set": name, "method": label, "p, each seed": str(error)})
                continue
            rows.append(
                {
                    "set": name,
                    "method": label,
                    "p, each seed": ", ".join(f"{f['p']['after']:.2g}" for f in found),
                    "p before": ", ".join(f"{f['p']['before']:.2g}" for f in found),
                    "utility / oracle's": spread([f["utility"] / o for f, o in zip(found, oracle, strict=True)]),
                    "forget nats (oracle)": f"{mean(f['after']['forget']['nats'] for f in found):.2f} "
                    f"({mean(f['oracle']['forget']['nats'] for f in found):.2f})",
                    "retain nats": f"{mean(f['after']['retain']['nats'] for f in found):.3f}",
                    "extraction": f"{mean(f['after']['forget']['extraction'] for f in found):.2f} "
                    f"({mean(f['oracle']['forget']['extraction'] for f in found):.2f})",
                }
            )
            print(rows[-1], flush=True)
        record.write("tofu", rows, str(__doc__).split("\n")[0])


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
