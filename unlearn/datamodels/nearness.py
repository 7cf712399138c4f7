"""Predictions from models trained on many parts of the data, those weighed most whose deletions are like the one that
is asked about (a Gaussian process)."""

from __future__ import annotations

import torch
from torch import Tensor

from unlearn.datamodels.datamodel import GaussianProcessConfig, bends, gp_weights
from unlearn.datamodels.estimators import (
    Estimator,
    PredictionJob,
    Shift,
    models_stored,
    one_shift,
    places_of,
    subset_masks,
    trained_on,
    weighted_change,
)  # fmt: skip
from unlearn.model.ensemble import partial
from unlearn.model.train_ensembles import EnsembleTrainer
from unlearn.options.unlearning import Unlearn

PARTIAL = 4  # of so many models one more is trained without part of a forget set that no other deletion holds


def by_subsets(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn, own: EnsembleTrainer, some: Tensor) -> Shift:
    """Models trained on `masks` (D, n), and by `own` on masks of this job alone (E, n): which of their deletions are
    like the one that is asked for."""
    before, models, seeds = trained_on(trainer, masks, options)
    near = GaussianProcessConfig(bend=options.gp_interaction, own=options.gp_self, noise=options.gp_noise)
    if len(some):
        full = seeds.unique().tolist()
        more = [i % len(full) for i in range(len(some))]
        models = models | own.models("partial", some, [options.seed + i for i in more])
        seeds, masks = torch.cat([seeds, torch.tensor(more)]), torch.cat([masks, some])
    kept = dict[bytes, tuple[Tensor, Tensor]]()

    def shift(deleted: Tensor, asked: Tensor) -> Tensor:
        forget, key = deleted.nonzero().flatten(), deleted.numpy().tobytes()
        if key not in kept:
            kept.clear()
            kept[key] = gp_weights(~masks, forget, near)
        elsewhere, own = kept[key]
        place = torch.full((len(deleted),), -1, dtype=torch.long)
        place[forget] = torch.arange(len(forget))
        here = place[asked]
        weights = torch.where(here >= 0, own[:, here.clamp(min=0)], elsewhere[:, None])  # (D, b)
        return weighted_change(before, models, seeds, weights, trainer.rows[asked])

    return shift


def _shift(job: PredictionJob) -> Shift:
    options, masks = job.options, subset_masks(job)
    some = torch.ones(0, len(job.rows), dtype=torch.bool)
    if options.deletions == "related" and not bends(~masks, job.forget, GaussianProcessConfig()):
        count = options.subsets // PARTIAL
        some = partial(places_of(job.rows), job.forget, len(job.rows), count, options.seed + 3)
    return by_subsets(job.trainer_for(masks), masks, options, job.own_trainer, some)


def _models(options: Unlearn) -> int:
    return options.subsets + options.subsets // PARTIAL


ENTRIES = {
    "subsets": Estimator(
        one_shift(_shift),
        models=_models,
        stored=lambda trainable, rows, options: models_stored(trainable, _models(options), options),
    )
}
