"""Options of an unlearning, and of an audit: arguments of the function, options of the command, and recipe at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

from calib import BadInput
from calib.jobs.options import PROMPT_FORMAT, Preset, check_numbers, option, with_preset
from calib.quant.scheme import Scheme
from calib.runtime.choices import BALANCES, DEVICES, OPTIMIZERS

UNLEARNING_TASKS = ("auto", "causal-lm", "sequence-classification", "image-classification", "tensors")
BASELINE_NAMES = (  # keys of `unlearn.methods.baselines.BASELINES`
    "ascent", "retain", "difference", "npo", "npo-js", "npo-forward-kl", "npo-alpha", "simnpo", "scrub", "rmu",
)  # fmt: skip
RETAIN_LOSS_NAMES = ("ce", "kl", "rehearsal-forward-kl", "rehearsal-js", "rehearsal-alpha")  # of its RETAINS
DISTANCE_NAMES = ("squares", "kl")  # of `unlearn.methods.matching.DISTANCES`
MICRO_BATCH_TOKENS = 4096  # tokens that pass through one model together
METHODS = ("dmm", "oracle-matching", "retrain", "exact", *BASELINE_NAMES)
ESTIMATORS = ("gradients", "folds", "subsets", "regression", "trak")
DELETIONS = ("related", "random")
KLOMS = ("auto", "binned", "gaussian")
TRAINED = ("folds", "subsets", "regression")  # estimators that learn from models trained on parts of the data
DMM_ALONE = (  # options
    "estimator", "calibrate", "multiplier", "folds", "subsets", "deletions", "lasso", "cache", "gp_interaction",
    "gp_self", "gp_noise", "width", "damping", "retained",
)  # fmt: skip
FORMS = "w8a16-channel,w4a16-channel,nf4"  # that an audit brings models to
LINEAR_HEADS = ("ridge", "logistic")
TARGETED = ("dmm", "oracle-matching")
WITHOUT_RECIPE = "simnpo"  # the safest method that needs none (benchmarks/without_recipe.py)


class RowSelection(Protocol):
    """The options that say which rows a model was trained on, and which of them are to be forgotten."""

    @property
    def train(self) -> Path | None: ...
    @property
    def retain(self) -> Path | None: ...
    @property
    def forget(self) -> Path | None: ...
    @property
    def forget_lines(self) -> str | None: ...
    @property
    def forget_where(self) -> str | None: ...
    @property
    def forget_ids(self) -> Path | None: ...
    @property
    def id_field(self) -> str | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def prompt_format(self) -> str: ...


def check_selection(options: RowSelection) -> None:
    """Raises BadInput where options say too little, or things that do not go together."""
    if options.train is None and options.retain is None:
        raise BadInput(
            "train: which rows the model was trained on must be known; give --train FILE, or --retain FILE beside "
            "--forget FILE"
        )
    if options.retain is not None and (options.train is not None or options.forget is None):
        raise BadInput("retain: goes with --forget FILE, and the two are what --train would be; leave out --train")
    if (options.forget_ids is None) != (options.id_field is None):
        raise BadInput("forget-ids: goes with the field that it is about; give --forget-ids FILE --id-field NAME")
    if all(way is None for way in (options.forget, options.forget_lines, options.forget_where, options.forget_ids)):
        raise BadInput(
            "forget: nothing says what; give --forget FILE, --forget-lines 3,10-20, --forget-where FIELD=VALUE or "
            "--forget-ids FILE --id-field NAME"
        )


UNLEARN_PRESETS = {  # measured in benchmarks/results/presets.md
    "fast": Preset("half of the epochs", {"epochs": 5}),
    "default": Preset("10 epochs", {}),
    "best": Preset("20 epochs", {"epochs": 20}),
}


@dataclass(frozen=True, kw_only=True)
class Unlearn:
    """Options of an unlearning; also what its recipe records."""

    task: str = option("auto", "what the model does; auto: as its config says", UNLEARNING_TASKS, group="data")
    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    factory: str | None = option(
        None, "package.module:function that makes the model, where it is none of the library's", group="data"
    )
    train: Path | None = option(
        None, "what the model was trained on: .jsonl, .json, .csv, .tsv, .parquet, .txt (a row a line), also .gz, "
        ".zst; a folder of datasets, or .safetensors of inputs and labels", group="data"
    )  # fmt: skip
    retain: Path | None = option(
        None, "instead of --train, where --forget and this file together are all of it", group="data"
    )
    forget: Path | None = option(None, "rows of it to forget, in a file of the same kind", group="data")
    forget_lines: str | None = option(
        None, "the same by line numbers, such as 3,10-20 (rows of tensors count from 0)", group="data"
    )
    forget_where: str | None = option(None, "the same by FIELD=VALUE, exactly, or FIELD~REGEX, searched", group="data")
    forget_ids: Path | None = option(None, "the same by a file with a value of --id-field on each line", group="data")
    id_field: str | None = option(None, "field that --forget-ids is about", group="data")
    allow_duplicates: bool = option(False, "go on where copies of rows to forget would stay", group="data")
    validation: Path | None = option(None, "rows the model was not trained on, to measure it on", group="data")
    length: int | None = option(
        None,
        "tokens of a row; longer rows of text become several; default: 512, or as many as the model has positions",
        group="data",
    )
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    method: str | None = option(
        None,
        f"how to forget; default: dmm where it is known how the model was trained (--training, or the model's recipe), "
        f"else {WITHOUT_RECIPE}",
        METHODS,
        group="basic",
    )
    only: str | None = option(None, "train only weights whose names fit these patterns, such as 'head.*,*.bias'")
    lora: int = option(0, "train adapters of this rank only (peft), merged in the end")
    # Training of other models, on parts of the data.
    training: Path | None = option(
        None, "how the model was trained: JSON of epochs, batch, lr, optimiser, ...", group="basic"
    )
    base: Path | None = option(None, "where that training started; default: weights drawn anew")
    workers: str = option("here", "who trains models: this process, or tasks of ray", ("here", "ray"))
    # Prediction.
    estimator: str = option(
        "gradients",
        "how dmm predicts: from gradients; from models trained on parts: what that says which never saw a row or its "
        "like (folds), by nearness or by regression; by TRAK",
        ESTIMATORS,
        group="method",
    )
    calibrate: int = option(
        8, "deletions held out, models trained without them, that fit the scale of predictions", group="method"
    )
    multiplier: float | None = option(None, "scale of predictions; default: fitted", group="method")
    width: int = option(16, "of each weight, squared numbers that gradients are projected to", group="method")
    damping: float = option(0.1, "of the curvature, as a share of its mean diagonal", group="method")
    folds: int = option(
        2, "parts, each of rows that belong together, that a model is trained without (estimator folds)", group="method"
    )
    subsets: int = option(
        1000, "models trained on parts of the data, for estimators subsets and regression", group="method"
    )
    deletions: str = option(
        "related",
        "what those are trained without: rows that belong together, or random ones",
        DELETIONS,
        group="method",
    )
    share: float = option(0.5, "of rows that random parts keep", group="method")
    penalty: float = option(1e-3, "of regression, or of the linear head that method exact is about", group="method")
    cache: Path | None = option(None, "folder to keep those for other jobs, of other forget sets; default: beside OUT")
    gp_interaction: float = option(
        0.35, "how much rows that stand in for each other count (estimator subsets)", group="method"
    )
    gp_self: float = option(
        0.0, "how much it counts whether a row itself was left out (estimator subsets)", group="method"
    )
    gp_noise: float = option(1.0, "variance of one model's change (estimator subsets)", group="method")
    lasso: bool = option(False, "absolute values in that penalty instead of squares", group="method")
    head: str = option("ridge", "what a linear head was fitted by, for method exact", LINEAR_HEADS, group="method")
    # Matching, and other ways to forget.
    retained: str = option(
        "shifted",
        "what dmm matches retained rows to: what is predicted, the model's own answers, or their labels",
        ("shifted", "own", "labels"),
        group="method",
    )
    distance: str = option(
        "auto",
        "from targets; auto: squares of logits, kl for language models",
        ("auto", *DISTANCE_NAMES),
        group="method",
    )
    oracles: int = option(
        1, "models trained without the forget set, whose mean oracle-matching matches", group="method"
    )
    top_k: int = option(64, "tokens that are kept of each of a language model's distributions", group="method")
    epochs: int = option(10, "over the forget set", group="basic")
    batch: int = option(8, "rows per step", group="method")
    lr: float | None = option(
        None, "learning rate; default: what a short search on retained rows allows", group="basic"
    )
    forget_multiplier: int = option(1, "how often the forget set comes in an epoch", group="method")
    retain_multiplier: float = option(5.0, "retained rows in an epoch for each that is forgotten", group="method")
    fresh: bool = option(True, "other retained rows in every epoch", group="method")
    weight: float = option(1.0, "of the loss on the forget set, beside 1 of the other", group="method")
    retain_loss: str = option(
        "ce", "loss on what is retained, where the method leaves it open", RETAIN_LOSS_NAMES, group="method"
    )
    balance: str = option("none", "weigh the two losses anew as they go", BALANCES, group="method")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "tokens that pass through the model together; more rows of a step than that accumulate"
    )
    gradient_checkpointing: bool = option(False, "make activations again on the way back, to hold fewer")
    optimizer: str = option(
        "adamw", "of the model that forgets; adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS
    )
    layer: int | None = option(None, "block that rmu steers; default: the one in the middle", group="method")
    # Lasting in fewer bits.
    grid: str | None = option(
        None,
        "weights of a scheme such as w4a16-g64, on which a language model is to forget; default: as they are",
        group="method",
    )
    match_quantized: bool = option(
        False, "match what the model says whose weights are rounded already (with --grid)", group="method"
    )
    min_step: float = option(
        0.0,
        "instead of rounding to --grid, move a weight by this many halves of its step or more, or not at all",
        group="method",
    )
    model_soup: int = option(
        1, "ways, each with its own order of rows, to the model whose weights are their mean", group="method"
    )
    # Proof.
    max_retain_loss: float | None = option(
        None,
        "how much worse retained and validation rows may get, beyond which the job fails: nats a token of a language "
        "model (default 0.2), share of its accuracy of any other (default 0.1)",
        group="proof",
    )
    audit: int = option(
        0, "models (and oracles, twice) that the method is tried on, for KLoM and attacks", group="proof"
    )
    klom: str = option("auto", "its estimator; auto: binned from 50 models on", KLOMS, group="proof")
    oracle: Path | None = option(
        None, "a model that never saw the forget set, to compare a language model with", group="proof"
    )
    probes: Path | None = option(
        None, "questions with paraphrased_answer and perturbed_answer, for forget quality", group="proof"
    )
    utility: str | None = option(
        None, "files of questions with answer and perturbed_answer, still to be answered", group="proof"
    )
    facts: Path | None = option(None, "lines with name and description, asked for in both directions", group="proof")
    seed: int = option(0, "seed of everything that is drawn")
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    @classmethod
    def preset(cls, name: str, **given: Any) -> Unlearn:
        """Options by the name of a preset.

        Args:
            name: a key of UNLEARN_PRESETS: fast, default or best.
            given: options that come before the preset's; the preset leaves alone what means nothing beside them.

        Raises:
            BadInput: the preset is unknown, or options do not go together.
        """
        values = {f.name: f.default for f in fields(cls)} | given
        values["method"] = values["method"] or WITHOUT_RECIPE  # what means something to that does to dmm as well
        idle = idle_options(cast(Unlearn, SimpleNamespace(**values)))
        return cls(**with_preset(UNLEARN_PRESETS, name, given, idle))

    def __post_init__(self) -> None:
        least = {"length": 2, "lora": 0, "calibrate": 0, "width": 1, "folds": 2, "subsets": 2, "oracles": 1, "top_k": 1}
        least |= {"epochs": 1, "batch": 1, "forget_multiplier": 1, "audit": 0, "model_soup": 1, "micro_batch_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        check_numbers(self)
        for name in ("damping", "penalty", "lr", "weight", "gp_noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"{name} is {value}; it must be positive")
        if self.max_retain_loss is not None and not self.max_retain_loss >= 0:
            raise BadInput(f"max-retain-loss is {self.max_retain_loss}; it must not be negative")
        if not 0 <= self.gp_interaction < 1e6 or not 0 <= self.gp_self < 1e6:
            raise BadInput("gp-interaction and gp-self must not be negative")
        if not 0 <= self.retain_multiplier < 1e6 or not 0 < self.share < 1:
            raise BadInput("retain-multiplier must lie between 0 and 10^6, share between 0 and 1, both exclusive of 1")
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices and f.name != "device" and getattr(self, f.name) not in (*choices, f.default):
                raise BadInput(f"{f.name.replace('_', '-')} '{getattr(self, f.name)}' is unknown; choose from "
                               f"{', '.join(choices)}")  # fmt: skip
        check_selection(self)
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
        if not 0 <= self.min_step < 1e6:
            raise BadInput(f"min-step is {self.min_step}; it must not be negative")
        if self.grid is not None:
            scheme = Scheme.parse(self.grid)
            object.__setattr__(self, "grid", scheme.name)
            if scheme.activations or scheme.kv:
                raise BadInput(f"grid {self.grid}: is about weights alone; write {scheme.weights_only().name}")
            if self.min_step and scheme.table_name:
                raise BadInput(f"min-step: {self.grid} has no step of one size; take an even grid such as w4a16-g64")
            if self.lora:
                raise BadInput("grid: adapters are merged into weights that are rounded only then; leave out --lora")
        if self.method is not None:
            self._check_idle()

    def _check_idle(self) -> None:
        """Raises BadInput for an option that would change nothing."""
        idle = idle_options(self)
        for f in fields(self):
            if f.name in idle and getattr(self, f.name) != f.default:
                raise BadInput(f"{f.name.replace('_', '-')}: changes nothing with these options; leave it out")

    @property
    def trains(self) -> bool:
        """Whether other models are trained."""
        return _trains(self)

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in (self.only or "").split(",") if part.strip())


def idle_options(options: Unlearn) -> set[str]:
    """Names of the options that change nothing beside the others."""
    trained = _trains(options)
    idle = {
        "estimator": options.method != "dmm",
        "multiplier": options.method != "dmm",
        "retained": options.method != "dmm",
        "calibrate": options.method != "dmm" or options.multiplier is not None,
        "folds": options.method != "dmm" or options.estimator != "folds",
        "subsets": options.method != "dmm" or options.estimator not in ("subsets", "regression"),
        "deletions": options.method != "dmm" or options.estimator not in ("subsets", "regression"),
        "share": options.deletions != "random",
        "lasso": options.method != "dmm" or options.estimator != "regression",
        "cache": options.method != "dmm" or options.estimator not in TRAINED,
        "gp_interaction": options.method != "dmm" or options.estimator != "subsets",
        "gp_self": options.method != "dmm" or options.estimator != "subsets",
        "gp_noise": options.method != "dmm" or options.estimator != "subsets",
        "width": options.method != "dmm" or options.estimator in TRAINED,
        "damping": options.method != "dmm" or options.estimator != "gradients",
        "epochs": options.method in ("retrain", "exact"),
        "batch": options.method in ("retrain", "exact"),
        "lr": options.method in ("retrain", "exact"),
        "micro_batch_tokens": options.method == "exact",
        "gradient_checkpointing": options.method == "exact",
        "optimizer": options.method in ("retrain", "exact"),
        "retain_multiplier": options.method in ("retrain", "exact", "ascent"),
        "only": options.method in ("retrain", "exact"),
        "training": not trained,
        "base": not trained,
        "workers": not trained,
        "oracles": options.method != "oracle-matching",
        "distance": options.method not in TARGETED,
        "forget_multiplier": options.method not in TARGETED,
        "fresh": options.method not in TARGETED,
        "weight": options.method in (*TARGETED, "retrain", "exact", "retain", "ascent"),
        "retain_loss": options.method in (*TARGETED, "retrain", "exact"),
        "balance": options.method in (*TARGETED, "retrain", "exact"),
        "layer": options.method != "rmu",
        "head": options.method != "exact",
        "klom": not options.audit,
        "grid": options.method in ("retrain", "exact"),
        "match_quantized": options.grid is None or options.method not in TARGETED,
        "min_step": options.grid is None,
        "model_soup": options.method in ("retrain", "exact"),
        "penalty": options.method != "exact" and (options.method != "dmm" or options.estimator != "regression"),
    }
    return {name for name, unused in idle.items() if unused}


def _trains(options: Unlearn) -> bool:
    """Whether models are trained beside the one that forgets."""
    learned = options.method == "dmm" and (
        options.estimator in TRAINED or (options.calibrate > 0 and options.multiplier is None)
    )
    return learned or options.method in ("oracle-matching", "retrain") or options.audit > 0


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Options of an audit."""

    original: Path | None = option(None, "the model before it forgot", group="basic")
    oracle: Path | None = option(None, "a model of the same kind that never saw the forgotten rows", group="basic")
    train: Path | None = option(None, "what the original was trained on, as for unlearn", group="data")
    forget: Path | None = option(None, "the rows that were forgotten, as for unlearn", group="data")
    forget_lines: str | None = option(None, "the same by line numbers, such as 3,10-20", group="data")
    forget_where: str | None = option(None, "the same by FIELD=VALUE, exactly, or FIELD~REGEX, searched", group="data")
    forget_ids: Path | None = option(None, "the same by a file with a value of --id-field on each line", group="data")
    id_field: str | None = option(None, "field that --forget-ids is about", group="data")
    retain: Path | None = option(
        None, "instead of --train, where --forget and this file together are all of it", group="data"
    )
    length: int | None = option(None, "tokens of a row, as for unlearn", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    forms: str | None = option(
        None,
        "what a float model is brought to: w4a16, nf4 and such round to nearest; gptq:w4a16-g64 is with GPTQ, "
        f"learned:w4a16-g64 with learned transforms; default: {FORMS}",
        group="basic",
    )
    data: Path | None = option(None, "text that those are calibrated on; default: the embedded text", group="data")
    samples: int = option(128, "rows of 512 tokens of it", group="data")
    relearn: int = option(
        0, "steps of training on half of the forgotten rows, to see what comes back of the others", group="proof"
    )
    relearn_lr: float = option(1e-3, "learning rate of those (AdamW, 8 rows a step)", group="proof")
    seed: int = option(0, "seed of which retained rows are measured, and of relearning")
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    def __post_init__(self) -> None:
        check_numbers(self)
        check_selection(self)
        for f in fields(self)[:2]:
            if getattr(self, f.name) is None:
                raise BadInput(f"{f.name}: is not given; an audit compares models on rows, give --{f.name} PATH")
        if self.length is not None and self.length < 2:
            raise BadInput(f"length is {self.length}; it must be at least 2")
        if not self.named or len(set(self.named)) < len(self.named):
            raise BadInput(f"forms '{self.forms}': must name some, each once, such as w4a16,nf4")
        if self.data is not None and not any(":" in form for form in self.named):
            raise BadInput("data: rounding to nearest needs none; leave it out, or add a form such as gptq:w4a16-g64")
        if self.samples < 1:
            raise BadInput(f"samples is {self.samples}; it must be at least 1")
        if self.relearn < 0 or not self.relearn_lr > 0:
            raise BadInput("relearn must not be negative, relearn-lr must be positive")
        if self.relearn_lr != 1e-3 and not self.relearn:
            raise BadInput("relearn-lr: changes nothing without --relearn; leave it out")

    @property
    def named(self) -> list[str]:
        return [form.strip() for form in (FORMS if self.forms is None else self.forms).split(",") if form.strip()]
