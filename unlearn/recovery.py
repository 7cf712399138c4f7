"""What rounding brings back: how much of what a model forgot it knows again in fewer bits (arXiv:2410.16454).

Unlearning moves weights by less than half a step of a coarse grid, so that the original and the unlearned model may
round to the same codes. Beside the unlearned model stand two controls, rounded alike: the original, which is as much as
can come back, and one that never saw the rows, to which nothing must come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.checkpoint import RECIPE, find_model, read_json, read_recipe
from calib.job import DEVICES, option, pick_device
from calib.progress import stage
from unlearn.data import chosen, fingerprint_of, read_data
from unlearn.ensemble import Ensemble
from unlearn.models import blocks_of, open_model, task_of
from unlearn.proof import MEASURED, figures, read_oracle

Round = Callable[[str, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # form, weight, whose scales -> codes and values
FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Options of an audit."""

    original: Path | None = option(None, "the model before it forgot")
    oracle: Path | None = option(None, "a model of the same kind that never saw the forgotten rows")
    train: Path | None = option(None, "what the original was trained on, as for unlearn")
    forget: Path | None = option(None, "the rows that were forgotten, as for unlearn")
    forget_lines: str | None = option(None, "the same by line numbers, such as 3,10-20")
    forget_where: str | None = option(None, "the same by FIELD=REGEX")
    length: int = option(512, "tokens that are read of a row")
    forms: str = option("w8a16,w4a16,nf4", "what weights are rounded to, to nearest")
    seed: int = option(0, "seed of which retained rows are measured")
    device: str = option("auto", "where to compute", DEVICES)

    def __post_init__(self) -> None:
        for f in fields(self)[:3]:
            if getattr(self, f.name) is None:
                raise BadInput(f"{f.name}: is not given; an audit compares models on rows, give --{f.name} PATH")
        if self.forget is None and self.forget_lines is None and self.forget_where is None:
            raise BadInput("forget: nothing says which rows were; give --forget, --forget-lines or --forget-where")
        if self.length < 2:
            raise BadInput(f"length is {self.length}; it must be at least 2")
        if not self.named or len(set(self.named)) < len(self.named):
            raise BadInput(f"forms '{self.forms}': must name some, each once, such as w4a16,nf4")

    @property
    def named(self) -> list[str]:
        return [form.strip() for form in self.forms.split(",") if form.strip()]


def recovery(knows: float, original: float, oracle: float) -> float | None:
    """(knows - oracle) / (original - oracle): 0 where no more is known than by a model that never saw the rows, 1 where
    as much as before.  None where the original knew no more than that."""
    return (knows - oracle) / (original - oracle) if original > oracle else None


def audited(
    model: str | Path, how: Audit, rounding: Round, check: Callable[[str, list[tuple[str, int]]], None]
) -> dict[str, Any]:
    """Figures of the unlearned MODEL and its controls in every form, what came back, and which codes changed.

    `rounding` gives codes and values of a weight, `check` raises for a form that some (name, width) cannot have. Raises
    BadInput where models or rows do not belong together.
    """
    assert how.original is not None and how.oracle is not None and how.train is not None
    device, folder = pick_device(how.device), find_model(model)
    if task_of(how.original, "auto", None) != "causal-lm":
        raise BadInput(f"original {how.original}: is no causal language model, which alone are audited in fewer bits")
    for place in (folder, how.original, how.oracle):
        if "quantization_config" in read_json(place / "config.json"):
            raise BadInput(f"{place}: is quantized already; an audit rounds models itself, give the one before that")
    opened = open_model(how.original, "causal-lm", device=device)
    models = {"original": opened.one(), "unlearned": read_oracle(folder, opened)}
    models["never saw it"] = read_oracle(how.oracle, opened)
    data = read_data(Path(how.train), opened, how.length)
    forget = None if how.forget is None else read_data(Path(how.forget), opened, how.length)
    rows = chosen(data, forget, how.forget_lines, how.forget_where)
    if not 0 < len(rows) < len(data):
        raise BadInput(f"forget: {len(rows)} of {len(data)} rows were forgotten by that; choose those that were")
    _check_rows(folder, rows)
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[rows] = False
    retained = kept.nonzero().flatten()
    some = retained[torch.randperm(len(retained), generator=torch.Generator().manual_seed(how.seed))[:MEASURED]]
    groups = {"forget": data.examples[rows], "retain": data.examples[some.sort().values]}
    groups = {name: group.to(device) for name, group in groups.items()}
    blocks = tuple(f"{block}." for block in blocks_of(opened))
    names = [name for name in opened.linears if name.startswith(blocks)]
    for form in how.named:
        check(form, [(name, opened.params[name].shape[-1]) for name in names])
    table, flips = dict[str, Any](), dict[str, Any]()
    with stage("audit", (1 + len(how.named)) * len(models), "models") as done:
        for form in [FLOAT, *how.named]:
            table[form] = {}
            for name, one in models.items():
                table[form][name] = figures(opened, one if form == FLOAT else _in(one, form, names, rounding), groups)
                done(f"{form} {name}")
            if form != FLOAT:
                flips[form] = _flips(models["original"], models["unlearned"], form, names, rounding)
    known = {form: {name: _knows(of["forget"]) for name, of in models.items()} for form, models in table.items()}
    back = {
        form: {
            measure: recovery(known[form]["unlearned"][measure], most, known[FLOAT]["never saw it"][measure])
            for measure, most in known[FLOAT]["original"].items()
        }
        for form in table
    }
    return {
        "job": "audit", "rows": {"train": len(data), "forget": len(rows)}, "table": table, "recovery": back,
        "flips": flips,
    }  # fmt: skip


def _knows(of: Mapping[str, float]) -> dict[str, float]:
    """What grows with what is known of rows: the probability of a token, what is right, what can be extracted."""
    return {"probability": math.exp(-of["nats"]), "right": of["right"], "extraction": of["extraction"]}


def _in(one: Ensemble, form: str, names: list[str], rounding: Round) -> Ensemble:
    params = {name: rounding(form, one.params[name][0], None)[1].to(one.params[name])[None] for name in names}
    return one.with_params({**one.params, **params})


def _flips(before: Ensemble, after: Ensemble, form: str, names: list[str], rounding: Round) -> dict[str, Any]:
    """Shares of codes that changed: on the scales of the model before, of each layer and of all weights; and of all,
    each on scales of its own."""
    layers, count, changed, own = dict[str, float](), 0, 0, 0
    for name in names:
        a, b = before.params[name][0], after.params[name][0]
        codes = rounding(form, a, None)[0]
        differ = int((rounding(form, b, a)[0] != codes).sum())
        layers[name] = differ / codes.numel()
        count, changed = count + codes.numel(), changed + differ
        own += int((rounding(form, b, None)[0] != codes).sum())
    return {"same scales": changed / count, "own scales": own / count, "layers": layers}


def _check_rows(folder: Path, rows: Tensor) -> None:
    """Raises BadInput where the recipe says that other rows were forgotten."""
    steps = read_recipe(folder) if (folder / RECIPE).is_file() else []
    for step in reversed(steps):
        if step["job"] == "unlearn":
            found = step["data"].get("forget")
            if isinstance(found, dict) and found.get("sha256") != fingerprint_of(rows):
                raise BadInput(
                    f"forget: are {len(rows)} rows, and {folder / RECIPE} says that {found.get('rows')} others were "
                    "forgotten; give the same files and choice as to unlearn"
                )
            return
