"""What methods that move a model in steps share: the rows they move on, targets, runs of one model or of several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calib import BadInput
from calib.jobs.journal import CheckpointSlot
from calib.losses.top_k import TopK, top_k
from calib.quant.scheme import Scheme
from calib.runtime.distributed import process_count, sharing
from calib.runtime.progress import watched
from unlearn.methods.descent import StepContext
from unlearn.methods.job import UnlearningJob
from unlearn.methods.matching import MatchingConfig, Targets, match
from unlearn.methods.quantization_robust import Through, mean, rounded, stepwise, unchanged
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel, blocks_of
from unlearn.options.unlearning import Unlearn


@dataclass(frozen=True)
class Pool:
    """The rows that a job moves on: the forget set, then retained rows, then alternatives to the forget set.

    numbers: of the first two in the job's rows; forget, retain: which of the pool they are; with alternatives `forget`
    is (f, 2), each row with its alternative.
    k: tokens that are kept of each distribution; None: all logits.
    """

    numbers: Tensor
    rows: Examples
    forget: Tensor
    retain: Tensor
    k: int | None

    @staticmethod
    def of(work: UnlearningJob) -> Pool:
        """The forget set, and so many retained rows as may be drawn in all epochs."""
        options, free = work.options, work.retained[~torch.isin(work.retained, work.judging)]
        most = math.ceil(options.retain_multiplier * len(work.forgotten)) * (options.epochs if options.fresh else 1)
        generator = torch.Generator().manual_seed(options.seed)
        numbers = torch.cat([work.forgotten, free[torch.randperm(len(free), generator=generator)[:most]]])
        count = len(work.forgotten)
        k = options.top_k if work.trainable.task == "causal-lm" else None
        rows, forget, others = work.rows[numbers], torch.arange(count), work.alternatives
        if others is not None:
            width = max(rows.labels.shape[1], others.labels.shape[1])
            rows = rows.padded(width) | others.padded(width)
            forget = torch.stack([forget, len(numbers) + forget], 1)
        return Pool(numbers, rows, forget, torch.arange(count, len(numbers)), k)


def with_longest_rows(work: UnlearningJob) -> UnlearningJob:
    """The job with the longest rows alone, as many as two steps take."""
    counts, batch = work.rows.counts, work.options.batch

    def longest(some: Tensor, most: int) -> Tensor:
        return counts[some].argsort(descending=True, stable=True)[:most]

    kept = work.retained[longest(work.retained, math.ceil(2 * batch * max(work.options.retain_multiplier, 1.0)))]
    gone = longest(work.forgotten, 2 * batch)
    others = None if work.alternatives is None else work.alternatives[gone]
    return replace(work, forgotten=work.forgotten[gone], retained=kept, judging=kept[:0], alternatives=others)


@torch.no_grad()
def answers_of(models: Ensemble, rows: Examples, k: int | None) -> tuple[Tensor | list[Targets], Tensor]:
    """Answers of M models at the target positions of `rows`: logits (M, d, C), or M of `TopK` with k tokens; and the
    nats of the labels (M, d)."""
    targets = rows.targets
    outputs, nats = list[list[Targets]](), list[Tensor]()
    for i in range(len(models)):
        each = list[Targets]()
        for at, logits in watched("answers", models[i : i + 1].answers(rows), len(targets), "decisions"):
            each.append(logits if k is None else top_k(logits, k))
            nats.append(cross_entropy(logits, targets[at], reduction="none"))
        outputs.append(each)
    whole = torch.cat(nats).view(len(models), -1)
    if k is None:
        return torch.stack([torch.cat(each) for each in outputs]), whole  # type: ignore[arg-type]
    return [concatenated(each) for each in outputs], whole


def concatenated(parts: list[Targets]) -> Targets:
    """Targets of target positions one after another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    return TopK(*(torch.cat([vars(part)[name] for part in parts]) for name in ("index", "log_p", "log_tail")))


class Latest:
    """A cache of what was last computed of some models, so that a job that is tried several times computes it once."""

    def __init__(self) -> None:
        self._models: Ensemble | None = None
        self._some, self._made = list[int](), None

    def of(self, models: Ensemble, some: list[int], make: Callable[[], Any]) -> Any:
        """Return what `make` gives, or gave for the same models."""
        if models is not self._models or some != self._some:
            self._models, self._made = None, None  # before the next is made: both may be large
            self._made = make()
            self._models, self._some = models, some
        return self._made


# Models by their numbers, a seed, how steps are taken -> those models, moved.
Move = Callable[[list[int], int, StepContext], Ensemble]


def moved(work: UnlearningJob, models: Ensemble, name: str, move: Move, most: int | None) -> Ensemble:
    """`move` models: all at once where they run at once, else one after another, so that targets and moments of one are
    in memory at a time; a soup's several times, with seeds of their own. Where at most `most` steps are tried, nothing
    is kept."""
    at_once = models.stacked or len(models) == 1
    groups = [list(range(len(models)))] if at_once else [[i] for i in range(len(models))]
    done = list[Ensemble]()
    if len(groups) > 1 and process_count() > 1 and most is None:
        with sharing() as own:  # each by one process, whose slots have it then
            for number in own(range(len(models))):
                _ways(work, models, f"{name}-{number}", move, [number], None)
    for some in groups:
        ways = _ways(work, models, name if at_once else f"{name}-{some[0]}", move, some, most)
        if len(ways) > 1:
            through = through_of(work, models[some])
            ways = [ways[0].with_params(through(mean([way.params for way in ways])))]
        done += ways
    return reduce(or_, done)


def _ways(
    work: UnlearningJob, models: Ensemble, name: str, move: Move, some: list[int], most: int | None
) -> list[Ensemble]:
    """Some models moved: once, or as often as a soup has ingredients, each by a seed and in a slot of its own."""
    runs, found = 1 if most is not None else work.options.model_soup, list[Ensemble]()
    for i in range(runs):
        own = name if work.options.model_soup == 1 else f"{name}-way{i}"
        slot = None if most is not None else CheckpointSlot(work.journal, own)
        found.append(move(some, work.options.seed + i, StepContext(slot, through_of(work, models[some]), most)))
    return found


def through_of(work: UnlearningJob, models: Ensemble) -> Through:
    """The map from trained weights to those that models run with, so that forgetting lasts in fewer bits."""
    options = work.options
    if options.grid is None:
        return unchanged
    names, grid = gridded(work.trainable), Scheme.parse(options.grid).weights
    if options.min_step:
        return stepwise(models.params, names, grid, options.min_step)
    return rounded(models.params, names, grid)


def gridded(trainable: TrainableModel) -> list[str]:
    """Names of a language model's weights that quantization rounds: those of its blocks."""
    blocks = tuple(f"{block}." for block in blocks_of(trainable))
    return [name for name in trainable.linears if name.startswith(blocks)]


def by_kl(trainable: TrainableModel, options: Unlearn) -> bool:
    """Whether distributions are matched, not logits."""
    return options.distance == "kl" or (options.distance == "auto" and trainable.task == "causal-lm")


def check_targets(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    """Raises BadInput where the distance needs more of the targets than is kept."""
    if options.distance == "squares" and trainable.task == "causal-lm":
        raise BadInput("distance squares: takes all logits, of which a language model's are not kept; use kl")


def matching_config(work: UnlearningJob, lr: float, seed: int) -> MatchingConfig:
    """The matching settings in a job's options."""
    options = work.options
    return MatchingConfig(
        epochs=options.epochs, batch=options.batch, lr=lr, forget_multiplier=options.forget_multiplier,
        retain_multiplier=options.retain_multiplier, fresh=options.fresh, seed=seed,
        distance="kl" if by_kl(work.trainable, options) else "squares", eight_bit=options.optimizer == "adamw8bit",
    )  # fmt: skip


class ToTargets:
    """Moves models of a job to targets."""

    def __init__(self, work: UnlearningJob, pool: Pool) -> None:
        self._work, self._pool, self._latest = work, pool, Latest()

    def start(self, models: Ensemble) -> Ensemble:
        """The models that matching starts from: rounded already, where that is asked for."""
        through = through_of(self._work, models)
        return models.with_params(through(models.params)) if self._work.options.match_quantized else models

    def move(
        self, models: Ensemble, name: str, lr: float, most: int | None, target: Callable[[int], Targets]
    ) -> Ensemble:
        """`target` of each model, by its number, at the target positions of the pool's rows; else as `Moving`."""

        def targets(some: list[int]) -> Tensor | list[Targets]:
            each = [target(i) for i in some]
            return torch.stack(each) if isinstance(each[0], Tensor) else each  # type: ignore[arg-type]

        def move(some: list[int], seed: int, context: StepContext) -> Ensemble:
            pool, wanted = self._pool, self._latest.of(models, some, lambda: targets(some))
            config = matching_config(self._work, lr, seed)
            return match(models[some], pool.rows, wanted, pool.forget, pool.retain, config, context)

        return moved(self._work, models, name, move, most)


def try_matching(work: UnlearningJob) -> None:
    """Two steps on the longest rows, to the model's own answers, which take what others would; nothing is kept."""
    few, one = with_longest_rows(work), work.trainable.one()
    numbers = torch.cat([few.forgotten, few.retained])
    local, count = work.rows[numbers], len(few.forgotten)
    targets, _ = answers_of(one, local, work.options.top_k if work.trainable.task == "causal-lm" else None)
    forget, retain = torch.arange(count), torch.arange(count, len(numbers))
    config = matching_config(work, 1e-9, work.options.seed)
    match(one, local, targets, forget, retain, config, StepContext(through=through_of(work, one), most=2))
