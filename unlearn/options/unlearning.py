"""Options of an unlearning: arguments of the function, options of the command, and recipe at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calib import BadInput
from calib.jobs.options import Preset, check_options, flag_name, option, with_preset
from calib.quant.scheme import Scheme
from calib.runtime.choices import DEVICES
from unlearn.options.estimators import (
    ESTIMATORS,
    CacheOptions,
    CurvatureOptions,
    FoldOptions,
    LassoOptions,
    NearnessOptions,
    PenaltyOptions,
    ProjectionOptions,
    SubsetOptions,
)
from unlearn.options.methods import (
    METHODS,
    WITHOUT_RECIPE,
    ActivationMemoryOptions,
    DatamodelOptions,
    LinearHeadOptions,
    MatchingOptions,
    MethodEntry,
    OracleOptions,
    PairOptions,
    RetainedRowsOptions,
    SteeringOptions,
    StepOptions,
    TwoLossOptions,
)
from unlearn.options.rows import RowOptions

UNLEARNING_TASKS = ("auto", "causal-lm", "sequence-classification", "image-classification", "tensors")
KLOMS = ("auto", "binned", "gaussian")
UNLEARN_PRESETS = {  # measured in benchmarks/results/presets.md
    "fast": Preset("half of the epochs", {"epochs": 5}),
    "default": Preset("10 epochs", {}),
    "best": Preset("20 epochs", {"epochs": 20}),
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of the model and the method."""

    task: str = option("auto", "task of the model; auto: as its config says", UNLEARNING_TASKS, group="data")
    base_model: Path | None = option(
        None, "base model of MODEL where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize MODEL first, where it is GGUF, FP8 or the like")
    factory: str | None = option(
        None, "package.module:function that builds the model, where transformers does not know it", group="data"
    )
    method: str | None = option(
        None,
        f"how to forget; default: dmm where it is known how the model was trained (--training, or the model's recipe), "
        f"else {WITHOUT_RECIPE}",
        tuple(METHODS),
        group="basic",
    )
    allow_duplicates: bool = option(
        False, "allow copies of forgotten rows to stay among the retained ones", group="data"
    )
    validation: Path | None = option(None, "rows the model was not trained on, on which it is measured", group="data")
    top_k: int = option(64, "most likely tokens kept of each of a language model's distributions", group="method", ge=1)


@dataclass(frozen=True, kw_only=True)
class RetrainingOptions:
    """Options of how other models are trained: oracles, models of an audit, models that estimators learn from."""

    training: Path | None = option(
        None, "how the model was trained: JSON of epochs, batch, lr, optimiser, ...", group="basic"
    )
    base: Path | None = option(None, "model that this training started from; default: randomly initialized")
    workers: str = option(
        "here", "where other models are trained: in this process, or in tasks of ray", ("here", "ray")
    )


@dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """Options of what is measured, and when a job fails."""

    max_retain_loss: float | None = option(
        None,
        "greatest loss on retained and validation rows, beyond which the job fails: nats per token of a language "
        "model (default 0.2), share of the accuracy of any other (default 0.1)",
        group="proof",
        ge=0,
    )
    audit: int = option(
        0, "number of models (and twice as many oracles) to measure KLoM and attacks on", group="proof", ge=0
    )
    klom: str = option("auto", "estimator of KLoM; auto: binned from 50 models on", KLOMS, group="proof", needs="audit")
    oracle: Path | None = option(
        None, "a language model retrained without the forget set, to compare with", group="proof"
    )
    probes: Path | None = option(
        None, "questions with paraphrased_answer and perturbed_answer, for TOFU's forget quality", group="proof"
    )
    utility: str | None = option(
        None, "files of questions with answer and perturbed_answer, for TOFU's model utility", group="proof"
    )
    facts: Path | None = option(
        None, "rows with name and description, for questions in both directions (reversal)", group="proof"
    )


@dataclass(frozen=True, kw_only=True)
class Unlearn(  # fields in the order of bases from the last to the first
    ProofOptions,
    LinearHeadOptions,
    SteeringOptions,
    PairOptions,
    TwoLossOptions,
    MatchingOptions,
    OracleOptions,
    LassoOptions,
    PenaltyOptions,
    NearnessOptions,
    CacheOptions,
    SubsetOptions,
    FoldOptions,
    CurvatureOptions,
    ProjectionOptions,
    DatamodelOptions,
    ActivationMemoryOptions,
    RetainedRowsOptions,
    StepOptions,
    RetrainingOptions,
    RowOptions,
    ModelOptions,
):
    """Options of an unlearning; also what its recipe records.

    Raises:
        BadInput: a value is out of its bounds, or an option does not belong to the method or changes nothing.
    """

    seed: int = option(0, "random seed", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    @classmethod
    def preset(cls, name: str, **given: Any) -> Unlearn:
        """Options by the name of a preset.

        Args:
            name: a key of UNLEARN_PRESETS: fast, default or best.
            given: options that come before the preset's; the preset leaves alone what the method does not read.

        Raises:
            BadInput: the preset is unknown, or options do not go together.
        """
        method, estimator = given.get("method") or WITHOUT_RECIPE, given.get("estimator", cls.estimator)
        idle = idle_options(method, estimator) if method in METHODS and estimator in ESTIMATORS else set()
        return cls(**with_preset(UNLEARN_PRESETS, name, given, idle))

    def __post_init__(self) -> None:
        check_options(self)
        self.check_rows()
        if 0 < self.audit < 2:
            raise BadInput("audit: one model has no spread; ask for at least 2, or 50 for binned KLoM")
        if self.klom == "binned" and 0 < self.audit < 50:
            raise BadInput(
                f"klom binned: {self.audit} models are too few for 20 bins, which want 50; use --klom gaussian"
            )
        if self.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
            raise BadInput("bitsandbytes: is not installed; pip install 'parewell[eight-bit]'")
        if self.lora and self.only:
            raise BadInput("lora: adapters are trained, not the model's own weights; leave out --only")
        if self.only is not None and not self.patterns:
            raise BadInput("only: names no pattern; give one such as 'head.*', or leave it out")
        if self.method == "retain" and self.retain_multiplier == 0:
            raise BadInput("retain-multiplier is 0; method retain learns from retained rows alone")
        if self.method is not None and self.entry.in_pairs and self.alternatives is None:
            raise BadInput(
                f"method {self.method}: prefers other answers to the forgotten ones; give --alternatives FILE"
            )
        if self.both_ways and self.method is not None and self.entry.in_pairs:
            raise BadInput(
                "both-ways: an alternative answers one prompt, and a fact is two; leave it out, or choose npo"
            )
        self._check_grid()
        self._check_idle()

    def _check_grid(self) -> None:
        """Give the grid its scheme's full name.  Raises BadInput where it is about more than weights."""
        if self.grid is None:
            return
        scheme = Scheme.parse(self.grid)
        object.__setattr__(self, "grid", scheme.name)
        if scheme.activations or scheme.kv:
            raise BadInput(f"grid {self.grid}: is about weights alone; write {scheme.weights_only().name}")
        if scheme.weights.is_block_type:
            raise BadInput(f"grid {self.grid}: blocks of llama.cpp's are not known here; take w4a16-g32")
        if self.min_step and not scheme.weights.is_even:
            raise BadInput(f"min-step: {self.grid} has no step of one size; take an even grid such as w4a16-g64")
        if self.lora:
            raise BadInput("grid: adapters are merged into weights that are rounded only then; leave out --lora")

    def _check_idle(self) -> None:
        """Raises BadInput for an option that the method does not read."""
        if self.method is None:
            return
        idle = idle_options(self.method, self.estimator, trains=self.trains)
        for f in fields(self):
            if f.name in idle and getattr(self, f.name) != f.default:
                of = f"method {self.method}" + (f" and estimator {self.estimator}" if self.method == "dmm" else "")
                raise BadInput(f"{flag_name(f.name)}: changes nothing with {of}; leave it out")

    @property
    def entry(self) -> MethodEntry:
        """The table's entry of the method, which must have been chosen."""
        assert self.method is not None
        return METHODS[self.method]

    @property
    def trains(self) -> bool:
        """Whether other models are trained beside the one that forgets."""
        learned = self.method == "dmm" and (
            ESTIMATORS[self.estimator].trains or (self.calibrate > 0 and self.multiplier is None)
        )
        return learned or (self.method is not None and self.entry.trains) or self.audit > 0

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of names of the weights that are trained; empty: all."""
        return tuple(part.strip() for part in (self.only or "").split(",") if part.strip())


def _names(classes: Iterable[type]) -> set[str]:
    return {f.name for each in classes for f in fields(each)}


def idle_options(method: str, estimator: str, *, trains: bool = True) -> set[str]:
    """Names of the options that a method, for dmm with an estimator, does not read."""
    used, known = set(METHODS[method].options), {c for entry in METHODS.values() for c in entry.options}
    known |= {c for entry in ESTIMATORS.values() for c in entry.options}
    if method == "dmm":
        used |= set(ESTIMATORS[estimator].options)
    if not trains:
        known.add(RetrainingOptions)
    return _names(known) - _names(used)


def dmm_options() -> set[str]:
    """Names of the options that datamodel matching alone reads."""
    others = {c for name, entry in METHODS.items() if name != "dmm" for c in entry.options}
    own = {*METHODS["dmm"].options, *(c for entry in ESTIMATORS.values() for c in entry.options)}
    return _names(own - others)
