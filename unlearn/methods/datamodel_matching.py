"""Datamodel matching (DMM, arXiv:2410.23232): predict what the model would answer had it never seen the forget set, and
match that."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from calib import BadInput
from calib.losses.top_k import top_k
from unlearn.datamodels.estimators import (
    OTHERS,
    Estimator,
    PredictionJob,
    Scale,
    Shift,
    asked_about,
    calibrated,
    held_out_deletions,
    kinship_of,
    limited,
    together,
)
from unlearn.methods.job import Forgetting, Method, UnlearningJob, in_steps
from unlearn.methods.matching import Targets
from unlearn.methods.moving import Pool, ToTargets, by_kl, check_targets, concatenated, try_matching
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.estimators import ESTIMATORS
from unlearn.options.unlearning import Unlearn

SURE = 30.0  # nats that labels are likelier than anything else, where they are matched


def estimator_of(options: Unlearn) -> Estimator:
    """Look up the estimator that the options name."""
    module = import_module(f"unlearn.datamodels.{ESTIMATORS[options.estimator].module}")
    return cast(Estimator, module.ENTRIES[options.estimator])


def _prepare(work: UnlearningJob) -> Forgetting:
    pool = Pool.of(work)
    shift_of, scale = _prediction(work, pool.numbers)
    found, to_targets = scale.asdict(), ToTargets(work, pool)

    def move(models: Ensemble, name: str, lr: float, most: int | None) -> Ensemble:
        models = to_targets.start(models)

        def target(i: int) -> Targets:
            too_large = list[Tensor]()
            made = shifted(work, models[i : i + 1], pool.numbers, shift_of(models, i), scale, pool.k, too_large)
            if name == "moved" and too_large and (share := float(torch.cat(too_large).double().mean())):
                found["bounded"] = share
            return made

        return to_targets.move(models, name, lr, most, target)

    return in_steps(work, move, {"scale": found})


def _prediction(work: UnlearningJob, numbers: Tensor) -> tuple[Callable[[Ensemble, int], Shift], Scale]:
    """-> for each of some models the function that predicts, and its scale.  `numbers` of rows will be asked about."""
    options = work.options
    kinship = cache(lambda: kinship_of(work.trainable, work.rows))
    held_out = held_out_deletions(kinship, len(work.rows), options)
    checked = asked_about(len(work.rows), options.seed)
    asked = sorted({*numbers.tolist(), *checked.tolist(), *(~held_out).any(0).nonzero().flatten().tolist()})
    job = PredictionJob(
        work.trainable, work.rows, work.forgotten, torch.tensor(asked), options, work.journal, work.trainer,
        work.shared, kinship,
    )  # fmt: skip
    shift_of = estimator_of(options).shifts(job)
    if options.multiplier is not None or not options.calibrate:
        times = 1.0 if options.multiplier is None else options.multiplier
        return shift_of, Scale(times, times, fitted=False)
    return shift_of, calibrated(job.own_trainer, shift_of(work.trainable.one(), 0), held_out, checked, options)


@torch.no_grad()
def shifted(
    work: UnlearningJob, one: Ensemble, numbers: Tensor, shift: Shift, scale: Scale, k: int | None,
    too_large: list[Tensor] | None = None,
) -> Targets:  # fmt: skip
    """Shift a model's answers at the rows `numbers` by the predicted change: all logits, or k tokens.

    Where the scale was fitted to nothing, changes are bounded; `too_large` gets, bool, which of the target positions
    that change were.
    """
    options, parts, own = work.options, list[Targets](), work.deleted
    for some in together(one, work.rows, numbers):
        rows = work.rows[some]
        of_row = torch.where(own[some], scale.own, scale.others if options.retained == "shifted" else 0.0)
        answers = one.logits(rows)[0]
        times = of_row.to(answers.device)[rows.row_index]
        if of_row.any():
            change = times[:, None].to(answers) * shift(work.deleted, some).to(answers)
            if not scale.fitted:
                change, large = limited(change, answers)
                if too_large is not None:
                    too_large.append(large[times.to(answers) != 0].cpu())
            answers += change
        if options.retained == "labels":
            sure = torch.full_like(answers, -SURE).scatter(-1, rows.targets[:, None], 0.0)
            answers = torch.where(own[some].to(answers.device)[rows.row_index, None], answers, sure)
        parts.append(answers if k is None else top_k(answers, k))
    return concatenated(parts)


def _check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    if options.retained == "labels" and not by_kl(trainable, options):
        raise BadInput("retained labels: squares of logits know no labels; match them with --distance kl")
    check_targets(trainable, rows, options)
    estimator_of(options).check(trainable, rows, options)


def _trainings(options: Unlearn, stackable: bool) -> int:
    calibration = options.calibrate if options.multiplier is None else 0
    compared = [count for count in (estimator_of(options).models(options), calibration) if count]
    return sum(count + (min(count, OTHERS) if stackable else 1) for count in compared)


def _stored(trainable: TrainableModel, rows: int, options: Unlearn) -> int:
    return estimator_of(options).stored(trainable, rows, options)


ENTRIES = {
    "dmm": Method(
        _prepare, _check, try_matching, trainings=_trainings, stored=_stored,
        passes=lambda options, rows: estimator_of(options).passes(rows),
    )
}  # fmt: skip
