"""Predictions from gradients: influence functions with a Gauss-Newton curvature, one block a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calib import BadInput, first_line
from calib.jobs.journal import Journal, stop_if_asked
from calib.model.per_example_gradients import projections
from calib.runtime.distributed import process_count, sharing
from calib.runtime.progress import stage
from unlearn.datamodels.estimators import LARGE, Estimator, PredictionJob, Shift
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn


def gradients_of(
    trainable: TrainableModel, rows: Examples, options: Unlearn, journal: Journal | None
) -> tuple[Seen, Tensor, list[Tensor]]:
    """-> what attribution sees, gradients of all rows (n, D), and blocks of their curvature; kept as they come."""
    seen = Seen(
        trainable.forward,
        trainable.state,
        trainable.linears,
        projections(trainable.linears, options.width, options.seed, trainable.device),
        trainable.smooth or trainable.forward,
        trainable.tokens_at_once(LARGE),
    )
    parts, moments = list[Tensor](), list[Tensor]()
    chunks = seen.chunks(rows)
    if journal is not None and process_count() > 1:  # each entry by one process; all are read below
        with sharing() as own:
            for i in own(range(len(chunks))):
                if f"gradients-{i}" not in journal:
                    found = seen.gradients(rows[chunks[i]], options.seed + i)
                    journal.write(f"gradients-{i}", dict(zip(("own", "drawn"), found, strict=True)), {})
                    stop_if_asked()
    with stage("gradients", len(chunks), "chunks") as done:
        for i, some in enumerate(chunks):
            page = f"gradients-{i}"
            if journal is not None and page in journal:
                tensors = {name: t.to(trainable.device) for name, t in journal.read(page)[0].items()}
                known = True
            else:
                known = False
                tensors = dict(zip(("own", "drawn"), seen.gradients(rows[some], options.seed + i), strict=True))
                if journal is not None:
                    journal.write(page, tensors, {})
                    stop_if_asked()
            parts.append(tensors["own"])
            more = second_moment(tensors["drawn"], seen.blocks)
            moments = [a + b for a, b in zip(moments, more, strict=True)] if moments else more
            done(again=known)
    return seen, torch.cat(parts), moments


def by_gradients(seen: Seen, rows: Examples, attribution: Attribution) -> Shift:
    """Predict changes along the direction that attribution gives a deletion."""
    kept = dict[bytes, Tensor]()

    def shift(deleted: Tensor, asked: Tensor) -> Tensor:
        key = deleted.numpy().tobytes()
        if key not in kept:
            kept.clear()
            kept[key] = attribution.direction(deleted)
        return seen.along(kept[key], rows[asked])

    return shift


def _shifts(job: PredictionJob) -> Callable[[Ensemble, int], Shift]:
    """Attribution of the job's own model; of others, whose gradients differ, each anew."""
    trainable, rows, options = job.trainable, job.rows, job.options

    def of(trainable: TrainableModel, journal: Journal | None) -> Shift:
        seen, gradients, curvature = gradients_of(trainable, rows, options, journal)
        return by_gradients(seen, rows, Attribution.of(gradients, curvature, options.damping))

    shift = of(trainable, job.journal)

    def shift_of(models: Ensemble, i: int) -> Shift:
        if len(models) == 1:
            return shift
        own = {name: p[i] for name, p in models.params.items()}
        return of(
            replace(
                trainable, params={name: own[name] for name in trainable.params},
                buffers={name: own[name] for name in trainable.buffers},
            ),
            None,
        )  # fmt: skip

    return shift_of


def _check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    seen, own, _ = gradients_of(trainable, rows[:1], options, None)
    try:
        seen.along(own[0].double(), rows[:1])
    except (NotImplementedError, RuntimeError) as error:
        # What torch says of operations and functions that lack a derivative forwards.
        if not any(word in str(error) for word in ("forward", "functorch")):
            raise
        raise BadInput(
            f"estimator gradients: this model cannot be differentiated forwards ({first_line(error)}); use another"
        ) from error


def _stored(trainable: TrainableModel, rows: int, options: Unlearn) -> int:
    """Gradients of labels and of drawn labels, float32."""
    width = options.width
    return 8 * rows * sum(min(width, one.ins) * min(width, one.outs) for one in trainable.linears.values())


ENTRIES = {"gradients": Estimator(_shifts, _check, passes=lambda rows: {"gradients": 3 * rows}, stored=_stored)}
