"""TOFU's fictitious authors forgotten by stories260k, then quantized: what comes back, and what keeps it away.

    python -m benchmarks.lasting --data DIR --model DIR --cache DIR [--seeds 0 1 2] [--set forget01] python -m
    benchmarks.lasting ... --methods npo scrub --remedies "on the grid" --forms float gptq:w4a16-channel --name NAME

Models and rows are those of benchmarks.tofu, whose cache this shares; each method has the learning rate chosen there.
Recovery is (known - never) / (original - never) of the probability of a token of the forgotten answers, with the float
original and a float model that never saw them: 0 is no more than that. Utility is that of benchmarks.tofu, on retained
questions, in the same bits. Scales are per channel. GPTQ and learned transforms are calibrated on 64 rows of 256 tokens
of what is retained. Flips are of codes of the unlearned model that are not the original's; for w4a16-channel on the
original's scales, else on scales of each one's own (learned transforms differ by model, so theirs say little).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.tofu import CPU, LENGTH, SETS, best, prepared, rows_of, run, spread, write
from compressor import Quantize, load, quantize
from compressor.engine.load import codes_in
from unlearn.audit.evaluate import figures
from unlearn.audit.probes import read_probes, utility
from unlearn.audit.quantized_recovery import _flips, _in, knowledge_of, recovery
from unlearn.data.dataset import read_data
from unlearn.methods.moving import gridded
from unlearn.model.ensemble import Ensemble
from unlearn.model.model import open_model, running

SCHEME = "w4a16-channel"
FORMS = ("float", "w8a16-channel", SCHEME, f"gptq:{SCHEME}", f"learned:{SCHEME}")
METHODS = ("dmm, folds", "npo", "difference", "scrub")
REMEDIES: dict[str, dict[str, Any]] = {
    "on the grid": {"grid": SCHEME},
    "on the grid, rounded first": {"grid": SCHEME, "match_quantized": True},
    "at least half a step": {"grid": SCHEME, "min_step": 1.0},
    "at least a step": {"grid": SCHEME, "min_step": 2.0},
    "on the grid, rounded first, 40 epochs": {"grid": SCHEME, "match_quantized": True, "epochs": 40},
    "soup of 3": {"model_soup": 3},
}


def quantized(cache: Path, folder: Path, form: str, seed: int) -> Path:
    """A model in a form of `quantize`, kept in the cache."""
    out = cache / f"q-{folder.name}-{form.replace(':', '-')}"
    if not (out / "report.json").exists():
        kind = {"gptq": {"init": "none", "learn": False}, "learned": {"steps": 60, "block_steps": 0, "tune_steps": 30}}
        own: Mapping[str, Any] = kind[form.partition(":")[0]]
        options = Quantize(
            scheme=form.partition(":")[2], data=cache / "retained-train.jsonl", samples=64, length=256, held_out=8,
            top_k=64, seed=seed, device="cpu", **own,
        )  # fmt: skip
        quantize(folder, out, options, resume=False, allow_recovery=True)
    return out


def measured(args: argparse.Namespace, folder: Path, form: str, seed: int) -> dict[str, Any]:
    """Of a model in a form: figures of both groups of rows, utility, codes that are not the original's; kept."""
    file = args.cache / f"lasting-{args.set}-{folder.name}-{form.replace(':', '-')}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    cache, original = args.cache, args.cache / f"full-{seed}"
    trainable = open_model(original, "causal-lm", device=CPU)
    rows = read_data(cache / "train.jsonl", trainable, LENGTH).examples
    names, own = gridded(trainable), open_model(folder, "causal-lm", device=CPU).one()
    flips = 0.0
    if ":" in form:
        out, before = (quantized(cache, place, form, seed) for place in (folder, original))
        one: Ensemble = running(load(out))
        codes = [codes_in(place) for place in (out, before)]
        changed = sum(int((codes[0][name] != codes[1][name]).sum()) for name in codes[0])
        flips = changed / sum(c.numel() for c in codes[0].values())
    elif form == "float":
        one = own
    else:
        one = _in({"": own}, form, names, "")
        flips = _flips(trainable.one(), own, form, names)["same scales"]
    groups = {"forget": rows[torch.arange(SETS[args.set])], "retain": rows[torch.arange(SETS[args.set], len(rows))]}
    useful = read_probes(cache / "retained.jsonl", trainable, LENGTH, paraphrased=True)
    found = {
        "figures": figures("causal-lm", one, groups),
        "utility": utility(trainable, one, {"retained": useful})["utility"],
        "flips": flips,
    }
    file.write_text(json.dumps(found))
    return found


def folders(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Of every method, and of dmm with every remedy, what it leaves of each seed's model."""
    found = {"do nothing": [args.cache / f"full-{seed}" for seed in args.seeds]}
    found["retrain"] = [args.cache / f"{args.set}-{seed}" for seed in args.seeds]
    for label in args.methods:
        options = best(args, args.set, label)
        found[label] = [run(args, seed, args.set, label, options)[0] for seed in args.seeds]
    options = best(args, args.set, "dmm, folds")
    for label in args.remedies:
        more = options | REMEDIES[label]
        found[f"dmm, {label}"] = [run(args, seed, args.set, f"dmm, {label}", more)[0] for seed in args.seeds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "model", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", default="forget01", choices=list(SETS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--remedies", nargs="*", default=list(REMEDIES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--name", default="lasting")
    args = parser.parse_args()
    args.sets = [args.set]
    torch.set_num_threads(1)
    prepared(args)
    retained = rows_of(args.cache, "train.jsonl")[SETS["forget10"] :]
    write(args.cache / "retained-train.jsonl", retained)
    table = list[dict[str, Any]]()
    for name, places in folders(args).items():
        for form in args.forms:
            each = list[dict[str, Any]]()
            for seed, place in zip(args.seeds, places, strict=True):
                one = measured(args, place, form, seed)
                ends = [
                    knowledge_of(measured(args, args.cache / f"{end}-{seed}", "float", seed)["figures"]["forget"])
                    for end in ("full", args.set)
                ]
                knows = knowledge_of(one["figures"]["forget"])
                back = {m: recovery(knows[m], ends[0][m], ends[1][m]) or 0.0 for m in knows}
                each.append({"back": back, **one})
            table.append(
                {
                    "method": name,
                    "form": form,
                    "recovery": spread([one["back"]["probability"] for one in each]),
                    "of extraction": spread([one["back"]["extraction"] for one in each]),
                    "nats, forgotten": spread([one["figures"]["forget"]["nats"] for one in each]),
                    "nats, retained": spread([one["figures"]["retain"]["nats"] for one in each]),
                    "utility": spread([one["utility"] for one in each]),
                    "flips": spread([one["flips"] for one in each]),
                }
            )
            record.write(args.name, table, str(__doc__).split("\n")[0])


if __name__ == "__main__":
    main()
