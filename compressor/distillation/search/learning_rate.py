"""The learning rate of a student, found by a short search where none is given.

What rate suits depends on the student: one cut out of its teacher wants a greater one than one that was trained before.
So each rate is tried on the first steps of the job, shortened, and judged by the loss on rows that no trial learns
from; the same rows in the same order for every rate, so that chance is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calib import Diverged
from calib.data.corpus import Corpus, batch_order
from calib.jobs.journal import Journal, stop_if_asked
from calib.runtime.distributed import barrier
from compressor.distillation.batches import Speaking, TrainingConfig
from compressor.distillation.models import Student
from compressor.distillation.options import DEFAULT_LR, Distill
from compressor.distillation.train import train_student

FACTOR = 2.0  # between neighbouring rates
LEAST, MOST = 1e-6, 0.1  # rates that are tried
TRIAL_SHARE, LEAST_TRIAL = 20, 5  # a trial takes this part of the job's steps, and at least so many
JUDGED_ROWS, JUDGED_SHARE = 32, 5  # rows that rates are judged by: so many, at most this part of all
_PAGE = "rate"


def with_rate(
    options: Distill, config: TrainingConfig, student: Student, teacher: Speaking | None, corpus: Corpus,
    targets: Tensor, journal: Journal,
) -> tuple[TrainingConfig, dict[str, Any] | None]:  # fmt: skip
    """Give a job its learning rate: the one that its options name, or that a search finds.

    Args:
        options: of the job; `searches_rate` says whether there is a search.
        config: the settings that it is trained with; the rate in them is replaced.
        student: as it is before it learns anything, and after this again.
        teacher: what answers while it learns.
        corpus: training rows (N, T).
        targets: what counts in them (N, T - 1).
        journal: where the outcome is kept, so that a resumed job has the same rate.

    Returns:
        The settings, and what the report says of the search; None where there was none.
    """
    if not options.searches_rate:
        return config, None
    if _PAGE not in journal:
        found = _search(config, student, teacher, corpus, targets)
        barrier()
        journal.write(_PAGE, {}, found)
        barrier()
    found = journal.notes(_PAGE)
    return replace(config, lr=found["lr"]), found


def with_lr(identity: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """Name the learning rate in what a recipe records of a job: replayed, it needs no search."""
    return {**identity, "options": {**identity["options"], "lr": lr}}


def trial_steps(steps: int) -> int:
    """How many steps each rate is tried for in a job of `steps`."""
    return max(LEAST_TRIAL, steps // TRIAL_SHARE)


def _search(
    config: TrainingConfig, student: Student, teacher: Speaking | None, corpus: Corpus, targets: Tensor
) -> dict[str, Any]:
    steps, rows = trial_steps(config.descent.steps), len(corpus.ids)
    judged = min(JUDGED_ROWS, rows // JUDGED_SHARE) or rows  # where there are few, those that are learned from
    order = batch_order(rows - judged or rows, steps, config.batch, config.seed)
    order.append(list(range(rows - judged, rows)))  # whose loss the last step has, before it is taken
    warmup = config.descent.warmup * steps // config.descent.steps
    short = replace(config.descent, steps=len(order), warmup=warmup)
    trained = [*student.params, *student.scales]
    start = [p.detach().clone() for p in trained]

    def loss_after(lr: float) -> float:
        stop_if_asked()
        trial = replace(config, lr=lr, descent=short, balance="none", ema=0.0)
        try:
            curve = train_student(student, teacher, corpus, targets, trial, rows_of_step=order, name=f"try rate {lr:g}")
        except Diverged:
            return math.inf
        finally:
            with torch.no_grad():
                for p, was in zip(trained, start, strict=True):
                    p.copy_(was)
        return sum(curve[-1][term.label] for term in config.terms)

    tried = lowest(loss_after, DEFAULT_LR)
    return {
        "lr": min(tried, key=lambda lr: tried[lr]),
        "tried": [{"lr": lr, "loss": loss if math.isfinite(loss) else None} for lr, loss in sorted(tried.items())],
        "rows": judged,
        "steps": steps,
    }


def lowest(loss_after: Callable[[float], float], start: float) -> dict[float, float]:
    """Walk from `start` to the rate with the lowest loss, FACTOR by FACTOR, upwards if the next rate is better and else
    downwards, until a rate is no better than the one before it.  -> the loss of every rate that was tried, infinite of
    one that diverged."""
    tried = {start: loss_after(start)}
    for factor in (FACTOR, 1 / FACTOR):
        here = start
        while LEAST <= here * factor <= MOST:
            loss = tried[here * factor] = loss_after(here * factor)
            if not loss < tried[here] and (factor > 1 or math.isfinite(tried[here])):
                break
            here *= factor
        if here != start:
            break
    return tried
