"""Oracle matching (arXiv:2410.23232): match the answers of models that were retrained without the forget set."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.losses.top_k import top_k
from unlearn.datamodels.estimators import together
from unlearn.methods.job import Forgetting, Method, UnlearningJob, in_steps
from unlearn.methods.matching import Targets
from unlearn.methods.moving import Pool, ToTargets, check_targets, concatenated, try_matching
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn

FIRST_ORACLE = 1_000_003  # seeds of oracles, away from those of other models


@torch.no_grad()
def mean_answers(oracles: Ensemble, rows: Examples, k: int | None) -> Targets:
    """The mean of their logits, or of their distributions."""
    parts = list[Targets]()
    for some in together(oracles, rows, torch.arange(len(rows))):
        logits: Tensor = oracles.logits(rows[some])
        parts.append(logits.mean(0) if k is None else top_k(logits.log_softmax(-1).logsumexp(0), k))
    return concatenated(parts)


def _prepare(work: UnlearningJob) -> Forgetting:
    pool, each = Pool.of(work), work.options.oracles
    to_targets = ToTargets(work, pool)

    def move(models: Ensemble, name: str, lr: float, most: int | None) -> Ensemble:
        oracles = work.oracles(f"target-{name}", len(models) * each, FIRST_ORACLE + work.options.seed)

        def target(i: int) -> Targets:
            return mean_answers(oracles[i * each : (i + 1) * each], pool.rows, pool.k)

        return to_targets.move(to_targets.start(models), name, lr, most, target)

    return in_steps(work, move, {})


def _trainings(options: Unlearn, stackable: bool) -> int:
    return options.oracles * (1 + options.audit)


def _stored(trainable: TrainableModel, rows: int, options: Unlearn) -> int:
    return _trainings(options, True) * sum(p.nbytes for p in trainable.params.values())


ENTRIES = {"oracle-matching": Method(_prepare, check_targets, try_matching, trainings=_trainings, stored=_stored)}
