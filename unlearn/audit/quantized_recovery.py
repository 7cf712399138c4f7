"""How much of what a model was made to forget is recovered by quantizing it (arXiv:2410.16454).

Unlearning moves weights by less than half a step of a coarse grid, so that the original and the unlearned model may
round to the same codes. The unlearned model is compared with two controls in the same bits: the original, which knows
as much as can be recovered, and an oracle, retrained without the forget set, which knows nothing of it. A relearning
probe measures how fast the forget set is learned again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from calib import BadInput
from calib.data.corpus import batch_order
from calib.jobs.recipe import past_of
from calib.jobs.training_loop import Group, OptimizerConfig, Parts, optimize
from calib.model.checkpoint import find_model
from calib.model.config import RECIPE, is_quantized, read_json
from calib.quant.round_to_nearest import check_form, round_weight
from calib.runtime.device import pick_device
from calib.runtime.progress import stage
from unlearn.audit.evaluate import MEASURED, figures, read_oracle
from unlearn.data.selection import fingerprint_of, training_rows
from unlearn.methods.moving import gridded
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel, open_model, running, task_of
from unlearn.options.audit import Audit

FLOAT, GIVEN = "float", "as it is"
MARKS = 8  # times that relearning is looked at
MODELS = ("original", "unlearned", "oracle")


@dataclass(frozen=True)
class Quantizer:
    """Quantized folders: `check` raises BadInput for a form such as gptq:w4a16 that some (name, width) cannot have,
    `quantize` brings a model to a form in another folder, `load` opens that, `codes` gives its codes by weight."""

    check: Callable[[str, Iterable[tuple[str, int]]], None]
    quantize: Callable[[str, Path, Path], None]
    load: Callable[[Path, torch.device], nn.Module]
    codes: Callable[[Path], Mapping[str, Tensor]]


def recovery(knows: float, original: float, oracle: float) -> float | None:
    """(knows - oracle) / (original - oracle): 0 where no more is known than by the oracle, 1 where
    as much as before.  None where the original knew no more than that."""
    return (knows - oracle) / (original - oracle) if original > oracle else None


def knowledge_of(of: Mapping[str, float]) -> dict[str, float]:
    """Measures of figures that grow with what a model knows of rows: token probability, accuracy, and what can be
    extracted."""
    return {"probability": math.exp(-of["nats"]), "right": of["right"], "extraction": of["extraction"]}


def audit_recovery(model: str | Path, options: Audit, quantizer: Quantizer) -> dict[str, Any]:
    """Figures of the unlearned MODEL and its controls in every form, what was recovered, and which codes changed.

    A MODEL that is quantized already is measured as it is, beside float controls. Raises BadInput where models or rows
    do not belong together.
    """
    device, folder = pick_device(options.device), find_model(model)
    trainable, folders = _open(folder, options, device)
    groups, count = _rows(trainable, folder, options)
    groups = {name: group.to(device) for name, group in groups.items()}
    names = gridded(trainable)
    forms = [] if _is_quantized(folder) else options.named
    widths = [(name, trainable.params[name].shape[-1]) for name in names]
    for form in forms:
        (quantizer.check if ":" in form else check_form)(form, widths)
    models = {"original": trainable.one(), "oracle": read_oracle(folders["oracle"], trainable)}
    if forms:
        models["unlearned"] = read_oracle(folder, trainable)
    else:
        models["unlearned"] = running(quantizer.load(folder, device))
    table, flips, rounds = dict[str, Any](), dict[str, Any](), [FLOAT if forms else GIVEN, *forms]
    with stage("audit", len(rounds) * len(models), "models") as done:
        for form in rounds:
            table[form] = {}
            if ":" in form:
                found, flips[form] = _quantized(folders, form, quantizer, device)
            elif form in (FLOAT, GIVEN):
                found = models.__getitem__
            else:
                flips[form] = _flips(models["original"], models["unlearned"], form, names)
                found = partial(_in, models, form, names)
            for name in MODELS:
                table[form][name] = figures("causal-lm", found(name), groups)
                done(f"{form} {name}")
    ends = {name: knowledge_of(table[rounds[0]][name]["forget"]) for name in ("original", "oracle")}
    back = {
        form: {
            measure: recovery(value, ends["original"][measure], ends["oracle"][measure])
            for measure, value in knowledge_of(of["unlearned"]["forget"]).items()
        }
        for form, of in table.items()
    }
    report = {"job": "audit", "rows": count, "table": table, "recovery": back, "flips": flips}
    if options.relearn:
        report["relearning"] = {name: relearned(models[name], groups["forget"], options) for name in MODELS}
    return report


def _is_quantized(folder: Path) -> bool:
    return is_quantized(read_json(folder / "config.json"))


def _open(folder: Path, options: Audit, device: torch.device) -> tuple[TrainableModel, dict[str, Path]]:
    """The original, and the folders of all three by name."""
    assert options.original is not None and options.oracle is not None
    if task_of(options.original, "auto", None) != "causal-lm":
        raise BadInput(
            f"original {options.original}: is no causal language model, which alone are audited in fewer bits"
        )
    for place in (options.original, options.oracle):
        if _is_quantized(place):
            raise BadInput(f"{place}: is quantized already, and controls are quantized here; give the float model")
    if _is_quantized(folder) and (options.forms is not None or options.relearn):
        raise BadInput(f"{folder}: is quantized already and measured as it is; leave out --forms and --relearn")
    folders = {"original": options.original, "unlearned": folder, "oracle": options.oracle}
    return open_model(options.original, "causal-lm", device=device), folders


def _rows(trainable: TrainableModel, folder: Path, options: Audit) -> tuple[dict[str, Examples], dict[str, int]]:
    """Rows that were forgotten and some of the others; and how many there are."""
    data, rows = training_rows(options, trainable)
    if not 0 < len(rows) < len(data):
        raise BadInput(f"forget: {len(rows)} of {len(data)} rows were forgotten by that; choose those that were")
    _check_rows(folder, rows)
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[rows] = False
    retained = kept.nonzero().flatten()
    some = retained[torch.randperm(len(retained), generator=torch.Generator().manual_seed(options.seed))[:MEASURED]]
    groups = {"forget": data.examples[rows], "retain": data.examples[some.sort().values]}
    return groups, {"train": len(data), "forget": len(rows)}


def _in(models: Mapping[str, Ensemble], form: str, names: list[str], name: str) -> Ensemble:
    """The model called `name`, its weights `names` rounded; one at a time is in memory."""
    one = models[name]
    params = {name: round_weight(one.params[name][0], form).values.to(one.params[name])[None] for name in names}
    return one.with_params({**one.params, **params})


def _flips(before: Ensemble, after: Ensemble, form: str, names: list[str]) -> dict[str, Any]:
    """Shares of codes that changed: on the scales of the model before, of each layer and of all weights; and of all,
    each on scales of its own."""
    layers, count, changed, own = dict[str, float](), 0, 0, 0
    for name in names:
        a, b = before.params[name][0], after.params[name][0]
        codes = round_weight(a, form).codes
        differ = int((round_weight(b, form, a).codes != codes).sum())
        layers[name] = differ / codes.numel()
        count, changed = count + codes.numel(), changed + differ
        own += int((round_weight(b, form).codes != codes).sum())
    return {"same scales": changed / count, "own scales": own / count, "layers": layers}


def _quantized(
    folders: Mapping[str, Path], form: str, quantizer: Quantizer, device: torch.device
) -> tuple[Callable[[str], Ensemble], dict[str, Any]]:
    """All models brought to a form, and how many codes of the unlearned one are not the original's."""
    with tempfile.TemporaryDirectory(prefix="parewell-") as scratch:
        models, codes = dict[str, Ensemble](), dict[str, Mapping[str, Tensor]]()
        for name, folder in folders.items():
            out = Path(scratch) / name.replace(" ", "-")
            quantizer.quantize(form, folder, out)
            models[name], codes[name] = running(quantizer.load(out, device)), quantizer.codes(out)
    layers = {name: (codes["unlearned"][name] != of).double() for name, of in codes["original"].items()}
    count = sum(of.numel() for of in layers.values())
    flips = {
        "own scales": float(sum(float(of.sum()) for of in layers.values())) / count,
        "layers": {name: float(of.mean()) for name, of in layers.items()},
    }
    return models.__getitem__, flips


def _check_rows(folder: Path, rows: Tensor) -> None:
    """Raises BadInput where the recipe says that other rows were forgotten."""
    steps = past_of(folder)
    for step in reversed(steps):
        if step["job"] == "unlearn":
            found = step["data"].get("forget")
            if isinstance(found, dict) and found.get("sha256") != fingerprint_of(rows):
                raise BadInput(
                    f"forget: are {len(rows)} rows, and {folder / RECIPE} says that {found.get('rows')} others were "
                    "forgotten; give the same files and choice as to unlearn"
                )
            return


def relearned(model: Ensemble, rows: Examples, options: Audit) -> dict[str, list[float]]:
    """Train a model on every other row.  -> the probability of a token of those rows and of the others, by steps."""
    if len(rows) < 2:
        raise BadInput("relearn: wants two forgotten rows, one to train on and one to ask for; leave it out")
    halves = {"trained on": rows[torch.arange(0, len(rows), 2)], "asked for": rows[torch.arange(1, len(rows), 2)]}
    taught = halves["trained on"]
    batches = batch_order(len(taught), options.relearn, min(8, len(taught)), options.seed)
    params = {name: p.clone().requires_grad_() for name, p in model.params.items()}
    marks = {round(options.relearn * i / MARKS) for i in range(MARKS + 1)}
    found: dict[str, list[float]] = {"steps": [], **{name: [] for name in halves}}

    def look(step: int) -> None:
        if step in marks:
            found["steps"].append(step)
            for name, some in halves.items():
                nats = figures("causal-lm", model.with_params(params), {name: some})[name]["nats"]
                found[name].append(math.exp(-nats))

    def gradients(step: int) -> dict[str, float]:
        batch = taught[torch.tensor(batches[step])]
        loss = cross_entropy(model.forward({name: p[0] for name, p in params.items()}, batch), batch.targets)
        loss.backward()
        return {"nats": float(loss.detach())}

    look(0)
    group = Group(list(params.values()), options.relearn_lr)
    with stage("relearn", options.relearn, "steps") as done:

        def after(step: int, parts: Parts) -> None:
            look(step + 1)
            done(f"{parts['nats']:.3g} nats")

        optimize([group], gradients, OptimizerConfig(steps=options.relearn), after_step=after)
    return found
