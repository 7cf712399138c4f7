"""What a model would say had it never seen some rows: prediction, and the scale of it.

Every estimator is a function of rows that go and rows that are asked about. How far to trust it is measured: models are
trained without rows that belong together, as those do that somebody wants forgotten, and what they say is compared with
what was predicted. Of a wrong scale a rank correlation knows nothing, so slope and error are reported beside it, and
predictions are multiplied by the slope: one for rows that go, one for all others, where noise is often all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from calib import BadInput
from calib.jobs.journal import Journal
from calib.runtime.progress import stage
from unlearn.datamodels.datamodel import Fidelity, fidelity
from unlearn.model.ensemble import CHUNK_ROWS, Ensemble, related, subsets
from unlearn.model.examples import Examples
from unlearn.model.margins import margin_slope, margins_of
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import MODELS_PER_GROUP, EnsembleTrainer
from unlearn.options.unlearning import Unlearn

PLACES = 64  # dimensions that are kept of the words of texts
ASKED = 256  # rows, beside those that go, that predictions are checked on
LARGE = 2**28  # bytes of logits that exist together, of several rows
OTHERS = 20  # full models, for what deletions are compared with

Shift = Callable[[Tensor, Tensor], Tensor]  # which rows go bool (n,), and rows asked about (b,) -> (d, C)


Kinship = tuple[Tensor, Tensor, Tensor]  # of each row its place, its kind and how hard it is


@dataclass(frozen=True)
class PredictionJob:
    """Inputs of every estimator.

    rows: training rows; forget: numbers of the forget set; asked: numbers of all rows that will be asked about.
    trainer: trains other models; None where none are needed. shared: (masks) -> the trainer whose models, trained on
        these masks, are kept for other jobs.
    kinship: -> by what rows belong together.
    """

    trainable: TrainableModel
    rows: Examples
    forget: Tensor
    asked: Tensor
    options: Unlearn
    journal: Journal | None
    trainer: EnsembleTrainer | None
    shared: Callable[[Tensor], EnsembleTrainer] | None
    kinship: Callable[[], Kinship]

    @property
    def own_trainer(self) -> EnsembleTrainer:
        """The trainer of models that serve this job alone."""
        assert self.trainer is not None
        return self.trainer

    def trainer_for(self, masks: Tensor) -> EnsembleTrainer:
        """The trainer of models on masks that other jobs may have as well."""
        assert self.shared is not None
        return self.shared(masks)


def _no_check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    """Any model will do."""


@dataclass(frozen=True)
class Estimator:
    """A way to predict what a model would answer had it never seen some rows.

    shifts: -> the function that predicts the change of the answers of one of several models, by its number.
    check: raises BadInput where it cannot be used with the model or the rows.
    models: how many are trained on parts of the data, at most.
    passes: rows that pass through the model, by stage, from the number of rows.
    stored: bytes that it keeps while it runs, from the model, the number of rows, and the options; half of these in
        memory.
    """

    shifts: Callable[[PredictionJob], Callable[[Ensemble, int], Shift]]
    check: Callable[[TrainableModel, Examples, Unlearn], None] = _no_check
    models: Callable[[Unlearn], int] = lambda options: 0
    passes: Callable[[int], dict[str, int]] = lambda rows: {}
    stored: Callable[[TrainableModel, int, Unlearn], int] = lambda trainable, rows, options: 0


def one_shift(shift: Callable[[PredictionJob], Shift]) -> Callable[[PredictionJob], Callable[[Ensemble, int], Shift]]:
    """Wrap an estimator that predicts the same for every model."""

    def shifts(job: PredictionJob) -> Callable[[Ensemble, int], Shift]:
        found = shift(job)
        return lambda models, i: found

    return shifts


def models_stored(trainable: TrainableModel, count: int, options: Unlearn) -> int:
    """Bytes of models that are kept beside the output, which those in a cache are not."""
    return 0 if options.cache is not None else (count + OTHERS) * sum(p.nbytes for p in trainable.params.values())


@dataclass(frozen=True)
class Scale:
    """Factors of predictions, for rows that go and for others: whether they were fitted, how good predictions were
    where they were, and with them on each deletion that they were not fitted to."""

    own: float
    others: float
    raw: Fidelity | None = None
    held_out: Fidelity | None = None
    fitted: bool = True

    def asdict(self) -> dict[str, Any]:
        """The factors, and how good predictions were, by name."""
        found = {"own": self.own, "others": self.others}
        return found | {
            name: value.asdict() for name, value in (("raw", self.raw), ("held_out", self.held_out)) if value
        }


def weighted_change(before: Ensemble, models: Ensemble, seeds: Tensor, weights: Tensor, rows: Examples) -> Tensor:
    """Sum the changes of models' answers from those of the full model of their seed, each times its weight at each row
    (D, b)."""
    of_full = torch.zeros(len(before), len(rows), dtype=weights.dtype).index_add_(0, seeds, weights)
    return weighted(models, weights, rows) - weighted(before, of_full, rows)


def weighted(models: Ensemble, weights: Tensor, rows: Examples) -> Tensor:
    """A sum over models of what each says, times its weight at each row.  (D, b) -> (d, C)."""
    at, total = weights.to(rows.labels.device)[:, rows.row_index].float(), None
    size = MODELS_PER_GROUP if models.stacked else 1
    for i in range(0, len(models), size):
        some = slice(i, i + size)
        more = torch.einsum("mdc,md->dc", models[some].logits(rows), at[some])
        total = more if total is None else total + more
    assert total is not None
    return total


def trained_on(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn) -> tuple[Ensemble, Ensemble, Tensor]:
    """Full models, models trained on masks, and of each of those which full one has its seed."""
    seeds, full = _common(trainer, options, len(masks))
    before = trainer.models("full", torch.ones(len(full), len(trainer.rows), dtype=torch.bool), full)
    return before, trainer.models("subset", masks, seeds), torch.tensor([full.index(seed) for seed in seeds])


def _common(trainer: EnsembleTrainer, options: Unlearn, count: int) -> tuple[list[int], list[int]]:
    """Seeds of `count` models, each that of one of the full models, and those.  Where weights are drawn with the seed a
    change is seen against a model of the same seed; where training starts from one place there is one."""
    full = [options.seed + i for i in range(min(count, OTHERS) if trainer.trainable.stackable else 1)]
    return [full[i % len(full)] for i in range(count)], full


def places_of(rows: Examples) -> Tensor:
    """Rows as points (n, d), of which those are near that belong together: as they are, or in the words of texts.

    Gradients would not do: of facts about 42 people, 20 each, that a small model had learned, the 19 nearest of a fact
    were by gradients of the same person once in 25, which is chance, and by words 9 times in 10.
    """
    if "input_ids" not in rows.inputs:
        return next(iter(rows.inputs.values())).flatten(1).float().cpu()
    ids, used = rows.inputs["input_ids"], rows.inputs.get("attention_mask")
    if used is None:  # of a language model: what comes before the last target position
        used = rows.target_mask.flip(1).cumsum(1).flip(1) > 0
    texts = [row[mask.bool()].tolist() for row, mask in zip(ids.cpu(), used.cpu(), strict=True)]
    words = TfidfVectorizer(analyzer=_phrases, sublinear_tf=True).fit_transform(texts)
    with np.errstate(invalid="ignore"):  # of rows that are all alike no variance is explained
        kept = TruncatedSVD(min(PLACES, *words.shape), random_state=0).fit_transform(words)
    return torch.nn.functional.normalize(torch.from_numpy(kept), dim=1)


def _phrases(ids: list[int]) -> list[tuple[int, ...]]:
    """Tokens, and pairs of them."""
    return [*((i,) for i in ids), *pairwise(ids)]


def kinds_of(rows: Examples) -> Tensor:
    """Kind of each row, int (n,): its class, where rows have one."""
    return rows.labels if rows.labels.dim() == 1 else torch.zeros(len(rows), dtype=torch.long)


def difficulty(trainable: TrainableModel, rows: Examples) -> Tensor:
    """Mean nats of each row's target positions, (n,)."""
    return rows.sums(trainable.one().nats(rows)) / rows.counts


def calibrated(trainer: EnsembleTrainer, shift: Shift, masks: Tensor, asked: Tensor, options: Unlearn) -> Scale:
    """Fit the scale of predictions to models trained on `masks` (D, n): of margins at the rows `asked` and at those
    that go."""
    points = torch.tensor(sorted({*asked.tolist(), *(~masks).any(0).nonzero().flatten().tolist()}))
    rows = trainer.rows[points]
    seeds, full = _common(trainer, options, len(masks))

    def kept(models: Ensemble) -> dict[str, Tensor]:
        return {"said": margins_of(models, rows)}

    everything = torch.ones(len(full), len(trainer.rows), dtype=torch.bool)
    before = torch.cat([group["said"] for group in trainer.train("full-margins", everything, full, kept)])
    after = torch.cat([group["said"] for group in trainer.train("held-out", masks, seeds, kept)])
    true = after - before[[full.index(seed) for seed in seeds]]
    now, predicted = trainer.trainable.one(), list[Tensor]()
    with stage("predict", len(masks), "deletions") as done:
        for mask in masks:
            predicted.append(_predicted_margins(now, trainer.rows, points, shift, ~mask))
            done("")
    return scale_of(torch.stack(predicted).cpu(), true, (~masks)[:, points][:, rows.row_index.cpu()])


def scale_of(predicted: Tensor, true: Tensor, own: Tensor) -> Scale:
    """predicted and true changes (D, d) of D deletions, and which of them are of rows that go (D, d)."""

    def slopes(some: Tensor) -> tuple[float, float]:
        found = []
        for of in (own, ~own):
            p, t = (torch.where(of[some], z[some], 0.0).double() for z in (predicted, true))
            found.append(float((p * t).sum() / p.square().sum().clamp(min=1e-300)))
        return max(found[0], 0.0), max(found[1], 0.0)

    count = len(predicted)
    every = torch.arange(count)
    whole = slopes(every)
    if count < 2:
        return Scale(*whole)
    scaled = []
    for i in range(count):
        log_own, log_others = slopes(every[every != i])
        scaled.append(torch.where(own[i], log_own, log_others) * predicted[i])
    return Scale(*whole, fidelity(predicted, true), fidelity(torch.stack(scaled), true))


def limited(change: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A change of logits whose scale nobody checked, (d, C): each position's scaled down so that its range (greatest
    less least) is at most that of the position's own logits.  -> the change, and where it was too large, bool (d,)."""
    size, most = (z.amax(-1) - z.amin(-1) for z in (change, logits))
    times = torch.where(size > most, most / size.clamp(min=1e-30), 1.0)
    return times[:, None] * change, size > most


def _predicted_margins(model: Ensemble, rows: Examples, points: Tensor, shift: Shift, deleted: Tensor) -> Tensor:
    parts = []
    for some in together(model, rows, points):
        prediction, of = model.logits(rows[some])[0], rows[some].targets
        parts.append(margin_slope(prediction, of, shift(deleted, some).to(prediction)))
    return torch.cat(parts)


def together(model: Ensemble, rows: Examples, numbers: Tensor) -> list[Tensor]:
    """Numbers of rows (b,), in order: at most CHUNK_ROWS, or as many as fill LARGE with logits of a large head."""
    if model.large is None or not len(numbers):
        return list(numbers.split(CHUNK_ROWS))
    head = model.large.head({name: p[0] for name, p in model.params.items()})
    most = max(int(rows[numbers].counts.max()) * len(head.rows) * 4, 1)
    return list(numbers.split(min(CHUNK_ROWS, max(1, LARGE // most))))


def asked_about(rows: int, seed: int) -> Tensor:
    """Rows on which predictions are checked, whatever goes."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:ASKED].sort().values


def held_out_deletions(kinship: Callable[[], Kinship], rows: int, options: Unlearn) -> Tensor:
    """Masks (D, n) of rows that belong together, on which models are trained that predictions are held against."""
    count = options.calibrate if options.multiplier is None else 0
    if not count:
        return torch.ones(0, rows, dtype=torch.bool)
    return related(*kinship(), count, options.seed + 1, each=1)


def kinship_of(trainable: TrainableModel, rows: Examples) -> Kinship:
    """Find by what rows belong together: places, kinds, and mean nats."""
    return places_of(rows), kinds_of(rows).cpu(), difficulty(trainable, rows).cpu()


def subset_masks(job: PredictionJob) -> Tensor:
    """Masks (D, n) on which models are trained for any forget set.  Raises BadInput where one has no row left."""
    options, count = job.options, len(job.rows)
    if options.deletions == "related":
        return related(*job.kinship(), options.subsets, options.seed + 2)
    masks = subsets(options.subsets, count, options.share, options.seed + 2)
    if not masks.any(1).all():
        raise BadInput(f"share {options.share}: leaves a model without a row to train on; raise it")
    return masks
