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
from calib.jobs.journal import Journal, stop_if_asked
from calib.model.per_example_gradients import projections
from calib.runtime.distributed import process_count, sharing
from calib.runtime.progress import stage
from unlearn.datamodels.datamodel import Fidelity, GaussianProcessConfig, bends, fidelity, gp_weights, regress
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.model.ensemble import CHUNK_ROWS, Ensemble, folds, partial, related, subsets
from unlearn.model.examples import Examples
from unlearn.model.margins import margin_slope, margins_of
from unlearn.model.model import TrainableModel
from unlearn.model.train_ensembles import MODELS_PER_GROUP, EnsembleTrainer
from unlearn.options import TRAINED, Unlearn

PLACES = 64  # dimensions that are kept of the words of texts
ASKED = 256  # rows, beside those that go, that predictions are checked on
PARTIAL = 4  # of so many models one more is trained without part of a forget set that no other deletion holds
LARGE = 2**28  # bytes of logits that exist together, of several rows
OTHERS = 20  # full models, for what deletions are compared with

Shift = Callable[[Tensor, Tensor], Tensor]  # which rows go bool (n,), and rows asked about (b,) -> (d, C)


@dataclass(frozen=True)
class Scale:
    """What predictions are multiplied by, on rows that go and on others; whether that was fitted, how good predictions
    were where it was, and with it on each deletion that it was not fitted to."""

    own: float
    others: float
    raw: Fidelity | None = None
    held_out: Fidelity | None = None
    fitted: bool = True

    def asdict(self) -> dict[str, Any]:
        found = {"own": self.own, "others": self.others}
        return found | {
            name: value.asdict() for name, value in (("raw", self.raw), ("held_out", self.held_out)) if value
        }


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
    if journal is not None and process_count() > 1:  # each on a page, by one of them; read below
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
    kept = dict[bytes, Tensor]()

    def shift(deleted: Tensor, asked: Tensor) -> Tensor:
        key = deleted.numpy().tobytes()
        if key not in kept:
            kept.clear()
            kept[key] = attribution.direction(deleted)
        return seen.along(kept[key], rows[asked])

    return shift


def by_subsets(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn, own: EnsembleTrainer, some: Tensor) -> Shift:
    """Models trained on `masks` (D, n), and by `own` on masks of this job alone (E, n): which of their deletions are
    like the one that is asked for."""
    before, models, seeds = _trained_on(trainer, masks, options)
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
        return _change(before, models, seeds, weights, trainer.rows[asked])

    return shift


def by_folds(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn) -> Shift:
    """Models each trained without one fold of the rows, masks (K, n): of a row that goes what that one says which never
    saw it, nor its like. Of rows that stay nothing is predicted."""
    before, models, seeds = _trained_on(trainer, masks, options)

    def shift(deleted: Tensor, asked: Tensor) -> Tensor:
        weights = (~masks[:, asked] & deleted[asked]).double()
        return _change(before, models, seeds, weights, trainer.rows[asked])

    return shift


def _change(before: Ensemble, models: Ensemble, seeds: Tensor, weights: Tensor, rows: Examples) -> Tensor:
    """Of what models say, each times its weight at each row (D, b), from what the full model of its seed says."""
    of_full = torch.zeros(len(before), len(rows), dtype=weights.dtype).index_add_(0, seeds, weights)
    return weighted(models, weights, rows) - weighted(before, of_full, rows)


def weighted(models: Ensemble, weights: Tensor, rows: Examples) -> Tensor:
    """A sum over models of what each says, times its weight at each row.  (D, b) -> (d, C)."""
    at, total = weights.to(rows.labels.device)[:, rows.owners].float(), None
    size = MODELS_PER_GROUP if models.stacked else 1
    for i in range(0, len(models), size):
        some = slice(i, i + size)
        more = torch.einsum("mdc,md->dc", models[some].logits(rows), at[some])
        total = more if total is None else total + more
    assert total is not None
    return total


def by_regression(trainer: EnsembleTrainer, masks: Tensor, points: Tensor, options: Unlearn) -> Shift:
    """The same models, with a weight for each row at each of the rows `points`, which are those asked about later."""
    before, models, seeds = _trained_on(trainer, masks, options)
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
        some = asked.decisions(torch.tensor([where[row] for row in rows.tolist()], dtype=torch.long)).cpu()
        return times * -torch.tensordot(deleted.double(), model.weights[:, some], 1).float()

    return shift


def _trained_on(trainer: EnsembleTrainer, masks: Tensor, options: Unlearn) -> tuple[Ensemble, Ensemble, Tensor]:
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
    if used is None:  # of a language model: what comes before the last decision
        used = rows.deciding.flip(1).cumsum(1).flip(1) > 0
    texts = [row[mask.bool()].tolist() for row, mask in zip(ids.cpu(), used.cpu(), strict=True)]
    words = TfidfVectorizer(analyzer=_phrases, sublinear_tf=True).fit_transform(texts)
    with np.errstate(invalid="ignore"):  # of rows that are all alike no variance is explained
        kept = TruncatedSVD(min(PLACES, *words.shape), random_state=0).fit_transform(words)
    return torch.nn.functional.normalize(torch.from_numpy(kept), dim=1)


def _phrases(ids: list[int]) -> list[tuple[int, ...]]:
    """Tokens, and pairs of them."""
    return [*((i,) for i in ids), *pairwise(ids)]


def kinds_of(rows: Examples) -> Tensor:
    """Which rows can be of a kind, int (n,): those of a class."""
    return rows.labels if rows.labels.dim() == 1 else torch.zeros(len(rows), dtype=torch.long)


def difficulty(trainable: TrainableModel, rows: Examples) -> Tensor:
    """Mean nats of each row's decisions, (n,)."""
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
    return scale_of(torch.stack(predicted).cpu(), true, (~masks)[:, points][:, rows.owners.cpu()])


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
    """A change of logits whose scale nobody checked, (d, C): each decision's scaled down so that its range (greatest
    less least) is at most that of the decision's own logits.  -> the change, and where it was too large, bool (d,)."""
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


def deletions(
    trainable: TrainableModel, rows: Examples, forget: Tensor, options: Unlearn
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks that models are trained on: for any forget set, for this one, and to hold predictions against."""
    none, checks = torch.ones(0, len(rows), dtype=torch.bool), options.calibrate if options.multiplier is None else 0
    if options.estimator not in TRAINED and not checks:
        return none, none, none
    places, kinds, nats = places_of(rows), kinds_of(rows).cpu(), difficulty(trainable, rows).cpu()
    held_out = related(places, kinds, nats, checks, options.seed + 1, each=1)
    if options.estimator not in TRAINED:
        return none, none, held_out
    if options.estimator == "folds":
        return folds(places, options.folds, options.seed + 2), none, held_out
    if options.deletions == "random":
        whole = subsets(options.subsets, len(rows), options.share, options.seed + 2)
        if not whole.any(1).all():
            raise BadInput(f"share {options.share}: leaves a model without a row to train on; raise it")
        return whole, none, held_out
    whole = related(places, kinds, nats, options.subsets, options.seed + 2)
    if options.estimator == "regression" or bends(~whole, forget, GaussianProcessConfig()):
        return whole, none, held_out
    return whole, partial(places, forget, len(rows), options.subsets // PARTIAL, options.seed + 3), held_out
