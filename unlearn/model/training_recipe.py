"""How a model was trained: as a file or a recipe says it, and as others are to be trained like it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import BadInput
from calib.jobs.options import option
from calib.model.config import RECIPE, read_json
from unlearn.options.methods import WITHOUT_RECIPE
from unlearn.options.unlearning import Unlearn, dmm_options

if TYPE_CHECKING:
    from torch import Tensor

TRAINING_OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training recipe: SGD with momentum or AdamW, its rate rising for a while and then falling."""

    optimiser: str = option("sgd", "what descends", TRAINING_OPTIMIZERS)
    epochs: int = 20
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9  # of SGD; AdamW has 0.9 and 0.999
    decay: float = 5e-4  # of SGD added to the gradient, of AdamW decoupled from it
    warmup: float = 0.25  # share of all steps
    schedule: str = option("linear", "how the rate falls, to zero or not at all", SCHEDULES)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**31:
                raise BadInput(f"{name} is {value}; it must be a whole number, at least {least}")
        for name in ("lr", "momentum", "decay", "warmup"):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) < 1e36:
                raise BadInput(f"{name} is {str(getattr(self, name))[:40]}; it must be a number, not negative")
        if not self.warmup < 1:
            raise BadInput(f"warmup is {self.warmup}; it must lie between 0 and 1")
        for name, known in (("optimiser", TRAINING_OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(known)}")

    def rate(self, step: Tensor, steps: Tensor) -> Tensor:
        """Learning rate of a step among all, for each model."""
        done = (step + 1) / (steps + 1)
        left = ((1 - done) / (1 - self.warmup)).clamp(max=1)
        falling = {"linear": left, "cosine": 0.5 - 0.5 * (math.pi * left).cos(), "constant": left.new_ones(left.shape)}
        return self.lr * (done / max(self.warmup, 1e-9)).minimum(falling[self.schedule])


def with_method(options: Unlearn, folder: Path) -> tuple[Unlearn, str | None]:
    """-> the job with a method, and, where none was asked for, why it is that one.  Raises BadInput.

    It is dmm where a training recipe is known, or where options are given that no other method has.
    """
    if options.method is not None:
        return options, None
    if _training(options, folder) is not None:
        try:
            return replace(options, method="dmm"), "method dmm, as a training recipe is known"
        except BadInput as error:
            raise BadInput(f"{error}, or name another --method than dmm, as a training recipe is known") from error
    defaults = {f.name: f.default for f in fields(options)}
    if given := [name for name in defaults if name in dmm_options() and getattr(options, name) != defaults[name]]:
        return replace(options, method="dmm"), f"method dmm, which alone has {given[0].replace('_', '-')}"
    why = f"method {WITHOUT_RECIPE}, as no training recipe is known, which dmm needs (--training FILE)"
    return replace(options, method=WITHOUT_RECIPE), why


def training_of(options: Unlearn, folder: Path) -> Training | None:
    """The recipe that is given, or that a folder of ours carries; None where none is needed.  Raises BadInput."""
    if not options.trains:
        return None
    if (found := _training(options, folder)) is not None:
        return found
    example = json.dumps({"epochs": 20, "batch": 64, "lr": 0.1})
    why = "an audit" if options.audit else f"method {options.method}"
    way_out = f", or use --method {WITHOUT_RECIPE}, which needs none" if why == "method dmm" else ""
    raise BadInput(
        f"training: {why} wants models trained on other rows; give --training FILE, JSON of how this one was trained, "
        f"such as {example}{way_out}"
    )


def _training(options: Unlearn, folder: Path) -> Training | None:
    if options.training is not None:
        return parse_training(read_json(options.training), str(options.training))
    if (folder / RECIPE).is_file():
        steps = read_json(folder / RECIPE).get("recipe")
        for step in reversed(steps if isinstance(steps, list) else []):
            if isinstance(step, dict) and isinstance(step.get("training"), dict):
                return parse_training(step["training"], str(folder / RECIPE))
    return None


def parse_training(given: dict[str, Any], source: str) -> Training:
    """Check a training recipe that was read from `source`.  Raises BadInput."""
    known = {f.name for f in fields(Training)}
    if unknown := sorted(given.keys() - known):
        raise BadInput(f"{source}: '{unknown[0]}' is no part of a training; there are {', '.join(sorted(known))}")
    try:
        return Training(**given)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error


def recorded(training: Training | None) -> dict[str, Any] | None:
    """A training recipe as an output's recipe has it."""
    return None if training is None else asdict(training)
