"""Move models in steps on a loss on the forget set, one on retained rows, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calib import BadInput, Diverged
from calib.jobs.options import check_options, option
from calib.jobs.training_loop import Parts
from calib.losses.weighting import Recap, by_gradient
from calib.runtime.choices import BALANCES
from unlearn.methods.descent import StepContext, descend
from unlearn.methods.job import Forgetting, Method, Moving, UnlearningJob, in_steps
from unlearn.methods.losses import Loss, LossInputs, LossPair, retain_loss_of
from unlearn.methods.matching import Targets
from unlearn.methods.moving import Latest, Pool, answers_of, moved, with_longest_rows
from unlearn.model.ensemble import CHUNK_ROWS, Ensemble, Forward, StackedParams
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.methods import RETAIN_LOSS_NAMES
from unlearn.options.unlearning import Unlearn

BASELINE_REBALANCE_STEPS = 10  # steps between two looks at gradient norms
LOSS_PARTS = ("forget", "retain")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of a method that descends on losses: how long and how fast."""

    epochs: int = option(5, "over the forget set", ge=1)
    batch: int = option(32, "rows to forget in a step", ge=1)
    lr: float = option(1e-3, "learning rate", gt=0)
    retain_multiplier: float = option(1.0, "retained rows for each that is forgotten", ge=0, lt=math.inf)
    weight: float = option(1.0, "of the loss on the forget set, beside 1 of the other", gt=0)
    retain_loss: str = option("ce", "on retained rows, where the method leaves it open", RETAIN_LOSS_NAMES)
    balance: str = option("none", "reweigh the two losses during training", BALANCES)
    eight_bit: bool = False  # moments in 8 bits (bitsandbytes)
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Reference:
    """Answers of M models before they moved, at the target positions of all rows.

    answers: logits (M, d, C), or M of `TopK`; of losses on hidden states, those (M, d, width).
    nats: of the labels (M, d).
    states: (params, rows) -> hidden states (d, width), for losses on those.
    """

    answers: Tensor | Sequence[Targets]
    nats: Tensor
    states: Forward | None = None

    @staticmethod
    def of(ensemble: Ensemble, rows: Examples, states: Forward | None = None) -> Reference:
        """Compute the reference: all logits, or with `states` hidden states (and zeros as nats, which no loss of states
        reads)."""
        if states is None:
            logits = ensemble.logits(rows)
            nats = cross_entropy(logits.flatten(0, 1), rows.targets.repeat(len(ensemble)), reduction="none")
            return Reference(logits, nats.view(len(ensemble), -1))
        with torch.no_grad():
            parts = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
            before = torch.cat(
                [ensemble.each(lambda p, some=some: states(p, some), ensemble.params) for some in parts], 1
            )
        return Reference(before, before.new_zeros(before.shape[:2]), states)


def check_balance(losses: LossPair, balance: str) -> None:
    """Raises BadInput where there is nothing to weigh, or nothing that RECAP could follow."""
    if balance != "none" and (losses.forget is None or losses.retain is None or losses.apart):
        raise BadInput(f"balance {balance}: the method has no two losses at a time to weigh; leave it out")
    if balance == "recap" and losses.unbounded:
        raise BadInput("balance recap: weighs losses that fall to 0, which that of the method does not; use gradient")


def forget(
    losses: LossPair,
    ensemble: Ensemble,
    rows: Examples,
    forgotten: Tensor,
    retained: Tensor,
    config: BaselineConfig,
    context: StepContext | None = None,
    reference: Reference | None = None,
) -> Ensemble:
    """Make every model forget.

    Args:
        losses: on the forget set and on retained rows.
        ensemble: M models.
        rows: of the forget set and of retained rows.
        forgotten: numbers of rows (f,) of the forget set; of losses in pairs (f, 2), each with that of its alternative.
        retained: numbers of retained rows (r,).
        config: how long and how fast.
        context: where steps are kept, what the models run with.
        reference: what each model answered before; default, for losses on logits: computed here.

    Returns:
        The models, moved; the same where `forgotten` is empty.

    Raises:
        BadInput: the losses leave nothing to choose or to weigh where `config` does.
        Diverged: a loss or a gradient is not finite.
    """
    if not len(forgotten):
        return ensemble
    context = context or StepContext()
    both = (losses.forget, retain_loss_of(losses, config.retain_loss))
    check_balance(losses, config.balance)
    steps = _steps(losses, forgotten, retained, config)[: context.most]
    run = _Run(losses, both, ensemble, rows, steps, config, reference or Reference.of(ensemble, rows))
    return descend(
        ensemble, run.losses, len(steps), config.lr, context, after_step=run.after_step, keep=run.kept,
        eight_bit=config.eight_bit,
    )  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """Rows `some`, or pairs of them, that pass through a model together, of all those of a step that its loss `part` is
    about."""

    part: str
    loss: Loss
    some: Tensor
    whole: Tensor


class _Run:
    """The losses of all steps, and how they are weighed against each other."""

    def __init__(
        self, pair: LossPair, both: tuple[Loss | None, Loss | None], ensemble: Ensemble, rows: Examples,
        steps: list[tuple[Tensor, Tensor]], config: BaselineConfig, reference: Reference,
    ) -> None:  # fmt: skip
        self._pair, self._both, self._ensemble, self._rows, self._steps = pair, both, ensemble, rows, steps
        self._config, self._reference = config, reference
        self._factors = torch.tensor([config.weight, 1.0], dtype=torch.float64).repeat(len(ensemble), 1)
        self._recaps = [Recap(2) for _ in range(len(ensemble))] if config.balance == "recap" else []
        self._latest = dict[str, Tensor]()  # of each model, as the last step found them

    @property
    def kept(self) -> dict[str, Tensor]:
        """What changes from step to step beside the weights."""
        found = {"factors": self._factors}
        return found | {f"recap.{i}.{n}": t for i, recap in enumerate(self._recaps) for n, t in recap.state().items()}

    def losses(self, run: Callable[[], StackedParams], step: int) -> Iterator[dict[str, Tensor]]:
        """Parts of a step's losses, weighed; see `descend`."""
        groups = self._pieces(self._steps[step])
        found = {piece.part for group in groups for piece in group}
        if self._config.balance == "gradient" and step % BASELINE_REBALANCE_STEPS == 0 and len(found) == 2:
            self._weigh_by_gradient(run, [piece for group in groups for piece in group], step)
        self._latest.clear()
        for group in groups:
            params = run()
            values = {piece.part: self._value(params, piece) for piece in group}
            del params
            for part, of in values.items():
                self._latest[part] = self._latest[part] + of.detach() if part in self._latest else of.detach()
            yield {part: self._factors[:, LOSS_PARTS.index(part)].to(of) * of for part, of in values.items()}

    def after_step(self, step: int, found: Parts) -> None:
        """Have the weights follow how losses fell."""
        if len(self._latest) == 2:
            for i, recap in enumerate(self._recaps):
                balanced = recap.step([float(value[i]) for value in self._latest.values()])
                self._factors[i] = torch.tensor(balanced) * torch.tensor([self._config.weight, 1.0])

    def _weigh_by_gradient(self, run: Callable[[], StackedParams], pieces: list[_Piece], step: int) -> None:
        of_parts = ([piece for piece in pieces if piece.part == part] for part in LOSS_PARTS)
        norms = torch.stack([self._norms(run, some) for some in of_parts], 1)
        if not norms.isfinite().all():
            raise Diverged(f"step {step}: a gradient is not finite; lower the learning rate")
        for model, pair in enumerate(norms.tolist()):
            self._factors[model] = torch.tensor(by_gradient(pair, [self._config.weight, 1.0]))

    def _value(self, params: StackedParams, piece: _Piece) -> Tensor:
        """Of each model, (M,)."""
        rows, on_states, large = self._rows, self._pair.on_states, self._ensemble.large
        some, every = piece.some.flatten(), piece.whole.flatten()
        batch, where, whole = rows[some], rows.target_positions(some), rows.target_positions(every)
        of_rows = self._pair.by_row and piece.part == "forget"
        share = len(piece.some) / len(piece.whole) if of_rows else len(where) / len(whole)
        forward = self._reference.states if on_states and self._reference.states else self._ensemble.forward

        def of_one(params: StackedParams, answers: Targets, nats: Tensor) -> Tensor:
            size = answers[whole].norm(dim=-1).mean() if on_states else None  # type: ignore[union-attr]
            now, head = (forward(params, batch), None) if large is None or on_states else (
                large.states(params, batch), large.head(params)
            )  # fmt: skip
            inputs = LossInputs(now, answers[where], nats[where], batch, head, size, self._config.seed)
            found = piece.loss(inputs)
            return found if share == 1 else share * found

        found: Tensor = self._ensemble.each(of_one, params, self._reference.answers, self._reference.nats)
        return found

    def _pieces(self, step: Sequence[Tensor]) -> list[list[_Piece]]:
        """A step in groups whose gradients are taken one after another: one, where all of it may pass at once."""
        found, tokens = list[list[_Piece]](), 0
        for part, loss, some in zip(LOSS_PARTS, self._both, step, strict=True):
            if loss is not None and len(some):
                found += [[_Piece(part, loss, own, some)] for own in self._ensemble.parts(self._rows, some)]
                tokens += some.numel() * self._rows[some.flatten()].width
        if self._ensemble.stacked or tokens <= self._ensemble.at_once:
            return [[piece for group in found for piece in group]]
        return found

    def _norms(self, run: Callable[[], StackedParams], pieces: Sequence[_Piece]) -> Tensor:
        """Of each model's own gradient of the sum of these, (M,)."""
        gradients: list[Tensor | None] = []
        for piece in pieces:
            params = run()
            trained = [p for p in params.values() if p.requires_grad]
            more = torch.autograd.grad(self._value(params, piece).sum(), trained, allow_unused=True)
            both = zip(gradients, more, strict=True) if gradients else ((None, g) for g in more)
            gradients = [b if a is None else a if b is None else a + b for a, b in both]
        squares = [g.flatten(1).square().sum(1) for g in gradients if g is not None]
        return torch.stack(squares).sum(0).sqrt()


def _steps(
    losses: LossPair, forgotten: Tensor, retained: Tensor, config: BaselineConfig
) -> list[tuple[Tensor, Tensor]]:
    """Rows to forget and to retain in each step."""
    generator, steps, none = torch.Generator().manual_seed(config.seed), list[tuple[Tensor, Tensor]](), forgotten[:0]
    for epoch in range(config.epochs):
        some = forgotten[torch.randperm(len(forgotten), generator=generator)].split(config.batch)
        count = math.ceil(config.retain_multiplier * len(forgotten)) if len(retained) else 0
        drawn = retained[torch.randint(len(retained), (count,), generator=generator)] if count else none
        others = drawn.tensor_split(len(some)) if losses.retain else [none] * len(some)
        if losses.apart:
            steps += [(rows, none) for rows in some if 2 * epoch < config.epochs]
            steps += [(none, rows) for rows in others]
        else:
            steps += list(zip(some, others, strict=True))
    return [(some, others) for some, others in steps if (len(some) and losses.forget) or len(others)]


StatesOf = Callable[[TrainableModel, Unlearn], Forward]


def baseline(pair: LossPair | Callable[[Unlearn], LossPair], states_of_facts: StatesOf | None = None) -> Method:
    """The method that descends on a pair of losses, which may depend on the options; `states_of_facts` gives the hidden
    states that they are about, where they are, or raises BadInput."""

    def losses_of(options: Unlearn) -> LossPair:
        return pair if isinstance(pair, LossPair) else pair(options)

    def moving(work: UnlearningJob) -> Moving:
        options, pool, latest = work.options, Pool.of(work), Latest()
        losses = losses_of(options)
        states = None if states_of_facts is None else states_of_facts(work.trainable, options)

        def reference_of(models: Ensemble) -> Reference:
            if states is None:
                return Reference(*answers_of(models, pool.rows, pool.k))
            return Reference.of(models, pool.rows, states)

        def move_all(models: Ensemble, name: str, lr: float, most: int | None) -> Ensemble:
            def move(some: list[int], seed: int, context: StepContext) -> Ensemble:
                reference = latest.of(models, some, lambda: reference_of(models[some]))
                config = BaselineConfig(
                    epochs=options.epochs, batch=options.batch, lr=lr, retain_multiplier=options.retain_multiplier,
                    weight=options.weight, retain_loss=options.retain_loss, balance=options.balance, seed=seed,
                    eight_bit=options.optimizer == "adamw8bit",
                )  # fmt: skip
                return forget(losses, models[some], pool.rows, pool.forget, pool.retain, config, context, reference)

            return moved(work, models, name, move, most)

        return move_all

    def check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
        retain_loss_of(losses_of(options), options.retain_loss)
        check_balance(losses_of(options), options.balance)
        if states_of_facts is not None:
            states_of_facts(trainable, options)

    def prepare(work: UnlearningJob) -> Forgetting:
        return in_steps(work, moving(work), {})

    def try_out(work: UnlearningJob) -> None:
        moving(with_longest_rows(work))(work.trainable.one(), "tried", 1e-9, 2)

    return Method(prepare, check, try_out)
