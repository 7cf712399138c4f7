"""Predictions from models trained on many parts of the data: a regression of their answers on which rows they saw."""

from __future__ import annotations

import torch
from torch import Tensor

from calib import BadInput
from unlearn.datamodels.datamodel import regress
from unlearn.datamodels.estimators import (
    Estimator,
    PredictionJob,
    Shift,
    models_stored,
    one_shift,
    subset_masks,
    trained_on,
)  # fmt: skip
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import MODELS_PER_GROUP, EnsembleTrainer
from unlearn.options.unlearning import Unlearn


def by_regression(trainer: EnsembleTrainer, masks: Tensor, points: Tensor, options: Unlearn) -> Shift:
    """Predict from a regression of the answers of models trained on `masks` (D, n), with a weight for each row at each
    of the rows `points`, which are those asked about later."""
    before, models, seeds = trained_on(trainer, masks, options)
    asked = trainer.rows[points]
    full, parts = before.logits(asked), list[Tensor]()
    for i in range(0, len(models), MODELS_PER_GROUP):
        parts.append(models[i : i + MODELS_PER_GROUP].logits(asked) - full[seeds[i : i + MODELS_PER_GROUP]])
    model = regress(~masks, torch.cat(parts).cpu(), penalty=options.penalty, lasso=options.lasso)
    where = {int(row): i for i, row in enumerate(points.tolist())}
    times = (
        options.share if options.deletions == "random" else 1.0
    )  # a subset's curvature is that share of the whole set's

    def shift(deleted: Tensor, rows: Tensor) -> Tensor:
        some = asked.target_positions(torch.tensor([where[row] for row in rows.tolist()], dtype=torch.long)).cpu()
        return times * -torch.tensordot(deleted.double(), model.weights[:, some], 1).float()

    return shift


def _shift(job: PredictionJob) -> Shift:
    masks = subset_masks(job)
    return by_regression(job.trainer_for(masks), masks, job.asked, job.options)


def _check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    if trainable.task == "causal-lm":
        raise BadInput("estimator regression: keeps all logits, too many of a language model's; use subsets")


ENTRIES = {
    "regression": Estimator(
        one_shift(_shift),
        _check,
        models=lambda options: options.subsets,
        stored=lambda trainable, rows, options: models_stored(trainable, options.subsets, options),
    )
}
