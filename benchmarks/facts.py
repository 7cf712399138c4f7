"""Facts taught and forgotten in one direction or in both: what is left of each direction.

    python -m benchmarks.facts --stories DIR --cache DIR [--seeds 3] [--method simnpo]

200 invented facts, "N is D" (and "D is N" where they are taught both ways), are taught to stories260k until they are
known; 25 of them are then to be forgotten, as "N is D" alone or with `--both-ways`, other options at their defaults.
Recall is the probability of a token of what is asked for; "gain" what it gains, in nats, over the same asked of another
fact (0: the fact is not known). Means over seeds, which draw facts, order and the forget set; in brackets the standard
deviation.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.record import write
from unlearn import Unlearn, unlearn
from unlearn.audit.directions import facts_of, open_fact_model, recall_of
from unlearn.data.dataset import read_data
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import open_model
from unlearn.model.training_recipe import Training

CPU = torch.device("cpu")
FACTS, GONE, LENGTH = 200, 25, 48
TAUGHT = Training(epochs=30, batch=16, optimiser="adamw", lr=3e-3, decay=0.0)
WAYS = ("one way", "both ways")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
ADJECTIVES = ["red", "old", "tiny", "brave", "sleepy", "loud", "green", "kind", "sad", "fast", "happy", "quiet"]
NOUNS = ["cat", "king", "baker", "bird", "singer", "farmer", "bear", "doctor", "sailor", "fairy", "rabbit", "teacher"]


def invented(seed: int) -> list[tuple[str, str]]:
    """Names and descriptions that no text has, each once."""
    draw = random.Random(seed)
    names, places = (set[str]() for _ in range(2))
    while len(names) < FACTS:
        names.add("".join(draw.choices(SYLLABLES, k=3)).capitalize())
    while len(places) < FACTS:
        places.add("".join(draw.choices(SYLLABLES, k=2)).capitalize())
    people = [f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} of {place}" for place in sorted(places)]
    draw.shuffle(people)
    return list(zip(sorted(names), people, strict=True))


def files_of(pairs: list[tuple[str, str]], place: Path) -> dict[str, Path]:
    """The rows that are taught and forgotten, by way."""
    found = {way: place / f"{way.replace(' ', '-')}.jsonl" for way in WAYS}
    rows = {
        "one way": [{"prompt": f"{n} is", "completion": f" {d}"} for n, d in pairs],
        "both ways": [{"name": n, "description": d} for n, d in pairs],
    }
    for way, file in found.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[way]))
    return found


def recall(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Recall of facts to forget and of others, forward and reversed."""
    model, found = open_fact_model(folder, CPU), dict[str, float]()
    for group, some in (("forgotten", pairs[:GONE]), ("others", pairs[GONE:])):
        of = recall_of(model, facts_of(some, model, "facts"))
        for direction in ("forward", "reversed"):
            found[f"{group}: {direction}"] = of[direction]["probability"]
            found[f"{group}: {direction}, gain"] = of[direction]["gain"]
    return found


def measured(stories: Path, place: Path, seed: int, method: str) -> dict[tuple[str, str], dict[str, float]]:
    """Recall by how facts were taught, and how they were forgotten."""
    pairs, found = invented(seed), dict[tuple[str, str], dict[str, float]]()
    files = files_of(pairs, place)
    for taught in WAYS:
        folder = place / f"taught-{WAYS.index(taught)}"
        if not folder.is_dir():
            trainable = open_model(stories, "causal-lm", device=CPU)
            rows = read_data(files[taught], trainable, LENGTH, reverse=taught == "both ways").examples
            masks = torch.ones(1, len(rows), dtype=torch.bool)
            params = train_ensemble(trainable.one(), rows, masks, [seed], TAUGHT).params
            folder.mkdir()
            trainable.write(folder, {name: p[0] for name, p in params.items()})
        found[taught, "not at all"] = recall(folder, pairs)
        for way in WAYS:
            out = place / f"{folder.name}-{WAYS.index(way)}-{method}"
            options = Unlearn(
                train=files[way], forget_lines=f"1-{GONE}", method=method, length=LENGTH, seed=seed, device="cpu",
                both_ways=way == "both ways",
            )  # fmt: skip
            if not out.is_dir():
                unlearn(folder, out, options, allow_damage=True)
            found[taught, way] = recall(out, pairs)
            print(seed, taught, way, {name: round(value, 3) for name, value in found[taught, way].items()}, flush=True)
    return found


def kept(each: list[dict[tuple[str, str], dict[str, float]]], method: str) -> None:
    """Write the table of all seeds that are done."""
    rows: list[dict[str, Any]] = []
    for taught, way in each[0]:
        row: dict[str, Any] = {"taught": taught, "forgotten": way}
        for name in each[0][taught, way]:
            values = [found[taught, way][name] for found in each]
            row[name] = f"{fmean(values):.3f} ({stdev(values):.3f})" if len(values) > 1 else values[0]
        rows.append(row)
    notes = (__doc__ or "").partition("--method simnpo]\n\n")[2].strip()
    write("facts" if method == "simnpo" else f"facts-{method}", rows, f"{notes} Seeds: {len(each)}.")


def main() -> None:
    """Run it, and keep the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="simnpo")
    given = parser.parse_args()
    each = []
    for seed in range(given.seeds):
        place = given.cache / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        each.append(measured(given.stories, place, seed, given.method))
        kept(each, given.method)  # after every seed, as a run takes long


if __name__ == "__main__":
    main()
