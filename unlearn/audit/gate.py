"""A gate for unlearned models: quantizing them must not recover what they forgot (arXiv:2410.16454).

The recipe has what the original, the unlearned model and an oracle know of the forget set, and where its rows are,
which are read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from calib import BadInput, Recovered
from calib.data.prompts import prompt_format
from calib.data.rows import positions_of, row_length
from calib.jobs.recipe import forgettings
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import RECIPE, read_json
from calib.runtime.device import pick_device
from unlearn.audit.evaluate import figures
from unlearn.audit.quantized_recovery import knowledge_of
from unlearn.data.dataset import read_answers
from unlearn.data.selection import by_lines
from unlearn.model.examples import Examples
from unlearn.model.model import running

LEAST = 0.01  # by which the original must have known more for a share of it to mean anything
Load = Callable[[Path, torch.device], nn.Module]


@dataclass(frozen=True)
class Forgotten:
    """Rows of one unlearning, and what was known of them: of stages, measures."""

    rows: Examples
    known: Mapping[str, Mapping[str, float]]


def gate_of(
    model: str | Path, load: Load, *, train: Path | None = None, threshold: float | None = 0.1, device: str = "auto"
) -> Callable[[Path], dict[str, Any]] | None:
    """-> what `compressor.quantize` takes as its gate; None where MODEL has nothing to bring back.

    `train` is what the original was trained on, where that is no longer where the recipe says. The gate measures a
    quantized folder and raises Recovered where more than `threshold` (None: any share will do) of what was forgotten
    recovered. Raises BadInput where the rows are not to be had, or not those of the recipe.
    """
    if threshold is not None and not 0 <= threshold < math.inf:
        raise BadInput(f"recovery-threshold is {threshold}; it must be a number, not negative")
    folder, where = find_model(model), pick_device(device)
    past = [_forgotten(folder, step, train) for step in forgettings(folder)]
    if not past:
        return None

    def gate(out: Path) -> dict[str, Any]:
        quantized = running(load(out, where))
        found = list[dict[str, Any]]()
        for each in past:
            of = figures("causal-lm", quantized, {"forget": each.rows.to(where)})["forget"]
            found.append(
                {
                    "known": {**each.known, "quantized": knowledge_of(of)},
                    "back": recovered_shares(each.known, knowledge_of(of)),
                }
            )
        shares = [(share, measure) for one in found for measure, share in one["back"].items()]
        worst, measure = max(shares, default=(0.0, ""))
        if threshold is not None and worst > threshold:
            raise Recovered(
                f"{folder}: quantization recovers {worst:.0%} of the forgotten knowledge ({measure}), more than "
                f"{threshold:.0%}; unlearn on the grid of the scheme (--grid), or go on with --allow-recovery"
            )
        return {"worst": worst, "threshold": threshold, "unlearnings": found}

    return gate


def recovered_shares(before: Mapping[str, Mapping[str, float]], now: Mapping[str, float]) -> dict[str, float]:
    """Compute, by measure, the share of the forgotten knowledge that quantization recovered: of what the original knew
    more than the oracle or, without one, than the unlearned model.  Measures of which it knew no more are left out."""
    oracle = before.get("oracle", before.get("never saw it", before["after"]))  # the second: of old recipes
    return {
        measure: (now[measure] - before["after"][measure]) / (most - oracle[measure])
        for measure, most in before["before"].items()
        if most - oracle[measure] >= LEAST
    }


def _forgotten(folder: Path, step: Mapping[str, Any], train: Path | None) -> Forgotten:
    recipe, tokenizer = folder / RECIPE, read_tokenizer(folder)
    positions = positions_of(SimpleNamespace(**read_json(folder / "config.json")))
    way_out = "or go on with --allow-recovery"
    try:
        found = {stage: {m: float(v) for m, v in of.items()} for stage, of in step["forgotten"].items()}
        before, after = found["before"], found["after"]
        sha256, lines = str(step["data"]["train"]["sha256"]), str(step["data"]["forget"]["lines"])
        place = Path(str(step["options"]["train"])) if train is None else train
        length = step["options"]["length"]
        length = None if length is None else int(length)
        form = prompt_format(step["options"].get("prompt_format", "plain"), tokenizer)
        reverse = bool(step["options"].get("both_ways", False))
        sound = all(of.keys() == before.keys() for of in (after, *found.values())) and tokenizer is not None
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise BadInput(f"{recipe}: does not say what was known of the forgotten rows; unlearn again, {way_out}")
    if not place.is_file():
        raise BadInput(f"{recipe}: rows of {place} were forgotten, which is not there; give --train FILE, {way_out}")
    rows = read_answers(place, tokenizer, row_length(length, positions), form, reverse=reverse)
    if rows.describe()["sha256"] != sha256:
        raise BadInput(f"{place}: is not the file of which {recipe} says that rows were forgotten; give --train FILE")
    return Forgotten(rows.examples[torch.tensor(by_lines(rows, lines))], found)
