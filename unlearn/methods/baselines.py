"""What else is done to make a model forget: each a loss on the forget set, most with one on what is retained.

    ascent       -CE on the forget set
    retain       CE on what is retained, alone
    difference   both (GradDiff)
    npo          -(2 / b) log s(-b r), r = log u the log-ratio of a forgotten row's probability now and before, s the
                 logistic function (NPO, arXiv:2404.05868); npo-js, npo-forward-kl, npo-alpha take f'(u) of another
                 f-divergence for r (f-DPO, arXiv:2309.16240): log s(r), -1 / u, (u^(a - 1) - 1) / (a - 1)
    simnpo       the same of the row's nats a token now alone: -(2 / b) log s(b (l - delta)) (arXiv:2410.07163)
    scrub        -KL(before || now) on the forget set in the first half of the epochs, in all of them KL + CE on what is
                 retained (arXiv:2302.09880)
    rmu          inner states of forgotten rows towards a random direction, those of retained rows as they were (RMU,
                 arXiv:2403.03218)

All are means over decisions (tokens of answers; prompts and padding have none), NPO's over rows. What a model said
before is a constant, computed once: no reference model is in memory. One published SCRUB descends on the frozen
teacher's parameters, so that its student never moves; one published NPO takes raw logits for log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from calib import BadInput, Diverged
from calib.jobs.journal import CheckpointSlot
from calib.jobs.options import option
from calib.jobs.training_loop import Parts
from calib.losses.chunked_head import Head
from calib.losses.weighting import Recap, by_gradient
from calib.runtime.choices import BALANCES
from unlearn.methods.matching import Targets, descended, kl
from unlearn.methods.quantization_robust import Through, unchanged
from unlearn.model.ensemble import CHUNK_ROWS, Ensemble, Forward, StackedParams
from unlearn.model.examples import Examples

BASELINE_REBALANCE_STEPS = 10  # steps between two looks at gradient norms
LOG_RATIO_BOUND = 20.0  # of log-ratios that are put into an exponential


@dataclass(frozen=True)
class LossInputs:
    """Some rows of one model: what it says at their decisions now (d, C), what it said before, and the nats of each
    label before (d,).  Of methods on inner states, `now` and `before` are those (d, width), and `size` how long states
    were before, a mean over all rows of the step. Where there is a `head`, `now` is last states, of which it makes
    logits."""

    now: Tensor
    before: Targets
    nats_before: Tensor
    of: Examples
    head: Head | None = None
    size: Tensor | None = None

    @property
    def nats(self) -> Tensor:
        """(d,)."""
        targets = self.of.targets
        return self._each(lambda at, logits: cross_entropy(logits, targets[at], reduction="none"))

    @property
    def kl(self) -> Tensor:
        """From what was said before, (d,)."""
        return self._each(lambda at, logits: kl(self.before[at], logits))

    def _each(self, values: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return values(slice(None), self.now) if self.head is None else self.head.each(self.now, values)

    @property
    def log_ratio(self) -> Tensor:
        """(b,): log of each row's probability now over before."""
        return self.of.sums(self.nats_before - self.nats)


def gradient_ascent(rows: LossInputs) -> Tensor:
    return -rows.nats.mean()


def label_cross_entropy(rows: LossInputs) -> Tensor:
    return rows.nats.mean()


def npo(rows: LossInputs, beta: float = 0.1, score: Callable[[Tensor], Tensor] = lambda r: r) -> Tensor:
    return -2 / beta * logsigmoid(-beta * score(rows.log_ratio)).mean()


def simnpo(rows: LossInputs, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    nats = rows.of.sums(rows.nats) / rows.of.counts
    return -2 / beta * logsigmoid(beta * (nats - delta)).mean()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # f'(u) of r = log u, less what it is at u = 1
    "js": lambda r: logsigmoid(r) + math.log(2),  # at most log 2, however likely a row becomes
    "forward-kl": lambda r: 1 - (-r).clamp(max=LOG_RATIO_BOUND).exp(),
    "alpha": lambda r: 2 - 2 * (-0.5 * r).clamp(max=LOG_RATIO_BOUND).exp(),  # a = 0.5
}


def negative_kl(rows: LossInputs) -> Tensor:
    return -rows.kl.mean()


def kl_to_reference(rows: LossInputs) -> Tensor:
    return rows.kl.mean()


def scrub_retain(rows: LossInputs) -> Tensor:
    return kl_to_reference(rows) + label_cross_entropy(rows)


def rehearsed(rows: LossInputs, form: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each label's log-ratio, kept from before (DPH-RL's form, arXiv:2509.07430)."""
    return form((rows.nats_before - rows.nats).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).mean()


REHEARSALS: dict[str, Callable[[Tensor], Tensor]] = {  # of log u; never negative, zero at u = 1
    "forward-kl": lambda r: torch.expm1(r) - r,
    "js": lambda r: r.exp() * r - (r.exp() + 1) * (torch.nn.functional.softplus(r) - math.log(2)),
    "alpha": lambda r: ((0.8 * r).exp() - 0.8 * r.exp() - 0.2) / (0.2 * -0.8),  # a = 0.2
}


def rmu_forget(rows: LossInputs, times: float = 2.0, seed: int = 0) -> Tensor:
    """Mean squares from a random direction that is the seed's, `times` as long as states were."""
    assert rows.size is not None
    width = rows.now.shape[-1]
    direction = torch.rand(width, generator=torch.Generator().manual_seed(seed)).to(rows.now)
    return (rows.now - times * rows.size * direction / direction.norm()).square().mean()


def rmu_retain(rows: LossInputs) -> Tensor:
    assert isinstance(rows.before, Tensor)
    return (rows.now - rows.before).square().mean()


Loss = Callable[[LossInputs], Tensor]


@dataclass(frozen=True)
class Baseline:
    """Losses on the forget set and on what is retained; where `first` they do not go together: the forget set comes
    alone, and in the first half of the epochs only. Where `inner` they are of states, not of logits. All are means over
    decisions but that on the forget set where it is `by_row`."""

    forget: Loss | None
    retain: Loss | None
    first: bool = False
    inner: bool = False
    by_row: bool = False


BASELINES: dict[str, Baseline] = {
    "ascent": Baseline(gradient_ascent, None),
    "retain": Baseline(None, label_cross_entropy),
    "difference": Baseline(gradient_ascent, label_cross_entropy),
    "npo": Baseline(npo, label_cross_entropy, by_row=True),
    **{
        f"npo-{name}": Baseline(partial(npo, score=score), label_cross_entropy, by_row=True)
        for name, score in SCORES.items()
    },
    "simnpo": Baseline(simnpo, label_cross_entropy, by_row=True),
    "scrub": Baseline(negative_kl, scrub_retain, first=True),
    "rmu": Baseline(rmu_forget, rmu_retain, inner=True),
}
RETAIN_LOSSES: dict[str, Loss] = {
    "ce": label_cross_entropy,
    "kl": kl_to_reference,
    **{f"rehearsal-{name}": partial(rehearsed, form=form) for name, form in REHEARSALS.items()},
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How long and how fast."""

    epochs: int = 5  # over the forget set
    batch: int = 32  # rows to forget in a step
    lr: float = 1e-3
    retain_multiplier: float = 1.0  # retained rows for each that is forgotten
    weight: float = 1.0  # of the loss on the forget set, beside 1 of the other
    retain: str = option("ce", "the loss on what is retained, where the method leaves it open", tuple(RETAIN_LOSSES))
    balance: str = option("none", "weigh the two losses anew as they go", BALANCES)
    eight_bit: bool = False  # moments in 8 bits (bitsandbytes)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise BadInput("epochs and batch must be at least 1")
        for name in ("lr", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.retain_multiplier < math.inf:
            raise BadInput(f"retain-multiplier is {self.retain_multiplier}; it must not be negative")
        for name, known in (("retain", tuple(RETAIN_LOSSES)), ("balance", BALANCES)):
            if getattr(self, name) not in known:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(known)}")


def baseline_named(name: str) -> Baseline:
    """Raises BadInput for an unknown name."""
    if name not in BASELINES:
        raise BadInput(f"method '{name}' is unknown; choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def retain_loss_of(name: str, asked: str) -> Loss | None:
    """The loss on what is retained.  Raises BadInput where a method leaves no choice."""
    own = baseline_named(name).retain
    if asked != "ce" and (own is not label_cross_entropy or name == "retain"):
        raise BadInput(f"retain {asked}: {name} has a loss of its own on what is retained, or none; leave it out")
    return RETAIN_LOSSES[asked] if own is label_cross_entropy else own


def check_balance(name: str, balance: str) -> None:
    """Raises BadInput where there is nothing to weigh, or nothing that RECAP could follow."""
    method = baseline_named(name)
    if balance != "none" and (method.forget is None or method.retain is None or method.first):
        raise BadInput(f"balance {balance}: {name} has no two losses at a time to weigh; leave it out")
    if balance == "recap" and method.forget is gradient_ascent:
        raise BadInput(f"balance recap: weighs losses that fall to 0, which that of {name} does not; use gradient")


def forget(
    name: str,
    ensemble: Ensemble,
    rows: Examples,
    forgotten: Tensor,
    retained: Tensor,
    config: BaselineConfig,
    *,
    before: Tensor | Sequence[Targets] | None = None,
    nats_before: Tensor | None = None,
    states: Forward | None = None,
    page: CheckpointSlot | None = None,
    through: Through = unchanged,
    most: int | None = None,
) -> Ensemble:
    """Make every model forget by the baseline called `name`.  -> the models; the same where nothing is to be forgotten.

    forgotten (f,) and retained (r,) are numbers of rows. `before` is what each model said of all rows, (M, d, C) or M
    of `Top`, with the nats of all labels (M, d); computed here where it is not given. `states` gives the inner states
    that "rmu" is about, (d, width). The models run with what `through` makes of what is trained. Where `most` is given
    only so many first steps are taken. Raises BadInput for an unknown name, Diverged where a loss is no number.
    """
    method = baseline_named(name)
    if not len(forgotten):
        return ensemble
    forward = ensemble.forward
    if method.inner:
        if states is None:
            raise BadInput(f"method {name}: is for language models, whose blocks have states; choose another")
        forward = states
        with torch.no_grad():
            parts_of = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
            before = torch.cat(
                [ensemble.each(lambda p, some=some: forward(p, some), ensemble.params) for some in parts_of], 1
            )
        method = replace(method, forget=partial(rmu_forget, seed=config.seed))
        nats_before = before[..., 0]  # which no loss of states asks for
    elif before is None or nats_before is None:
        before = ensemble.logits(rows)
        nats_before = cross_entropy(before.flatten(0, 1), rows.targets.repeat(len(ensemble)), reduction="none")
        nats_before = nats_before.view(len(ensemble), -1)
    retain = retain_loss_of(name, config.retain)
    check_balance(name, config.balance)
    steps = _steps(method, forgotten, retained, config)[:most]
    factors = torch.tensor([config.weight, 1.0], dtype=torch.float64).repeat(len(ensemble), 1)
    recaps = [Recap(2) for _ in range(len(ensemble))] if config.balance == "recap" else []
    latest = dict[str, Tensor]()  # of each model, as the last step found them

    large = None if method.inner else ensemble.large

    def value(params: StackedParams, piece: _Piece) -> Tensor:
        """Of each model, (M,)."""
        batch, where, whole = rows[piece.some], rows.decisions(piece.some), rows.decisions(piece.whole)
        of_rows = method.by_row and piece.part == "forget"
        share = len(piece.some) / len(piece.whole) if of_rows else len(where) / len(whole)

        def of_one(params: StackedParams, model_logits: Targets, nats: Tensor) -> Tensor:
            size = model_logits[whole].norm(dim=-1).mean() if method.inner else None  # type: ignore[union-attr]
            now, head = (forward(params, batch), None) if large is None else (
                large.states(params, batch), large.head(params)
            )  # fmt: skip
            found = piece.loss(LossInputs(now, model_logits[where], nats[where], batch, head, size))
            return found if share == 1 else share * found

        found: Tensor = ensemble.each(of_one, params, before, nats_before)
        return found

    def weighed(run: Callable[[], StackedParams], step: int) -> Iterator[dict[str, Tensor]]:
        groups = _pieces(ensemble, rows, (method.forget, retain), steps[step])
        both = {piece.part for group in groups for piece in group}
        if config.balance == "gradient" and step % BASELINE_REBALANCE_STEPS == 0 and len(both) == 2:
            norms = [
                _norms(value, run, [piece for group in groups for piece in group if piece.part == part])
                for part in ("forget", "retain")
            ]
            if not torch.stack(norms).isfinite().all():
                raise Diverged(f"step {step}: a gradient is not finite; lower the learning rate")
            for model, pair in enumerate(torch.stack(norms, 1).tolist()):
                factors[model] = torch.tensor(by_gradient(pair, [config.weight, 1.0]))
        latest.clear()
        columns = {"forget": 0, "retain": 1}
        for group in groups:
            params = run()
            found = {piece.part: value(params, piece) for piece in group}
            del params
            for part, of in found.items():
                latest[part] = latest[part] + of.detach() if part in latest else of.detach()
            yield {part: factors[:, columns[part]].to(of) * of for part, of in found.items()}

    def after(step: int, found: Parts) -> None:
        if len(latest) == 2:
            for i, recap in enumerate(recaps):
                balanced = recap.step([float(value[i]) for value in latest.values()])
                factors[i] = torch.tensor(balanced) * torch.tensor([config.weight, 1.0])

    keep = {"factors": factors}
    keep |= {f"recap.{i}.{n}": t for i, recap in enumerate(recaps) for n, t in recap.state().items()}
    return descended(
        ensemble, weighed, len(steps), config.lr, page=page, after_step=after, keep=keep, through=through,
        eight_bit=config.eight_bit,
    )  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """Rows `some` that pass through a model together, of all those of a step that its loss `part` is about."""

    part: str
    loss: Loss
    some: Tensor
    whole: Tensor


def _pieces(
    ensemble: Ensemble, rows: Examples, losses: Sequence[Loss | None], step: Sequence[Tensor]
) -> list[list[_Piece]]:
    """A step in groups whose gradients are taken one after another: one, where all of it may pass at once."""
    found, tokens = list[list[_Piece]](), 0
    for part, loss, some in zip(("forget", "retain"), losses, step, strict=True):
        if loss is not None and len(some):
            found += [[_Piece(part, loss, own, some)] for own in ensemble.parts(rows, some)]
            tokens += len(some) * rows[some].width
    if ensemble.stacked or tokens <= ensemble.at_once:
        return [[piece for group in found for piece in group]]
    return found


def _norms(
    value: Callable[[StackedParams, _Piece], Tensor], run: Callable[[], StackedParams], pieces: Sequence[_Piece]
) -> Tensor:
    """Of each model's own gradient of the sum of these, (M,)."""
    gradients: list[Tensor | None] = []
    for piece in pieces:
        params = run()
        trained = [p for p in params.values() if p.requires_grad]
        more = torch.autograd.grad(value(params, piece).sum(), trained, allow_unused=True)
        both = zip(gradients, more, strict=True) if gradients else ((None, g) for g in more)
        gradients = [b if a is None else a if b is None else a + b for a, b in both]
    squares = [g.flatten(1).square().sum(1) for g in gradients if g is not None]
    return torch.stack(squares).sum(0).sqrt()


def _steps(
    method: Baseline, forgotten: Tensor, retained: Tensor, config: BaselineConfig
) -> list[tuple[Tensor, Tensor]]:
    """Rows to forget and to retain in each step."""
    generator, steps, none = torch.Generator().manual_seed(config.seed), list[tuple[Tensor, Tensor]](), forgotten[:0]
    for epoch in range(config.epochs):
        some = forgotten[torch.randperm(len(forgotten), generator=generator)].split(config.batch)
        count = math.ceil(config.retain_multiplier * len(forgotten)) if len(retained) else 0
        drawn = retained[torch.randint(len(retained), (count,), generator=generator)] if count else none
        others = drawn.tensor_split(len(some)) if method.retain else [none] * len(some)
        if method.first:
            steps += [(rows, none) for rows in some if 2 * epoch < config.epochs]
            steps += [(none, rows) for rows in others]
        else:
            steps += list(zip(some, others, strict=True))
    return [(some, others) for some, others in steps if (len(some) and method.forget) or len(others)]
