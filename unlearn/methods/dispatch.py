"""From a method's name to what it does, and what is checked of a model whatever the method is."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from calib import BadInput
from calib.jobs.options import flag_name
from calib.quant.scheme import Scheme
from unlearn.methods.job import Method
from unlearn.methods.moving import gridded
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import check_learning
from unlearn.options.methods import MICRO_BATCH_TOKENS
from unlearn.options.unlearning import Unlearn


def method_of(options: Unlearn) -> Method:
    """Look up the method that the options name."""
    module = import_module(f"unlearn.methods.{options.entry.module}")
    return cast(Method, module.ENTRIES[options.method])


def check_method(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    """Raises BadInput where the model is not of the kind that a method or its options are about."""
    if options.trains:
        trainable.fresh(options.seed)
        check_learning(trainable, rows)
    _check_kind(trainable, options)
    if options.grid is not None:
        if trainable.task != "causal-lm":
            raise BadInput(f"grid {options.grid}: language models alone are quantized here; leave it out")
        Scheme.parse(options.grid).check_widths(
            [(name, trainable.params[name].shape[-1]) for name in gridded(trainable)]
        )
    method_of(options).check(trainable, rows, options)


def _check_kind(trainable: TrainableModel, options: Unlearn) -> None:
    """Raises BadInput for options that change nothing with such a model."""
    text = trainable.task in ("causal-lm", "sequence-classification")
    reads_top_k = options.entry.targets or options.method == "scrub" or options.retain_loss == "kl"
    for name, used in (("length", text), ("top_k", trainable.task == "causal-lm" and reads_top_k)):
        if not used and getattr(options, name) != Unlearn.__dataclass_fields__[name].default:
            raise BadInput(f"{flag_name(name)}: changes nothing with this model and method; leave it out")
    if trainable.factory and (options.gradient_checkpointing or options.optimizer != "adamw"):
        name = "gradient-checkpointing" if options.gradient_checkpointing else "optimizer"
        raise BadInput(f"{name}: is for the library's models, not a factory's; leave it out")
    if not text and options.micro_batch_tokens != MICRO_BATCH_TOKENS:
        raise BadInput("micro-batch-tokens: this model takes no tokens; leave it out")
    if trainable.task != "causal-lm" and options.max_retain_loss is not None and options.max_retain_loss > 1:
        raise BadInput(
            f"max-retain-loss is {options.max_retain_loss:g}; of a classifier it is a share of accuracy, between 0 "
            "and 1"
        )
