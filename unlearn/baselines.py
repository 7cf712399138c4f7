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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from calib import BadInput
from calib.balance import Recap, by_gradient
from calib.fit import Parts
from calib.job import option
from calib.journal import Page
from unlearn.ensemble import Ensemble, Forward, Params
from unlearn.examples import Examples
from unlearn.match import Said, descended, kl

REBALANCE = 10  # steps between two looks at gradient norms
BALANCES = ("none", "gradient", "recap")
BOUND = 20.0  # of log-ratios that are put into an exponential


@dataclass(frozen=True)
class Rows:
    """Some rows of one model: what it says at their decisions now (d, C), what it said before, and the nats of each
    label before (d,).  Of methods on inner states, `now` and `before` are those (d, width)."""

    now: Tensor
    before: Said
    nats_before: Tensor
    of: Examples

    @property
    def nats(self) -> Tensor:
        """(d,)."""
        return cross_entropy(self.now, self.of.targets, reduction="none")

    @property
    def log_ratio(self) -> Tensor:
        """(b,): log of each row's probability now over before."""
        return self.of.sums(self.nats_before - self.nats)


def away(rows: Rows) -> Tensor:
    return -rows.nats.mean()


def towards(rows: Rows) -> Tensor:
    return rows.nats.mean()


def npo(rows: Rows, beta: float = 0.1, score: Callable[[Tensor], Tensor] = lambda r: r) -> Tensor:
    return -2 / beta * logsigmoid(-beta * score(rows.log_ratio)).mean()


def simnpo(rows: Rows, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    nats = rows.of.sums(rows.nats) / rows.of.counts
    return -2 / beta * logsigmoid(beta * (nats - delta)).mean()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # f'(u) of r = log u, less what it is at u = 1
    "js": lambda r: logsigmoid(r) + math.log(2),  # at most log 2, however likely a row becomes
    "forward-kl": lambda r: 1 - (-r).clamp(max=BOUND).exp(),
    "alpha": lambda r: 2 - 2 * (-0.5 * r).clamp(max=BOUND).exp(),  # a = 0.5
}


def astray(rows: Rows) -> Tensor:
    return -kl(rows.before, rows.now).mean()


def as_before(rows: Rows) -> Tensor:
    return kl(rows.before, rows.now).mean()


def scrubbed(rows: Rows) -> Tensor:
    return as_before(rows) + towards(rows)


def rehearsed(rows: Rows, form: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each label's log-ratio, kept from before (DPH-RL's form, arXiv:2509.07430)."""
    return form((rows.nats_before - rows.nats).clamp(-BOUND, BOUND)).mean()


REHEARSALS: dict[str, Callable[[Tensor], Tensor]] = {  # of log u; never negative, zero at u = 1
    "forward-kl": lambda r: torch.expm1(r) - r,
    "js": lambda r: r.exp() * r - (r.exp() + 1) * (torch.nn.functional.softplus(r) - math.log(2)),
    "alpha": lambda r: ((0.8 * r).exp() - 0.8 * r.exp() - 0.2) / (0.2 * -0.8),  # a = 0.2
}


def steered(rows: Rows, times: float = 2.0) -> Tensor:
    """Mean squares from a fixed random direction, `times` as long as states were."""
    assert isinstance(rows.before, Tensor)
    width = rows.now.shape[-1]
    direction = torch.rand(width, generator=torch.Generator().manual_seed(0)).to(rows.now)
    size = rows.before.norm(dim=-1, keepdim=True).mean()
    return (rows.now - times * size * direction / direction.norm()).square().mean()


def unmoved(rows: Rows) -> Tensor:
    assert isinstance(rows.before, Tensor)
    return (rows.now - rows.before).square().mean()


Loss = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Baseline:
    """Losses on the forget set and on what is retained; where `first` they do not go together: the forget set comes
    alone, and in the first half of the epochs only. Where `inner` they are of states, not of logits."""

    forget: Loss | None
    retain: Loss | None
    first: bool = False
    inner: bool = False


BASELINES: dict[str, Baseline] = {
    "ascent": Baseline(away, None),
    "retain": Baseline(None, towards),
    "difference": Baseline(away, towards),
    "npo": Baseline(npo, towards),
    **{f"npo-{name}": Baseline(partial(npo, score=score), towards) for name, score in SCORES.items()},
    "simnpo": Baseline(simnpo, towards),
    "scrub": Baseline(astray, scrubbed, first=True),
    "rmu": Baseline(steered, unmoved, inner=True),
}
RETAINS: dict[str, Loss] = {
    "ce": towards,
    "kl": as_before,
    **{f"rehearsal-{name}": partial(rehearsed, form=form) for name, form in REHEARSALS.items()},
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How long and how fast."""

    epochs: int = 5  # over the forget set
    batch: int = 32  # rows to forget in a step
    lr: float = 1e-3
    retain_multiplier: float = 1.0  # retained rows for each that is forgotten
    weight: float = 1.0  # of the loss on the forget set, beside 1 of the other
    retain: str = option("ce", "the loss on what is retained, where the method leaves it open", tuple(RETAINS))
    balance: str = option("none", "weigh the two losses anew as they go", BALANCES)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise BadInput("epochs and batch must be at least 1")
        for name in ("lr", "retain_multiplier", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        for name, known in (("retain", tuple(RETAINS)), ("balance", BALANCES)):
            if getattr(self, name) not in known:
                raise BadInput(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(known)}")


def known(name: str) -> Baseline:
    """Raises BadInput for an unknown name."""
    if name not in BASELINES:
        raise BadInput(f"method '{name}' is unknown; choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def retain_of(name: str, asked: str) -> Loss | None:
    """The loss on what is retained.  Raises BadInput where a method leaves no choice."""
    own = known(name).retain
    if asked != "ce" and (own is not towards or name == "retain"):
        raise BadInput(f"retain {asked}: {name} has a loss of its own on what is retained, or none; leave it out")
    return RETAINS[asked] if own is towards else own


def forget(
    name: str,
    ensemble: Ensemble,
    rows: Examples,
    forgotten: Tensor,
    retained: Tensor,
    how: Tuning,
    *,
    before: Tensor | Sequence[Said] | None = None,
    nats_before: Tensor | None = None,
    states: Forward | None = None,
    page: Page | None = None,
) -> Ensemble:
    """Make every model forget by the baseline called `name`.  -> the models; the same where nothing is to be forgotten.

    forgotten (f,) and retained (r,) are numbers of rows. `before` is what each model said of all rows, (M, d, C) or M
    of `Top`, with the nats of all labels (M, d); computed here where it is not given. `states` gives the inner states
    that "rmu" is about, (d, width). Raises BadInput for an unknown name, Diverged where a loss is no number any more.
    """
    method = known(name)
    if not len(forgotten):
        return ensemble
    forward = ensemble.forward
    if method.inner:
        if states is None:
            raise BadInput(f"method {name}: is for language models, whose blocks have states; choose another")
        forward = states
        with torch.no_grad():
            before = ensemble.each(lambda params: forward(params, rows), ensemble.params)
        nats_before = before[..., 0]  # which no loss of states asks for
    elif before is None or nats_before is None:
        before = ensemble.logits(rows)
        nats_before = cross_entropy(before.flatten(0, 1), rows.targets.repeat(len(ensemble)), reduction="none")
        nats_before = nats_before.view(len(ensemble), -1)
    retain = retain_of(name, how.retain)
    steps = _steps(method, forgotten, retained, how)
    factors = torch.tensor([how.weight, 1.0], dtype=torch.float64).repeat(len(ensemble), 1)
    recap = Recap(2) if how.balance == "recap" else None

    def parts(params: Params, step: int) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for part, loss, some in zip(("forget", "retain"), (method.forget, retain), steps[step], strict=True):
            if loss is not None and len(some):
                batch, where = rows[some], rows.decisions(some)

                def of_one(params: Params, said: Said, nats: Tensor) -> Tensor:
                    return loss(Rows(forward(params, batch), said[where], nats[where], batch))  # noqa: B023

                found[part] = ensemble.each(of_one, params, before, nats_before)
        return found

    def weighed(params: Params, step: int) -> dict[str, Tensor]:
        found = parts(params, step)
        if how.balance == "gradient" and step % REBALANCE == 0 and len(found) == 2:
            norms = [_norms(part, params) for part in found.values()]
            for model, pair in enumerate(torch.stack(norms, 1).tolist()):
                factors[model] = torch.tensor(by_gradient(pair, [how.weight, 1.0]))
        columns = {"forget": 0, "retain": 1}
        return {part: factors[:, columns[part]].to(value) * value for part, value in found.items()}

    def after(step: int, found: Parts) -> None:
        if recap is not None and len(found) == 2:
            # What is ascended on is negative; how it fares is judged by its size.
            sizes = [abs(value / float(f)) for value, f in zip(found.values(), factors[0], strict=True)]
            balanced = torch.tensor(recap.step(sizes), dtype=torch.float64)
            factors.copy_((balanced * torch.tensor([how.weight, 1.0])).expand_as(factors))

    keep = {"factors": factors} | {f"recap.{n}": t for n, t in (recap.state() if recap else {}).items()}
    return descended(ensemble, weighed, len(steps), how.lr, page=page, after_step=after, keep=keep)


def _norms(part: Tensor, params: Params) -> Tensor:
    """Of each model's own gradient, (M,)."""
    trained = [p for p in params.values() if p.requires_grad]
    gradients = torch.autograd.grad(part.sum(), trained, retain_graph=True, allow_unused=True)
    squares = [g.flatten(1).square().sum(1) for g in gradients if g is not None]
    return torch.stack(squares).sum(0).sqrt()


def _steps(method: Baseline, forgotten: Tensor, retained: Tensor, how: Tuning) -> list[tuple[Tensor, Tensor]]:
    """Rows to forget and to retain in each step."""
    generator, steps, none = torch.Generator().manual_seed(how.seed), list[tuple[Tensor, Tensor]](), forgotten[:0]
    for epoch in range(how.epochs):
        some = forgotten[torch.randperm(len(forgotten), generator=generator)].split(how.batch)
        count = round(how.retain_multiplier * len(forgotten))
        drawn = retained[torch.randint(len(retained), (count,), generator=generator)]
        others = drawn.tensor_split(len(some)) if method.retain else [none] * len(some)
        if method.first:
            steps += [(rows, none) for rows in some if 2 * epoch < how.epochs]
            steps += [(none, rows) for rows in others]
        else:
            steps += list(zip(some, others, strict=True))
    return steps
