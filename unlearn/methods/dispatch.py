"""From a job's options to models that have forgotten: the same for the model itself and for those of an audit."""

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

from calib import BadInput, first_line
from calib.jobs.journal import CheckpointSlot, Journal
from calib.losses.top_k import TopK, top_k
from calib.quant.scheme import Scheme
from calib.runtime.distributed import process_count, sharing
from calib.runtime.progress import watched
from unlearn.datamodels.estimators import (
    Scale,
    Shift,
    asked_about,
    by_folds,
    by_gradients,
    by_regression,
    by_subsets,
    calibrated,
    deletions,
    gradients_of,
    limited,
    together,
)
from unlearn.datamodels.influence import Attribution
from unlearn.datamodels.trak import by_trak
from unlearn.methods.baselines import BASELINES, BaselineConfig, check_balance, forget, retain_loss_of
from unlearn.methods.exact import exactly
from unlearn.methods.learning_rate import rate_loss_bound, search_rate
from unlearn.methods.matching import MatchingConfig, Targets, match
from unlearn.methods.quantization_robust import Through, mean, rounded, stepwise, unchanged
from unlearn.model.ensemble import Ensemble, Forward, check_folds
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel, block_names
from unlearn.model.train_ensembles import EnsembleTrainer, all_rows_but, check_learning
from unlearn.options import MICRO_BATCH_TOKENS, TARGETED, Unlearn
from unlearn.report.verdict import retain_loss_bound as allowed

SURE = 30.0  # nats that labels are likelier than anything else, where they are matched
FIRST_ORACLE = 1_000_003  # seeds of models that never saw the forget set, away from those of others


@dataclass(frozen=True)
class UnlearningJob:
    """What every way to forget needs: the model, its training rows (without those of earlier requests), which go, which
    of the others are drawn from; of these, which figures are `measured` on, and which others rates are judged by."""

    trainable: TrainableModel
    rows: Examples
    forgotten: Tensor
    retained: Tensor
    measured: Tensor
    judging: Tensor
    trainer: EnsembleTrainer | None
    journal: Journal
    options: Unlearn
    shared: Callable[[Tensor], EnsembleTrainer] | None = (
        None  # where models trained on these masks are kept for other jobs
    )

    @property
    def deleted(self) -> Tensor:
        """bool (n,)."""
        return ~all_rows_but(len(self.rows), self.forgotten)

    def trained_without(self, name: str, count: int, first_seed: int) -> Ensemble:
        """Oracles: models that never saw the forget set."""
        assert self.trainer is not None
        masks = (~self.deleted).expand(count, -1)
        return self.trainer.models(name, masks, range(first_seed, first_seed + count))


def check_method(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    """Raises BadInput where the model is not of the kind that a method or its options are about."""
    if options.trains:
        trainable.fresh(options.seed)
        check_learning(trainable, rows)
    text = trainable.task in ("causal-lm", "sequence-classification")
    said_in_top_k = options.method in TARGETED or options.method == "scrub" or options.retain_loss == "kl"
    for name, used in (("length", text), ("top_k", trainable.task == "causal-lm" and said_in_top_k)):
        if not used and getattr(options, name) != Unlearn.__dataclass_fields__[name].default:
            raise BadInput(f"{name.replace('_', '-')}: changes nothing with this model and method; leave it out")
    if trainable.factory and (options.gradient_checkpointing or options.optimizer != "adamw"):
        name = "gradient-checkpointing" if options.gradient_checkpointing else "optimizer"
        raise BadInput(f"{name}: is for the library's models, not a factory's; leave it out")
    if not text and options.micro_batch_tokens != MICRO_BATCH_TOKENS:
        raise BadInput("micro-batch-tokens: this model takes no tokens; leave it out")
    if trainable.task != "causal-lm" and options.max_retain_loss is not None and options.max_retain_loss > 1:
        raise BadInput(
            f"max-retain-loss is {options.max_retain_loss:g}; of a classifier it is a share of accuracy, between 0 "
            "and 1"
        )
    if options.grid is not None:
        if trainable.task != "causal-lm":
            raise BadInput(f"grid {options.grid}: language models alone are quantized here; leave it out")
        Scheme.parse(options.grid).check_widths(
            [(name, trainable.params[name].shape[-1]) for name in gridded(trainable)]
        )
    if options.method == "rmu":
        states_of(trainable, options)
    elif options.method == "exact":
        exactly(trainable.one(), rows, torch.zeros(len(rows), dtype=torch.bool), options)
    elif options.method in BASELINES:
        retain_loss_of(options.method, options.retain_loss)
        check_balance(options.method, options.balance)
    elif options.retained == "labels" and not by_kl(trainable, options):
        raise BadInput("retained labels: squares of logits know no labels; match them with --distance kl")
    elif options.distance == "squares" and trainable.task == "causal-lm":
        raise BadInput("distance squares: takes all logits, of which a language model's are not kept; use kl")
    if options.method == "dmm" and options.estimator == "regression" and trainable.task == "causal-lm":
        raise BadInput("estimator regression: keeps all logits, too many of a language model's; use subsets")
    if options.method == "dmm" and options.estimator == "folds":
        check_folds(len(rows), options.folds)
    if options.method == "dmm" and options.estimator == "gradients":
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


def by_kl(trainable: TrainableModel, options: Unlearn) -> bool:
    """Whether distributions are matched, not logits."""
    return options.distance == "kl" or (options.distance == "auto" and trainable.task == "causal-lm")


def states_of(trainable: TrainableModel, options: Unlearn) -> Forward:
    """Of the block that is steered."""
    if trainable.states is None:
        raise BadInput(f"method {options.method}: is for language models, whose blocks have states; choose another")
    blocks = block_names(trainable)
    layer = len(blocks) // 2 if options.layer is None else options.layer
    if not 0 <= layer < len(blocks):
        raise BadInput(f"layer {layer}: the model has blocks 0 to {len(blocks) - 1}")
    return trainable.states(blocks[layer])


def pool_of(work: UnlearningJob) -> Tensor:
    """Rows of the forget set, then those that are retained and may be drawn; numbers of rows."""
    options, free = work.options, work.retained[~torch.isin(work.retained, work.judging)]
    goal = math.ceil(options.retain_multiplier * len(work.forgotten)) * (options.epochs if options.fresh else 1)
    generator = torch.Generator().manual_seed(options.seed)
    drawn = free[torch.randperm(len(free), generator=generator)[:goal]]
    return torch.cat([work.forgotten, drawn])


@torch.no_grad()
def said_of(models: Ensemble, rows: Examples, k: int | None) -> tuple[Tensor | list[Targets], Tensor]:
    """What each model says at the decisions of `rows`: logits (M, d, C), or M of `TopK` with k tokens; and the nats of
    their labels (M, d)."""
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
    return [joined(each) for each in outputs], whole


def joined(parts: list[Targets]) -> Targets:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    return TopK(*(torch.cat([vars(part)[name] for part in parts]) for name in ("index", "log_p", "log_tail")))


@dataclass
class Forgetting:
    """`apply` makes models forget; `facts` is what was found out on the way, for the report."""

    apply: Callable[[Ensemble, str], Ensemble]
    facts: dict[str, Any]


# Models, the page that they are kept on, a rate, and how many steps are only tried (None: all, kept) -> models moved.
Moving = Callable[[Ensemble, str, float, int | None], Ensemble]


def forgetting(work: UnlearningJob) -> Forgetting:
    """Everything that is to be known before any model moves, the rate included."""
    options = work.options
    if options.method == "retrain":
        return Forgetting(lambda models, page: work.trained_without(f"retrained-{page}", len(models), options.seed), {})
    if options.method == "exact":
        return Forgetting(lambda models, page: exactly(models, work.rows, work.deleted, options), {})
    moving, facts = _moving(work)
    lr = options.lr
    if lr is None:
        one, task = work.trainable.one(), work.trainable.task
        facts["rate"] = search_rate(
            lambda lr, steps: moving(one, "moved", lr, steps), one, work.rows[work.judging],
            rate_loss_bound(task, allowed(task, options.max_retain_loss)), work.journal,
        )  # fmt: skip
        lr = float(facts["rate"]["lr"])
    return Forgetting(lambda models, page: moving(models, page, lr, None), facts)


def _moving(work: UnlearningJob) -> tuple[Moving, dict[str, Any]]:
    """-> how models are moved, and what was found out for the report."""
    options = work.options
    numbers = pool_of(work)
    local = work.rows[numbers]
    deleted, kept = torch.arange(len(work.forgotten)), torch.arange(len(work.forgotten), len(numbers))
    k = options.top_k if work.trainable.task == "causal-lm" else None
    latest = _Latest()
    if options.method not in TARGETED:
        return _by_baseline(work, local, deleted, kept, k, latest), {}

    def matched(models: Ensemble, page: str, lr: float, most: int | None, goal: Callable[[int], Targets]) -> Ensemble:
        def move(some: list[int], seed: int, through: Through, own_page: CheckpointSlot | None) -> Ensemble:
            targets = latest.of(models, some, lambda: _stacked([goal(i) for i in some]))
            steps = MatchingConfig(
                epochs=options.epochs,
                batch=options.batch,
                lr=lr,
                forget_multiplier=options.forget_multiplier,
                retain_multiplier=options.retain_multiplier,
                fresh=options.fresh,
                seed=seed,
                distance="kl" if by_kl(work.trainable, options) else "squares",
                eight_bit=options.optimizer == "adamw8bit",
            )
            return match(models[some], local, targets, deleted, kept, steps, own_page, through, most=most)

        return moved(work, models, page, move, trying=most is not None)

    def begun(models: Ensemble) -> Ensemble:
        return models.with_params(through_of(work, models)(models.params)) if options.match_quantized else models

    if options.method == "oracle-matching":

        def to_oracles(models: Ensemble, page: str, lr: float, most: int | None) -> Ensemble:
            first, each = FIRST_ORACLE + options.seed, options.oracles
            oracles = work.trained_without(f"target-{page}", len(models) * each, first)
            return matched(
                begun(models), page, lr, most, lambda i: _mean_said(oracles[i * each : (i + 1) * each], local, k)
            )

        return to_oracles, {}
    shift_of, scale = _prediction(work, numbers)
    found = scale.asdict()

    def to_prediction(models: Ensemble, page: str, lr: float, most: int | None) -> Ensemble:
        models = begun(models)

        def goal(i: int) -> Targets:
            large = list[Tensor]()
            made = _shifted(work, models[i : i + 1], numbers, shift_of(models, i), scale, k, large)
            if page == "moved" and large and (share := float(torch.cat(large).double().mean())):
                found["bounded"] = share
            return made

        return matched(models, page, lr, most, goal)

    return to_prediction, {"scale": found}


def try_out(work: UnlearningJob) -> None:
    """Take two steps on the longest rows, towards the model's own answers where others would be predicted, and keep
    nothing: what the job needs shows."""
    options = work.options
    if options.method in ("retrain", "exact") or not len(work.forgotten):
        return
    counts = work.rows.counts

    def longest(some: Tensor, most: int) -> Tensor:
        return some[counts[some].argsort(descending=True, stable=True)[:most]]

    deleted = longest(work.forgotten, 2 * options.batch)
    kept = longest(work.retained, math.ceil(2 * options.batch * max(options.retain_multiplier, 1.0)))
    few = replace(work, forgotten=deleted, retained=kept, judging=kept[:0])
    one = work.trainable.one()
    if options.method not in TARGETED:
        _moving(few)[0](one, "tried", 1e-9, 2)
        return
    local = work.rows[torch.cat([deleted, kept])]
    targets, _ = said_of(one, local, options.top_k if work.trainable.task == "causal-lm" else None)
    numbers = torch.arange(len(local))
    steps = MatchingConfig(
        batch=options.batch,
        lr=1e-9,
        retain_multiplier=options.retain_multiplier,
        eight_bit=options.optimizer == "adamw8bit",
        distance="kl" if by_kl(work.trainable, options) else "squares",
        seed=options.seed,
    )
    match(
        one,
        local,
        targets,
        numbers[: len(deleted)],
        numbers[len(deleted) :],
        steps,
        None,
        through_of(work, one),
        most=2,
    )


class _Latest:
    """What was last made of some models, so that a job that is tried several times makes it once."""

    def __init__(self) -> None:
        self._models: Ensemble | None = None
        self._some, self._made = list[int](), None

    def of(self, models: Ensemble, some: list[int], make: Callable[[], Any]) -> Any:
        if models is not self._models or some != self._some:
            self._models, self._made = None, None  # before the next is made: both may be large
            self._made = make()
            self._models, self._some = models, some
        return self._made


# Models by their numbers, seed, what they run with, page (None: only tried).
Move = Callable[[list[int], int, Through, CheckpointSlot | None], Ensemble]


def moved(work: UnlearningJob, models: Ensemble, page: str, move: Move, *, trying: bool = False) -> Ensemble:
    """`move` models: all at once where they run at once, else one after another, so that targets and moments of one are
    in memory at a time; a soup's several times, with seeds of their own. What is only tried is kept on no page."""
    at_once = models.stacked or len(models) == 1
    groups = [list(range(len(models)))] if at_once else [[i] for i in range(len(models))]
    done = list[Ensemble]()
    if len(groups) > 1 and process_count() > 1 and not trying:
        _move_shared(work, models, page, move)
    for some in groups:
        through = through_of(work, models[some])
        ways = list[Ensemble]()
        for i in range(1 if trying else work.options.model_soup):
            name = "-".join(
                [page, *([] if at_once else [str(some[0])]), *([] if work.options.model_soup == 1 else [f"way{i}"])]
            )
            ways.append(
                move(some, work.options.seed + i, through, None if trying else CheckpointSlot(work.journal, name))
            )
        done.append(ways[0] if len(ways) == 1 else ways[0].with_params(through(mean([way.params for way in ways]))))
    return reduce(or_, done)


def _move_shared(work: UnlearningJob, models: Ensemble, page: str, move: Move) -> None:
    """Move models one after another, each by one of torchrun's processes: their pages have them, finished."""
    ways = work.options.model_soup
    with sharing() as own:
        for some in own(range(len(models))):
            through = through_of(work, models[some : some + 1])
            for i in range(ways):
                name = "-".join([page, str(some), *([] if ways == 1 else [f"way{i}"])])
                move([some], work.options.seed + i, through, CheckpointSlot(work.journal, name))


def through_of(work: UnlearningJob, models: Ensemble) -> Through:
    """What models run with while they forget, so that it lasts in fewer bits."""
    options = work.options
    if options.grid is None:
        return unchanged
    names, grid = gridded(work.trainable), Scheme.parse(options.grid).weights
    if options.min_step:
        return stepwise(models.params, names, grid, options.min_step)
    return rounded(models.params, names, grid)


def gridded(trainable: TrainableModel) -> list[str]:
    """Names of a language model's weights that quantization rounds: those of its blocks."""
    blocks = tuple(f"{block}." for block in block_names(trainable))
    return [name for name in trainable.linears if name.startswith(blocks)]


def _stacked(targets: list[Targets]) -> Tensor | list[Targets]:
    return torch.stack(targets) if isinstance(targets[0], Tensor) else targets  # type: ignore[arg-type]


@torch.no_grad()
def _mean_said(oracles: Ensemble, rows: Examples, k: int | None) -> Targets:
    """The mean of what they say: of logits, or of distributions."""
    parts = list[Targets]()
    for some in together(oracles, rows, torch.arange(len(rows))):
        logits = oracles.logits(rows[some])
        if k is None:
            parts.append(logits.mean(0))
        else:
            parts.append(top_k(logits.log_softmax(-1).logsumexp(0), k))
    return joined(parts)


@torch.no_grad()
def _shifted(
    work: UnlearningJob, one: Ensemble, numbers: Tensor, shift: Shift, scale: Scale, k: int | None,
    large: list[Tensor] | None = None,
) -> Targets:  # fmt: skip
    """What a model says at the rows `numbers`, with the change that is predicted. `large` is told of decisions that
    change whether theirs was too large, bool, and scaled down."""
    options, parts, own = work.options, list[Targets](), work.deleted
    for some in together(one, work.rows, numbers):
        rows = work.rows[some]
        of_row = torch.where(own[some], scale.own, scale.others if options.retained == "shifted" else 0.0)
        moved = one.logits(rows)[0]
        times = of_row.to(moved.device)[rows.owners]
        if of_row.any():
            change = times[:, None].to(moved) * shift(work.deleted, some).to(moved)
            if not scale.fitted:
                change, too_large = limited(change, moved)
                if large is not None:
                    large.append(too_large[times.to(moved) != 0].cpu())
            moved += change
        if options.retained == "labels":
            sure = torch.full_like(moved, -SURE).scatter(-1, rows.targets[:, None], 0.0)
            moved = torch.where(own[some].to(moved.device)[rows.owners, None], moved, sure)
        parts.append(moved if k is None else top_k(moved, k))
    return joined(parts)


def _prediction(work: UnlearningJob, numbers: Tensor) -> tuple[Callable[[Ensemble, int], Shift], Scale]:
    """-> for each of some models the function that predicts, and its scale."""
    options, trainable, rows, trainer = work.options, work.trainable, work.rows, work.trainer
    parts, some, held_out = deletions(trainable, rows, work.forgotten, options)
    asked = asked_about(len(rows), options.seed)
    everything = torch.tensor(
        sorted({*numbers.tolist(), *asked.tolist(), *(~held_out).any(0).nonzero().flatten().tolist()})
    )
    if options.estimator == "gradients":
        seen, gradients, curvature = gradients_of(trainable, rows, options, work.journal)
        attribution = Attribution.of(gradients, curvature, options.damping)
        shift = by_gradients(seen, rows, attribution)
    elif options.estimator == "folds":
        assert work.shared is not None
        shift = by_folds(work.shared(parts), parts, options)
    elif options.estimator == "subsets":
        assert work.shared is not None and trainer is not None
        shift = by_subsets(work.shared(parts), parts, options, trainer, some)
    elif options.estimator == "regression":
        assert work.shared is not None
        shift = by_regression(work.shared(parts), parts, everything, options)
    else:
        shift = by_trak(trainable, rows, everything, options)
    if options.multiplier is not None or not options.calibrate:
        times = 1.0 if options.multiplier is None else options.multiplier
        scale = Scale(times, times, fitted=False)
    else:
        assert trainer is not None
        scale = calibrated(trainer, shift, held_out, asked, options)

    def shift_of(models: Ensemble, i: int) -> Shift:
        if options.estimator != "gradients" or len(models) == 1:
            return shift
        others = {name: p[i] for name, p in models.params.items()}
        own = replace(
            trainable, params={name: others[name] for name in trainable.params},
            buffers={name: others[name] for name in trainable.buffers},
        )  # fmt: skip
        again, gradients, bent = gradients_of(own, rows, options, None)
        return by_gradients(again, rows, Attribution.of(gradients, bent, options.damping))

    return shift_of, scale


def _by_baseline(
    work: UnlearningJob, local: Examples, deleted: Tensor, kept: Tensor, k: int | None, latest: _Latest
) -> Moving:  # fmt: skip
    options = work.options
    assert options.method is not None
    name, states = options.method, states_of(work.trainable, options) if options.method == "rmu" else None

    def baseline(models: Ensemble, page: str, lr: float, most: int | None) -> Ensemble:
        def move(some: list[int], seed: int, through: Through, own_page: CheckpointSlot | None) -> Ensemble:
            before, nats = (None, None)
            if states is None:
                before, nats = latest.of(models, some, lambda: said_of(models[some], local, k))
            tuning = BaselineConfig(
                epochs=options.epochs, batch=options.batch, lr=lr, retain_multiplier=options.retain_multiplier,
                weight=options.weight, retain=options.retain_loss, balance=options.balance, seed=seed,
                eight_bit=options.optimizer == "adamw8bit",
            )  # fmt: skip
            return forget(
                name, models[some], local, deleted, kept, tuning, before=before, nats_before=nats, states=states,
                page=own_page, through=through, most=most,
            )  # fmt: skip

        return moved(work, models, page, move, trying=most is not None)

    return baseline
