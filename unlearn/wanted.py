"""What is wanted of an unlearning: the options of the command, the arguments of the function, and the recipe."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.checkpoint import RECIPE, read_json
from calib.device import DEVICES
from calib.job import check_numbers, option
from calib.prompts import PROMPT_FORMAT
from calib.scheme import Scheme
from unlearn.baselines import BALANCES, BASELINES, RETAINS
from unlearn.choice import check_choice
from unlearn.ensemble import AT_ONCE, Training
from unlearn.match import DISTANCES
from unlearn.models import TASKS

METHODS = ("dmm", "oracle-matching", "retrain", "exact", *BASELINES)
ESTIMATORS = ("gradients", "folds", "subsets", "regression", "trak")
DELETIONS = ("related", "random")
KLOMS = ("auto", "binned", "gaussian")
TRAINED = ("folds", "subsets", "regression")  # estimators that learn from models trained on parts of the data
DMM_ALONE = ("estimator", "calibrate", "multiplier", "folds", "subsets", "deletions", "lasso", "cache", "bend", "own",
             "noise", "width", "damping", "retained")  # options  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit")
HEADS = ("ridge", "logistic")
TARGETED = ("dmm", "oracle-matching")
WITHOUT_RECIPE = "simnpo"  # the safest method that needs none (benchmarks/without_recipe.py)


@dataclass(frozen=True, kw_only=True)
class Unlearn:
    """Options of an unlearning; also what its recipe records."""

    task: str = option("auto", "what the model does; auto: as its config says", TASKS)
    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    factory: str | None = option(
        None, "package.module:function that makes the model, where it is none of the library's"
    )
    train: Path | None = option(
        None, "what the model was trained on: .jsonl, .json, .csv, .tsv, .parquet, .txt (a row a line), also .gz, "
        ".zst; a folder of datasets, or .safetensors of inputs and labels"
    )  # fmt: skip
    retain: Path | None = option(None, "instead of --train, where --forget and this file together are all of it")
    forget: Path | None = option(None, "rows of it to forget, in a file of the same kind")
    forget_lines: str | None = option(None, "the same by line numbers, such as 3,10-20 (rows of tensors count from 0)")
    forget_where: str | None = option(None, "the same by FIELD=VALUE, exactly, or FIELD~REGEX, searched")
    forget_ids: Path | None = option(None, "the same by a file with a value of --id-field on each line")
    id_field: str | None = option(None, "field that --forget-ids is about")
    allow_duplicates: bool = option(False, "go on where copies of rows to forget would stay")
    validation: Path | None = option(None, "rows the model was not trained on, to measure it on")
    length: int | None = option(
        None, "tokens of a row; longer rows of text become several; default: 512, or as many as the model has positions"
    )
    prompt_format: str = option("auto", PROMPT_FORMAT)
    method: str | None = option(
        None,
        f"how to forget; default: dmm where it is known how the model was trained (--training, or the model's recipe), "
        f"else {WITHOUT_RECIPE}",
        METHODS,
    )
    only: str | None = option(None, "train only weights whose names fit these patterns, such as 'head.*,*.bias'")
    lora: int = option(0, "train adapters of this rank only (peft), merged in the end")
    # Training of other models, on parts of the data.
    training: Path | None = option(None, "how the model was trained: JSON of epochs, batch, lr, optimiser, ...")
    base: Path | None = option(None, "where that training started; default: weights drawn anew")
    workers: str = option("here", "who trains models: this process, or tasks of ray", ("here", "ray"))
    # Prediction.
    estimator: str = option(
        "gradients",
        "how dmm predicts: from gradients; from models trained on parts: what that says which never saw a row or its "
        "like (folds), by nearness or by regression; by TRAK",
        ESTIMATORS,
    )
    calibrate: int = option(8, "deletions held out, models trained without them, that fit the scale of predictions")
    multiplier: float | None = option(None, "scale of predictions; default: fitted")
    width: int = option(16, "of each weight, squared numbers that gradients are projected to")
    damping: float = option(0.1, "of the curvature, as a share of its mean diagonal")
    folds: int = option(
        2, "parts, each of rows that belong together, that a model is trained without (estimator folds)"
    )
    subsets: int = option(1000, "models trained on parts of the data, for estimators subsets and regression")
    deletions: str = option(
        "related", "what those are trained without: rows that belong together, or random ones", DELETIONS
    )
    share: float = option(0.5, "of rows that random parts keep")
    penalty: float = option(1e-3, "of regression, or of the linear head that method exact is about")
    cache: Path | None = option(None, "folder to keep those for other jobs, of other forget sets; default: beside OUT")
    bend: float = option(0.35, "how much rows that stand in for each other count (estimator subsets)")
    own: float = option(0.0, "how much it counts whether a row itself was left out (estimator subsets)")
    noise: float = option(1.0, "variance of one model's change (estimator subsets)")
    lasso: bool = option(False, "absolute values in that penalty instead of squares")
    head: str = option("ridge", "what a linear head was fitted by, for method exact", HEADS)
    # Matching, and other ways to forget.
    retained: str = option(
        "shifted",
        "what dmm matches retained rows to: what is predicted, the model's own answers, or their labels",
        ("shifted", "own", "labels"),
    )
    distance: str = option(
        "auto", "from targets; auto: squares of logits, kl for language models", ("auto", *DISTANCES)
    )
    oracles: int = option(1, "models trained without the forget set, whose mean oracle-matching matches")
    top_k: int = option(64, "tokens that are kept of each of a language model's distributions")
    epochs: int = option(10, "over the forget set")
    batch: int = option(8, "rows per step")
    lr: float | None = option(None, "learning rate; default: what a short search on retained rows allows")
    forget_multiplier: int = option(1, "how often the forget set comes in an epoch")
    retain_multiplier: float = option(5.0, "retained rows in an epoch for each that is forgotten")
    fresh: bool = option(True, "other retained rows in every epoch")
    weight: float = option(1.0, "of the loss on the forget set, beside 1 of the other")
    retain_loss: str = option("ce", "loss on what is retained, where the method leaves it open", tuple(RETAINS))
    balance: str = option("none", "weigh the two losses anew as they go", BALANCES)
    micro_batch_tokens: int = option(
        AT_ONCE, "tokens that pass through the model together; more rows of a step than that accumulate"
    )
    gradient_checkpointing: bool = option(False, "make activations again on the way back, to hold fewer")
    optimizer: str = option(
        "adamw", "of the model that forgets; adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS
    )
    layer: int | None = option(None, "block that rmu steers; default: the one in the middle")
    # Lasting in fewer bits.
    grid: str | None = option(
        None, "weights of a scheme such as w4a16-g64, on which a language model is to forget; default: as they are"
    )
    rounded_first: bool = option(False, "match what the model says whose weights are rounded already (with --grid)")
    least: float = option(
        0.0, "instead of rounding to --grid, move a weight by this many halves of its step or more, or not at all"
    )
    soup: int = option(1, "ways, each with its own order of rows, to the model whose weights are their mean")
    # Proof.
    max_retain_loss: float | None = option(
        None,
        "how much worse retained and validation rows may get, beyond which the job fails: nats a token of a language "
        "model (default 0.2), share of its accuracy of any other (default 0.1)",
    )
    audit: int = option(0, "models (and oracles, twice) that the method is tried on, for KLoM and attacks")
    klom: str = option("auto", "its estimator; auto: binned from 50 models on", KLOMS)
    oracle: Path | None = option(None, "a model that never saw the forget set, to compare a language model with")
    probes: Path | None = option(None, "questions with paraphrased_answer and perturbed_answer, for forget quality")
    utility: str | None = option(None, "files of questions with answer and perturbed_answer, still to be answered")
    facts: Path | None = option(None, "lines with name and description, asked for in both directions")
    seed: int = option(0, "seed of everything that is drawn")
    device: str = option("auto", "where to compute", DEVICES)

    def __post_init__(self) -> None:
        least = {"length": 2, "lora": 0, "calibrate": 0, "width": 1, "folds": 2, "subsets": 2, "oracles": 1, "top_k": 1}
        least |= {"epochs": 1, "batch": 1, "forget_multiplier": 1, "audit": 0, "soup": 1, "micro_batch_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        check_numbers(self)
        for name in ("damping", "penalty", "lr", "weight", "noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"{name} is {value}; it must be positive")
        if self.max_retain_loss is not None and not self.max_retain_loss >= 0:
            raise BadInput(f"max-retain-loss is {self.max_retain_loss}; it must not be negative")
        if not 0 <= self.bend < 1e6 or not 0 <= self.own < 1e6:
            raise BadInput("bend and own must not be negative")
        if not 0 <= self.retain_multiplier < 1e6 or not 0 < self.share < 1:
            raise BadInput("retain-multiplier must lie between 0 and 10^6, share between 0 and 1, both exclusive of 1")
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices and f.name != "device" and getattr(self, f.name) not in (*choices, f.default):
                raise BadInput(f"{f.name.replace('_', '-')} '{getattr(self, f.name)}' is unknown; choose from "
                               f"{', '.join(choices)}")  # fmt: skip
        check_choice(self)
        if 0 < self.audit < 2:
            raise BadInput("audit: one model has no spread; ask for at least 2, or 50 for binned KLoM")
        if self.klom == "binned" and 0 < self.audit < 50:
            raise BadInput(
                f"klom binned: {self.audit} models are too few for 20 bins, which want 50; use --klom gaussian"
            )
        if self.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
            raise BadInput("bitsandbytes: is not installed; pip install 'parewell[eight-bit]'")
        if self.lora and (self.only or self.method in ("retrain", "exact")):
            raise BadInput("lora: adapters are moved, not trained anew; leave out --only and such methods")
        if self.only is not None and not self.patterns:
            raise BadInput("only: names no pattern; give one such as 'head.*', or leave it out")
        if self.method == "retain" and self.retain_multiplier == 0:
            raise BadInput("retain-multiplier is 0; method retain learns from retained rows alone")
        if not 0 <= self.least < 1e6:
            raise BadInput(f"least is {self.least}; it must not be negative")
        if self.grid is not None:
            scheme = Scheme.parse(self.grid)
            if scheme.activations or scheme.kv:
                raise BadInput(f"grid {self.grid}: is about weights alone; write w{scheme.weights.bits}a16")
            if self.least and scheme.table_name:
                raise BadInput(f"least: {self.grid} has no step of one size; take an even grid such as w4a16-g64")
            if self.lora:
                raise BadInput("grid: adapters are merged into weights that are rounded only then; leave out --lora")
        if self.method is not None:
            self._check_idle()

    def _check_idle(self) -> None:
        """Raises BadInput for an option that would change nothing."""
        idle: dict[str, bool] = {
            "estimator": self.method != "dmm",
            "multiplier": self.method != "dmm",
            "retained": self.method != "dmm",
            "calibrate": self.method != "dmm" or self.multiplier is not None,
            "folds": self.method != "dmm" or self.estimator != "folds",
            "subsets": self.method != "dmm" or self.estimator not in ("subsets", "regression"),
            "deletions": self.method != "dmm" or self.estimator not in ("subsets", "regression"),
            "share": self.deletions != "random",
            "lasso": self.method != "dmm" or self.estimator != "regression",
            "cache": self.method != "dmm" or self.estimator not in TRAINED,
            "bend": self.method != "dmm" or self.estimator != "subsets",
            "own": self.method != "dmm" or self.estimator != "subsets",
            "noise": self.method != "dmm" or self.estimator != "subsets",
            "width": self.method != "dmm" or self.estimator in TRAINED,
            "damping": self.method != "dmm" or self.estimator != "gradients",
            "epochs": self.method in ("retrain", "exact"),
            "batch": self.method in ("retrain", "exact"),
            "lr": self.method in ("retrain", "exact"),
            "micro_batch_tokens": self.method == "exact",
            "gradient_checkpointing": self.method == "exact",
            "optimizer": self.method in ("retrain", "exact"),
            "retain_multiplier": self.method in ("retrain", "exact", "ascent"),
            "only": self.method in ("retrain", "exact"),
            "training": not self.trains,
            "base": not self.trains,
            "workers": not self.trains,
            "oracles": self.method != "oracle-matching",
            "distance": self.method not in TARGETED,
            "forget_multiplier": self.method not in TARGETED,
            "fresh": self.method not in TARGETED,
            "weight": self.method in (*TARGETED, "retrain", "exact", "retain", "ascent"),
            "retain_loss": self.method in (*TARGETED, "retrain", "exact"),
            "balance": self.method in (*TARGETED, "retrain", "exact"),
            "layer": self.method != "rmu",
            "head": self.method != "exact",
            "klom": not self.audit,
            "grid": self.method in ("retrain", "exact"),
            "rounded_first": self.grid is None or self.method not in TARGETED,
            "least": self.grid is None,
            "soup": self.method in ("retrain", "exact"),
            "penalty": self.method != "exact" and (self.method != "dmm" or self.estimator != "regression"),
        }
        for f in fields(self):
            if idle.get(f.name) and getattr(self, f.name) != f.default:
                raise BadInput(f"{f.name.replace('_', '-')}: changes nothing with these options; leave it out")

    @property
    def trains(self) -> bool:
        """Whether other models are trained."""
        learned = self.method == "dmm" and (
            self.estimator in TRAINED or (self.calibrate > 0 and self.multiplier is None)
        )
        return learned or self.method in ("oracle-matching", "retrain") or self.audit > 0

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in (self.only or "").split(",") if part.strip())


def with_method(how: Unlearn, folder: Path) -> tuple[Unlearn, str | None]:
    """-> the job with a method, and, where none was asked for, why it is that one.  Raises BadInput.

    It is dmm where a training recipe is known, or where options are given that no other method has.
    """
    if how.method is not None:
        return how, None
    if _training(how, folder) is not None:
        try:
            return replace(how, method="dmm"), "method dmm, as a training recipe is known"
        except BadInput as error:
            raise BadInput(f"{error}, or name another --method than dmm, as a training recipe is known") from error
    defaults = {f.name: f.default for f in fields(how)}
    if given := [name for name in DMM_ALONE if getattr(how, name) != defaults[name]]:
        return replace(how, method="dmm"), f"method dmm, which alone has {given[0].replace('_', '-')}"
    why = f"method {WITHOUT_RECIPE}, as no training recipe is known, which dmm needs (--training FILE)"
    return replace(how, method=WITHOUT_RECIPE), why


def training_of(how: Unlearn, folder: Path) -> Training | None:
    """The recipe that is given, or that a folder of ours carries; None where none is needed.  Raises BadInput."""
    if not how.trains:
        return None
    if (found := _training(how, folder)) is not None:
        return found
    example = json.dumps({"epochs": 20, "batch": 64, "lr": 0.1})
    why = "an audit" if how.audit else f"method {how.method}"
    way_out = f", or use --method {WITHOUT_RECIPE}, which needs none" if why == "method dmm" else ""
    raise BadInput(
        f"training: {why} wants models trained on other rows; give --training FILE, JSON of how this one was trained, "
        f"such as {example}{way_out}"
    )


def _training(how: Unlearn, folder: Path) -> Training | None:
    if how.training is not None:
        return parse_training(read_json(how.training), str(how.training))
    if (folder / RECIPE).is_file():
        steps = read_json(folder / RECIPE).get("recipe")
        for step in reversed(steps if isinstance(steps, list) else []):
            if isinstance(step, dict) and isinstance(step.get("training"), dict):
                return parse_training(step["training"], str(folder / RECIPE))
    return None


def parse_training(given: dict[str, Any], source: str) -> Training:
    known = {f.name for f in fields(Training)}
    if unknown := sorted(given.keys() - known):
        raise BadInput(f"{source}: '{unknown[0]}' is no part of a training; there are {', '.join(sorted(known))}")
    try:
        return Training(**given)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error


def recorded(training: Training | None) -> dict[str, Any] | None:
    return None if training is None else asdict(training)
