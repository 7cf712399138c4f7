"""Methods of unlearning, each with the options that it reads.

To add one: a file in `unlearn.methods` that defines a `Method` in ENTRIES, and a line in METHODS. Options of its own
are a class here, named in that line and among the bases of `Unlearn`.
"""

from __future__ import annotations

from dataclasses import dataclass

from calib.jobs.options import option
from calib.runtime.choices import BALANCES, OPTIMIZERS
from unlearn.options.estimators import ESTIMATORS, PenaltyOptions

RETAIN_LOSS_NAMES = ("ce", "kl", "rehearsal-forward-kl", "rehearsal-js", "rehearsal-alpha")
DISTANCE_NAMES = ("squares", "kl")  # of `unlearn.methods.matching.DISTANCES`
MICRO_BATCH_TOKENS = 4096  # tokens that pass through one model together
LINEAR_HEADS = ("ridge", "logistic")


@dataclass(frozen=True, kw_only=True)
class DatamodelOptions:
    """Datamodel matching: how predictions are made and scaled."""

    estimator: str = option(
        "gradients",
        "how dmm predicts: from gradients; from models trained on parts of the data: the answers of the one that a row "
        "and its like were left out of (folds), by nearness of deletions (subsets) or by regression; by TRAK",
        tuple(ESTIMATORS),
        group="method",
    )
    calibrate: int = option(
        8, "deletions held out, models trained without them, that fit the scale of predictions", group="method", ge=0,
        needs="multiplier=None",
    )  # fmt: skip
    multiplier: float | None = option(None, "scale of predictions; default: fitted", group="method")
    retained: str = option(
        "shifted",
        "what dmm matches retained rows to: what is predicted, the model's own answers, or their labels",
        ("shifted", "own", "labels"),
        group="method",
    )


@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """Oracle matching: how many models are retrained without the forget set."""

    oracles: int = option(
        1, "models trained without the forget set, whose mean oracle-matching matches", group="method", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """Methods that move a model to target answers."""

    distance: str = option(
        "auto", "from targets; auto: squares of logits, kl for language models", ("auto", *DISTANCE_NAMES),
        group="method",
    )  # fmt: skip
    forget_multiplier: int = option(1, "how often the forget set comes in an epoch", group="method", ge=1)
    fresh: bool = option(True, "other retained rows in every epoch", group="method")
    match_quantized: bool = option(
        False, "match what the model answers with weights that are rounded already", group="method", needs="grid"
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Methods that move a model in steps at a learning rate."""

    only: str | None = option(None, "train only weights whose names fit these patterns, such as 'head.*,*.bias'")
    lora: int = option(0, "train adapters of this rank only (peft), merged in the end", ge=0)
    epochs: int = option(10, "over the forget set", group="basic", ge=1)
    batch: int = option(8, "rows per step", group="method", ge=1)
    lr: float | None = option(
        None, "learning rate; default: what a short search on retained rows allows", group="basic", gt=0
    )
    optimizer: str = option(
        "adamw", "of the model that forgets; adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS
    )
    grid: str | None = option(
        None,
        "weights of a scheme such as w4a16-g64, on which a language model is to forget; default: as they are",
        group="method",
    )
    min_step: float = option(
        0.0, "instead of rounding to --grid, move a weight by this many halves of its step or more, or not at all",
        group="method", ge=0, needs="grid",
    )  # fmt: skip
    model_soup: int = option(
        1, "runs, each with its own order of rows, whose weights are averaged", group="method", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class ActivationMemoryOptions:
    """Methods that run a model forward and back."""

    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "tokens that pass through the model together; more rows of a step than that accumulate",
        ge=1,
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to hold fewer")


@dataclass(frozen=True, kw_only=True)
class RetainedRowsOptions:
    """Methods that train on retained rows too."""

    retain_multiplier: float = option(
        5.0, "retained rows in an epoch for each that is forgotten", group="method", ge=0, le=1e6
    )


@dataclass(frozen=True, kw_only=True)
class TwoLossOptions:
    """Methods with a loss on the forget set beside one on retained rows."""

    weight: float = option(1.0, "of the loss on the forget set, beside 1 of the other", group="method", gt=0)
    retain_loss: str = option(
        "ce", "loss on retained rows, where the method leaves it open", RETAIN_LOSS_NAMES, group="method"
    )
    balance: str = option("none", "reweigh the two losses during training", BALANCES, group="method")


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """Methods that steer the hidden states of a block."""

    layer: int | None = option(None, "block that rmu steers; default: the one in the middle", group="method")


@dataclass(frozen=True, kw_only=True)
class LinearHeadOptions:
    """Exact deletion from a linear head."""

    head: str = option("ridge", "what a linear head was fitted by, for method exact", LINEAR_HEADS, group="method")


@dataclass(frozen=True)
class MethodEntry:
    """A method's module in `unlearn.methods`, whose ENTRIES has it by its name; and the classes of the options that it
    reads.

    by_steps: it moves the model in steps at a learning rate, which may be searched.
    targets: it moves the model to target answers, by `unlearn.methods.matching`.
    trains: it trains other models, whatever its options are.
    """

    module: str
    options: tuple[type, ...]
    by_steps: bool = True
    targets: bool = False
    trains: bool = False


_STEPS = (StepOptions, ActivationMemoryOptions)
_LOSSES = (*_STEPS, RetainedRowsOptions, TwoLossOptions)
_TARGETS = (*_STEPS, RetainedRowsOptions, MatchingOptions)
METHODS = {
    "dmm": MethodEntry("datamodel_matching", (DatamodelOptions, *_TARGETS), targets=True),
    "oracle-matching": MethodEntry("oracle_matching", (OracleOptions, *_TARGETS), targets=True, trains=True),
    "retrain": MethodEntry("retrain", (ActivationMemoryOptions,), by_steps=False, trains=True),
    "exact": MethodEntry("exact", (LinearHeadOptions, PenaltyOptions), by_steps=False),
    "ascent": MethodEntry("gradient", _STEPS),
    "retain": MethodEntry("gradient", (*_STEPS, RetainedRowsOptions)),
    "difference": MethodEntry("gradient", _LOSSES),
    "npo": MethodEntry("preference", _LOSSES),
    "npo-js": MethodEntry("preference", _LOSSES),
    "npo-forward-kl": MethodEntry("preference", _LOSSES),
    "npo-alpha": MethodEntry("preference", _LOSSES),
    "simnpo": MethodEntry("preference", _LOSSES),
    "scrub": MethodEntry("gradient", _LOSSES),
    "rmu": MethodEntry("representation", (*_LOSSES, SteeringOptions)),
}
WITHOUT_RECIPE = "simnpo"  # the safest method that needs none (benchmarks/without_recipe.py)
