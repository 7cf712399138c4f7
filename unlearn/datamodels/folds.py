"""Predictions from models each trained without one fold of the rows."""

from __future__ import annotations

from torch import Tensor

from unlearn.datamodels.estimators import (
    Estimator,
    PredictionJob,
    Shift,
    models_stored,
    one_shift,
    places_of,
    trained_on,
    weighted_change,
)  # fmt: skip
from unlearn.model.ensemble import check_folds, folds
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import EnsembleTrainer
from unlearn.options.unlearning import Unlearn


def by_folds(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn) -> Shift:
    """Models each trained without one fold of the rows, masks (K, n): of a row that goes what that one says which never
    saw it, nor its like. Of rows that stay nothing is predicted."""
    before, models, seeds = trained_on(trainer, masks, options)

    def shift(deleted: Tensor, asked: Tensor) -> Tensor:
        weights = (~masks[:, asked] & deleted[asked]).double()
        return weighted_change(before, models, seeds, weights, trainer.rows[asked])

    return shift


def _shift(job: PredictionJob) -> Shift:
    masks = folds(places_of(job.rows), job.options.folds, job.options.seed + 2)
    return by_folds(job.trainer_for(masks), masks, job.options)


def _check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    check_folds(len(rows), options.folds)


ENTRIES = {
    "folds": Estimator(
        one_shift(_shift),
        _check,
        models=lambda options: options.folds,
        stored=lambda trainable, rows, options: models_stored(trainable, options.folds, options),
    )
}
