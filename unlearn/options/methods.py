"""Methods of unlearning, each with the options that it reads.

To add one: a file in `unlearn.methods` that defines a `Method` in ENTRIES, and a line in METHODS. Options of its own
are a class here, named in that line and among the bases of `Unlearn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
        8, "deletions that the scale of predictions is fitted on, each by a model trained without it", group="method",
        ge=0, needs="multiplier=None",
    )  # fmt: skip
    multiplier: float | None = option(None, "scale of predictions; default: fitted", group="method")
    retained: str = option(
        "shifted",
        "targets of retained rows in dmm: predicted answers, the model's own, or the labels",
        ("shifted", "own", "labels"),
        group="method",
    )


@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """Oracle matching: how many models are retrained without the forget set."""

    oracles: int = option(
        1, "number of models retrained without the forget set, whose mean is the target", group="method", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """Methods that move a model to target answers."""

    distance: str = option(
        "auto", "distance to the targets; auto: squares of logits, KL for language models", ("auto", *DISTANCE_NAMES),
        group="method",
    )  # fmt: skip
    forget_multiplier: int = option(1, "passes over the forget set in an epoch", group="method", ge=1)
    fresh: bool = option(True, "draw new retained rows in every epoch", group="method")
    match_quantized: bool = option(
        False, "start from, and predict from, weights that are rounded already", group="method", needs="grid"
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Methods that move a model in steps at a learning rate."""

    only: str | None = option(None, "train only weights whose names fit these patterns, such as 'head.*,*.bias'")
    lora: int = option(0, "train adapters of this rank only (peft), merged in the end", ge=0)
    epochs: int = option(10, "epochs over the forget set", group="basic", ge=1)
    batch: int = option(8, "rows per step", group="method", ge=1)
    lr: float | None = option(
        None, "learning rate; default: what a short search on retained rows allows", group="basic", gt=0
    )
    optimizer: str = option(
        "adamw", "optimizer of the unlearning steps; adamw8bit: moments in 8 bits (bitsandbytes)", OPTIMIZERS
    )
    grid: str | None = option(
        None,
        "scheme such as w4a16-g64 on whose grid of weights a language model forgets, so that quantizing it recovers "
        "nothing; default: none",
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
        MICRO_BATCH_TOKENS, "tokens per forward pass; larger batches accumulate gradients",
        ge=1,
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")


@dataclass(frozen=True, kw_only=True)
class RetainedRowsOptions:
    """Methods that train on retained rows too."""

    retain_multiplier: float = option(5.0, "retained rows per forgotten row in an epoch", group="method", ge=0, le=1e6)


@dataclass(frozen=True, kw_only=True)
class TwoLossOptions:
    """Methods with a loss on the forget set beside one on retained rows."""

    weight: float = option(1.0, "weight of the forget loss; the retain loss has 1", group="method", gt=0)
    retain_loss: str = option(
        "ce", "loss on retained rows, where the method leaves a choice", RETAIN_LOSS_NAMES, group="method"
    )
    balance: str = option("none", "reweigh the two losses during training", BALANCES, group="method")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Methods that prefer an alternative answer to the forgotten one."""

    alternatives: Path | None = option(
        None, "alternative answers: a row with the prompt of each row to forget, or answers without prompts, of which "
        "each gets one (a .txt, one a line, or rows with 'answer' alone)", group="method"
    )  # fmt: skip
    beta: float = option(0.1, "how strongly dpo is held to the model as it was", group="method", gt=0)


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """Methods that steer the hidden states of a block."""

    layer: int | None = option(None, "block that rmu steers; default: the one in the middle", group="method")


@dataclass(frozen=True, kw_only=True)
class LinearHeadOptions:
    """Exact deletion from a linear head."""

    head: str = option("ridge", "how the linear head was fitted", LINEAR_HEADS, group="method")


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

    @property
    def in_pairs(self) -> bool:
        """Whether it prefers alternative answers to those that are forgotten."""
        return PairOptions in self.options


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
    "dpo": MethodEntry("pairs", (*_LOSSES, PairOptions)),
    "dpo-js": MethodEntry("pairs", (*_LOSSES, PairOptions)),
    "dpo-forward-kl": MethodEntry("pairs", (*_LOSSES, PairOptions)),
    "dpo-alpha": MethodEntry("pairs", (*_LOSSES, PairOptions)),
    "scrub": MethodEntry("gradient", _LOSSES),
    "rmu": MethodEntry("representation", (*_LOSSES, SteeringOptions)),
}
WITHOUT_RECIPE = "simnpo"  # the safest method that needs none (benchmarks/without_recipe.py)
