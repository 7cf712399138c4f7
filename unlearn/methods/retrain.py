"""Retraining without the forget set: what every other method is compared with."""

from __future__ import annotations

from unlearn.methods.job import Forgetting, Method, UnlearningJob
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn


def _prepare(work: UnlearningJob) -> Forgetting:
    return Forgetting(lambda models, name: work.oracles(f"retrained-{name}", len(models), work.options.seed), {})


def _trainings(options: Unlearn, stackable: bool) -> int:
    return 1 + options.audit


def _stored(trainable: TrainableModel, rows: int, options: Unlearn) -> int:
    return _trainings(options, True) * sum(p.nbytes for p in trainable.params.values())


ENTRIES = {"retrain": Method(_prepare, trainings=_trainings, stored=_stored)}
