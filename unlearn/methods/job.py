"""What every method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calib.jobs.journal import Journal
from unlearn.methods.learning_rate import rate_loss_bound, rates_for, search_rate
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import EnsembleTrainer, all_rows_but
from unlearn.options.unlearning import Unlearn
from unlearn.report.verdict import retain_loss_bound


@dataclass(frozen=True)
class UnlearningJob:
    """The model, its training rows without those of earlier requests, and numbers of some of these rows.

    forgotten, retained: the forget set, and all others.
    measured, judging: retained rows that figures are taken on, and others by which learning rates are judged.
    trainer: trains other models; None where it is not known how.
    shared: (masks) -> the trainer whose models, trained on these masks, are kept for other jobs.
    alternatives: rows with other answers to the prompts of the forget set, in its order, where a method prefers those.
    """

    trainable: TrainableModel
    rows: Examples
    forgotten: Tensor
    retained: Tensor
    measured: Tensor
    judging: Tensor
    trainer: EnsembleTrainer | None
    journal: Journal
    options: Unlearn
    shared: Callable[[Tensor], EnsembleTrainer] | None = None
    alternatives: Examples | None = None

    @property
    def deleted(self) -> Tensor:
        """Mask of the forget set, bool (n,)."""
        return ~all_rows_but(len(self.rows), self.forgotten)

    def oracles(self, name: str, count: int, first_seed: int) -> Ensemble:
        """Models that are trained without the forget set, kept under `name`."""
        assert self.trainer is not None
        masks = (~self.deleted).expand(count, -1)
        return self.trainer.models(name, masks, range(first_seed, first_seed + count))


@dataclass
class Forgetting:
    """apply: makes models forget, what is kept of it under a name; facts: what was found out, for the report."""

    apply: Callable[[Ensemble, str], Ensemble]
    facts: dict[str, Any]


# Models, the name that steps are kept under, a learning rate, and how many steps are only tried (None: all, and kept)
# -> models moved.
Moving = Callable[[Ensemble, str, float, int | None], Ensemble]


def _nothing_to_check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    """Whatever the model is, it will do."""


@dataclass(frozen=True)
class Method:
    """A way to forget.

    prepare: everything that has to be known before a model moves. -> how models are made to forget.
    check: raises BadInput where the model or the rows are not of the kind that the method is about.
    try_out: two steps on a job's longest rows, nothing kept: by this memory is measured.
    trainings: how many models it trains, from the options and whether models are drawn anew by their seeds.
    stored: bytes that it keeps while it runs, from the model, the number of rows, and the options.
    passes: rows that pass through the model before it moves, by stage, from the options and the number of rows.
    """

    prepare: Callable[[UnlearningJob], Forgetting]
    check: Callable[[TrainableModel, Examples, Unlearn], None] = _nothing_to_check
    try_out: Callable[[UnlearningJob], None] = lambda work: None
    trainings: Callable[[Unlearn, bool], int] = lambda options, stackable: 0
    stored: Callable[[TrainableModel, int, Unlearn], int] = lambda trainable, rows, options: 0
    passes: Callable[[Unlearn, int], dict[str, int]] = lambda options, rows: {}


def in_steps(work: UnlearningJob, moving: Moving, facts: dict[str, Any]) -> Forgetting:
    """Move models in steps, at the rate that was asked for or that a search allows."""
    options, lr = work.options, work.options.lr
    if lr is None:
        one, task = work.trainable.one(), work.trainable.task
        bound = rate_loss_bound(task, retain_loss_bound(task, options.max_retain_loss))
        judging = work.rows[work.judging]
        rates = rates_for(normed=work.trainable.learning is not None, matched=options.entry.targets)
        facts["rate"] = search_rate(
            lambda lr, steps: moving(one, "moved", lr, steps), one, judging, bound, work.journal, rates
        )
        lr = float(facts["rate"]["lr"])
    return Forgetting(lambda models, name: moving(models, name, lr, None), facts)
