"""Several models, each trained on its own part of the data: oracles, and what datamodels are fitted to.

The parameters and buffers of all models are stacked. Small ones are trained all at once, in one pass of
`torch.func.vmap`: of some ten thousand parameters a hundred take little longer than one. Large ones are the same code,
one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from calib import BadInput, Diverged
from calib.jobs.journal import CheckpointSlot, stop_if_asked
from calib.losses.chunked_head import Head, chunks
from calib.runtime.device import fork_rng
from unlearn.model.batches import Batches, orders_of
from unlearn.model.examples import Examples
from unlearn.model.training_recipe import Training
from unlearn.options.methods import MICRO_BATCH_TOKENS

CHUNK_ROWS = 64  # whose logits exist together, where they may be large
StackedParams = dict[str, Tensor]  # parameters and buffers of all models, (M, ...) each
Forward = Callable[[Mapping[str, Tensor], Examples], Tensor]  # of one model: parameters, buffers and rows -> (d, C)


@dataclass(frozen=True)
class Large:
    """A language model in two parts, as its logits are large: last states at target positions, from parameters and rows
    -> (d, width), and the head that makes logits of them."""

    states: Forward
    head: Callable[[Mapping[str, Tensor]], Head]


@dataclass(frozen=True)
class Ensemble:
    """Models of one architecture: `forward` is of any, params (M, ...) are of all.

    `stacked` models run all at once under vmap, others one after another. What is `frozen` is never trained, and what
    is named in `buffers` is moved by no gradient. Where a model has norms that keep running statistics, `learning` is
    its forward in training: it normalizes by the batch and updates, in place, the buffers that it is given. Of models
    that do not run all at once, at most `at_once` tokens pass through together; where they are `large`, logits exist
    for some target positions at a time.
    """

    forward: Forward
    params: StackedParams
    stacked: bool = True
    frozen: frozenset[str] = field(default=frozenset())
    buffers: frozenset[str] = field(default=frozenset())
    learning: Forward | None = None
    large: Large | None = None
    at_once: int = MICRO_BATCH_TOKENS

    @property
    def trained(self) -> list[str]:
        """Names of what gradients move."""
        return [name for name in self.params if name not in self.frozen and name not in self.buffers]

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def __getitem__(self, which: slice | Tensor | Sequence[int]) -> Ensemble:
        """Some of them: views, where they follow each other."""
        if isinstance(which, Sequence) and len(which) and list(which) == list(range(which[0], which[-1] + 1)):
            which = slice(which[0], which[-1] + 1)
        return replace(self, params={name: p[which] for name, p in self.params.items()})

    def __or__(self, other: Ensemble) -> Ensemble:
        return replace(self, params={name: torch.cat([p, other.params[name]]) for name, p in self.params.items()})

    def with_params(self, params: Mapping[str, Tensor]) -> Ensemble:
        """A copy with other parameters, none of which asks for gradients."""
        return replace(self, params={name: p.detach() for name, p in params.items()})

    def each(self, function: Callable[..., Any], *arguments: Any, shared: Sequence[Any] = ()) -> Any:
        """function(arguments of one model, shared) for every model.  -> what it gives, (M, ...): a tensor, or a dict
        of such.

        `arguments` are tensors (M, ...), dicts of such, or lists with something for each model.
        """
        if self.stacked:
            return vmap(lambda *own: function(*own, *shared), randomness="different")(*arguments)
        first = arguments[0]
        count = len(next(iter(first.values()))) if isinstance(first, dict) else len(first)
        made = [function(*(_of(argument, i) for argument in arguments), *shared) for i in range(count)]
        if isinstance(made[0], dict):
            return {name: torch.stack([one[name] for one in made]) for name in made[0]}
        return torch.stack(made)

    def values(
        self, params: Mapping[str, Tensor], rows: Examples, function: Callable[[slice, Tensor], Tensor]
    ) -> Tensor:
        """function(positions, their logits (n, C)) -> (n, ...), of all target positions of `rows`, as one model with
        `params` answers them.  -> (d, ...)."""
        if self.large is None:
            return function(slice(None), self.forward(params, rows))
        return self.large.head(params).each(self.large.states(params, rows), function)

    def parts(self, rows: Examples, some: Tensor) -> list[Tensor]:
        """The numbers `some` (b,) of rows, or (b, 2) of pairs of them, in parts that pass through a model together."""
        if self.stacked or not len(some):
            return [some]
        tokens = some[0].numel() * rows[some.flatten()].width
        return list(some.split(max(1, self.at_once // tokens)))

    @torch.no_grad()
    def logits(self, rows: Examples) -> Tensor:
        """Logits of every model at the target positions of the same rows.  -> (M, d, C)."""
        parts = self._passing(rows) or [rows]
        return torch.cat([self.each(lambda p, part=part: self.forward(p, part), self.params) for part in parts], 1)

    @torch.no_grad()
    def answers(self, rows: Examples) -> Iterator[tuple[slice, Tensor]]:
        """Logits of one model, few target positions at a time: which of the target positions of `rows`, and their
        logits (n, C)."""
        start = 0
        for i in range(0, len(rows), CHUNK_ROWS):
            for part in self._passing(rows[i : i + CHUNK_ROWS]):
                if self.large is None:
                    logits = self.each(lambda p, part=part: self.forward(p, part), self.params)[0]
                    yield slice(start, start + len(logits)), logits
                    start += len(logits)
                    continue
                params = _of(self.params, 0)
                states, head = self.large.states(params, part), self.large.head(params)
                for at in chunks(len(states), len(head.rows)):
                    yield slice(start + at.start, start + at.stop), head(states[at])
                start += len(states)

    @torch.no_grad()
    def nats(self, rows: Examples) -> Tensor:
        """Cross-entropy of one model at each target position, (d,)."""
        targets = rows.targets
        parts = [cross_entropy(logits, targets[at], reduction="none") for at, logits in self.answers(rows)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _passing(self, rows: Examples) -> list[Examples]:
        """Rows that pass through the models together."""
        if not len(rows):
            return []
        width = rows.width if rows.labels.dim() == 1 else rows.labels.shape[1]
        size = max(1, self.at_once // width)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def checked(self) -> Ensemble:
        """Itself.  Raises Diverged where a weight is no number: a model that broke is none to go on with."""
        for name, p in self.params.items():
            if not finite(p):
                model = int((~p.flatten(1).isfinite().all(1)).nonzero()[0])
                raise Diverged(f"model {model}: '{name}' is no longer finite; lower the learning rate")
        return self


def finite(tensor: Tensor) -> bool:
    """Whether all is a number, without a copy of it."""
    return not tensor.numel() or all(bool(x.isfinite()) for x in tensor.aminmax())


def _of(argument: Any, model: int) -> Any:
    if isinstance(argument, dict):
        return {name: _of(x, model) for name, x in argument.items()}
    if isinstance(argument, Tensor) and len(argument) == 1:
        return argument.squeeze(0)  # whose gradient is a view too; that of an index is a copy
    return argument[model]


def of_module(module: nn.Module) -> Forward:
    """Wrap a module that takes the inputs of `Examples` by name, or its only one by position, and gives logits (b,
    C)."""

    def forward(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        inputs = dict(rows.inputs)
        only = (inputs.pop(""),) if "" in inputs else ()
        return functional_call(module, dict(params), only, inputs)

    return forward


def learning_of(module: nn.Module, forward: Forward) -> Forward | None:
    """`forward`, of a model that contains `module`, with its norms in training mode: by the statistics of the batch,
    which update the running ones (buffers) in place.  None where it has no such norm.

    Nothing else changes its mode; dropout stays off.
    """
    norms = [
        m for m in module.modules() if isinstance(m, _NormBase) and (isinstance(m, _BatchNorm) or m.track_running_stats)
    ]
    if not norms:
        return None

    def learning(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        for norm in norms:
            norm.train()
        try:
            return forward(params, rows)
        finally:
            for norm in norms:
                norm.eval()

    return learning


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A module's parameters, which stay its own (to be changed only as copies), and copies of its buffers that are
    stored with it, by name."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    stored = module.state_dict()
    return params, {name: b.detach().clone() for name, b in module.named_buffers() if name in stored}


def initial_ensemble(make: Callable[[], nn.Module], seeds: Sequence[int]) -> Ensemble:
    """Make models as each seed initializes them, parameters and buffers."""
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(make().eval())
    states = [state_of(model) for model in models]
    whole = [{**params, **buffers} for params, buffers in states]
    stacked = {name: torch.stack([state[name] for state in whole]) for name in whole[0]}
    forward = of_module(models[0])
    return Ensemble(forward, stacked, buffers=frozenset(states[0][1]), learning=learning_of(models[0], forward))


def train_ensemble(
    ensemble: Ensemble,
    rows: Examples,
    masks: Tensor,
    seeds: Sequence[int],
    config: Training,
    *,
    page: CheckpointSlot | None = None,
    done: Callable[[], None] = lambda: None,
) -> Ensemble:
    """Train each model on the rows that its mask leaves.

    The step of a model depends on nothing but its own rows and seed, so it does not matter which others are trained
    beside it. Norms with running statistics are trained as torch does in training mode, buffers included; where one row
    has no statistics (batch norm on vectors), a last batch of one row joins the batch before it.

    Args:
        ensemble: M models, as training starts.
        rows: n training rows.
        masks: bool (M, n), the rows that each model is trained on.
        seeds: one for each model's order of rows; models of one seed see rows that they share in one order.
        config: how a model is trained.
        page: where what is done is kept and taken up; None: nowhere.
        done: called after every epoch.

    Raises:
        BadInput: a mask leaves no row, or one where that is too few.
        Diverged: a weight is not finite.
    """
    fewest = _fewest_rows(ensemble, rows, masks)
    moving = ensemble.trained
    params = {name: p.clone().requires_grad_(name in moving) for name, p in ensemble.params.items()}
    moments = {
        f"{i}.{name}": torch.zeros_like(params[name]) for i in range(_MOMENTS[config.optimiser]) for name in moving
    }
    kept = {f"param.{name}": params[name] for name in [*moving, *sorted(ensemble.buffers)]}
    kept |= {f"moment.{name}": m for name, m in moments.items()}
    begun = _resume(page, kept)
    batches = Batches(masks, config.batch, fewest, apart=ensemble.learning is not None)
    gradients = _Gradients(ensemble, rows, params)
    device = next(iter(params.values())).device
    steps_of, most = batches.steps.to(device), int(batches.steps.max())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for epoch in range(config.epochs):
        orders, within = (x.to(device) for x in orders_of(masks, generators))
        if epoch < begun:
            continue
        with fork_rng(device, seeds[0] + 1_000_003 * epoch):  # whatever a module draws
            for step in range(most):
                found = dict(zip(moving, gradients.of(batches.of(step), orders, within), strict=True))
                at = epoch * steps_of + step
                rates = config.rate(at, config.epochs * steps_of).where(step < steps_of, 0.0)
                _descend(params, moments, found, rates, at, config)
        done()
        if page is not None and page.due:
            page.write({name: p.detach() for name, p in kept.items()}, {"epochs": epoch + 1})
            stop_if_asked()
    return ensemble.with_params(params).checked()


def _fewest_rows(ensemble: Ensemble, rows: Examples, masks: Tensor) -> int:
    """Rows that a batch must have.  Raises BadInput for masks that leave fewer."""
    if not masks.any(1).all():
        raise BadInput(f"ensemble: model {int((~masks.any(1)).nonzero()[0])} has no row to train on")
    fewest = fewest_in_a_batch(ensemble, rows)
    if (few := masks.sum(1) < fewest).any():
        raise BadInput(f"ensemble: model {int(few.nonzero()[0])} has one row to train on, too few for batch norm")
    return fewest


class _Gradients:
    """Gradients of a step of every model of an ensemble, whose parameters `params` are moved from step to step."""

    def __init__(self, ensemble: Ensemble, rows: Examples, params: StackedParams) -> None:
        self._ensemble, self._rows, self._params = ensemble, rows, params
        self._trained = [params[name] for name in ensemble.trained]

    def of(self, batches: Iterable[tuple[Tensor | None, slice]], orders: Tensor, within: Tensor) -> list[Tensor]:
        """Of the rows that a step takes: for some models (None: all) the places in their orders.  Buffers are moved."""
        ensemble, params, rows = self._ensemble, self._params, self._rows
        divisible = not ensemble.stacked and ensemble.learning is None
        found, gradients = list[tuple[Tensor | None, StackedParams]](), list[Tensor]()
        for models, some in batches:
            which = None if models is None else models.to(orders.device)
            own = params if which is None else {name: p[which] for name, p in params.items()}
            order, real = (x[:, some] if which is None else x[which, some] for x in (orders, within))
            if which is None and divisible and order.shape[1] * rows.width > ensemble.at_once:
                gradients = self._in_parts(order, real)
            else:
                found.append((which, ensemble.each(self._loss, own, order, real)))
        if found:
            total = torch.stack([made["loss"].sum() for _, made in found]).sum()
            gradients = list(torch.autograd.grad(total, self._trained))
        for which, made in found:
            for name in ensemble.buffers:
                params[name][slice(None) if which is None else which] = made[f"buffer.{name}"].detach()
        return gradients

    def _loss(self, params: StackedParams, some: Tensor, real: Tensor, count: Tensor | None = None) -> StackedParams:
        """Of one model a mean over target positions: over `count`, of all rows of a step, where these are some of
        them."""
        ensemble, batch = self._ensemble, self._rows[some]
        own = {n: p.clone() if n in ensemble.buffers else p for n, p in params.items()}

        def nats_of(at: slice, logits: Tensor) -> Tensor:
            return cross_entropy(logits, batch.targets[at], reduction="none")

        if ensemble.learning is None:
            nats = batch.sums(ensemble.values(own, batch, nats_of))
        else:
            nats = batch.sums(nats_of(slice(None), ensemble.learning(own, batch)))
        mean = (nats * real).sum() / ((batch.counts * real).sum().clamp(min=1) if count is None else count)
        return {"loss": mean} | {f"buffer.{name}": own[name] for name in ensemble.buffers}

    def _in_parts(self, order: Tensor, real: Tensor) -> list[Tensor]:
        """Of rows (M, b) that are too many to pass together: added up."""
        rows, size = self._rows, max(1, self._ensemble.at_once // self._rows.width)
        counts = torch.stack([(rows[own].counts * of).sum() for own, of in zip(order, real, strict=True)]).clamp(min=1)
        total: list[Tensor] = []
        for i in range(0, order.shape[1], size):
            made = self._ensemble.each(self._loss, self._params, order[:, i : i + size], real[:, i : i + size], counts)
            more = torch.autograd.grad(made["loss"].sum(), self._trained)
            total = [a.add_(b) for a, b in zip(total, more, strict=True)] if total else list(more)
        return total


@torch.no_grad()
def fewest_in_a_batch(ensemble: Ensemble, rows: Examples) -> int:
    """Rows that a batch in training must have: 2 where norms cannot take the statistics of one, else 1."""
    if ensemble.learning is None or not len(rows):
        return 1
    try:
        ensemble.learning({name: p[0].clone() for name, p in ensemble.params.items()}, rows[:1])
    except ValueError:  # "Expected more than 1 value per channel when training"
        return 2
    return 1


CLUSTER = 20  # rows that belong together, in a fold
_MOMENTS = {"sgd": 1, "adamw": 2}


def _resume(page: CheckpointSlot | None, kept: Mapping[str, Tensor]) -> int:
    """Everything as the page has it.  -> epochs that are done."""
    if page is None or (found := page.read()) is None:
        return 0
    tensors, notes = found
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(tensors[name])
    return int(notes["epochs"])


@torch.no_grad()
def _descend(
    params: StackedParams,
    moments: StackedParams,
    gradients: StackedParams,
    rates: Tensor,
    done: Tensor,
    config: Training,
) -> None:
    """One step for every model whose rate is not zero; `done` (M,) are the steps that it has made."""
    for name, gradient in gradients.items():
        p, like = params[name], (-1, *[1] * (params[name].dim() - 1))
        rate = rates.view(like).to(p)
        moving, first = rate > 0, moments[f"0.{name}"]
        if config.optimiser == "sgd":
            first.copy_(torch.where(moving, config.momentum * first + gradient + config.decay * p, first))
            p.sub_(rate * first)
        else:
            second, count = moments[f"1.{name}"], done.view(like).to(p) + 1
            first.copy_(torch.where(moving, 0.9 * first + 0.1 * gradient, first))
            second.copy_(torch.where(moving, 0.999 * second + 0.001 * gradient.square(), second))
            step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            p.sub_(rate * (step + config.decay * p))


def subsets(count: int, rows: int, share: float, seed: int) -> Tensor:
    """Masks that leave each row with probability `share`, (count, rows)."""
    return torch.rand(count, rows, generator=torch.Generator().manual_seed(seed)) < share


def related(features: Tensor, groups: Tensor, difficulty: Tensor, count: int, seed: int, *, each: int = 2) -> Tensor:
    """Masks that leave out rows that belong together, as those do that somebody wants forgotten.  -> (count, n).

    features (n, d) say which rows are alike, groups int (n,) which can be (a classifier's labels), difficulty (n,) is
    such as the mean loss of models trained on all rows. Each mask leaves out `each` neighbourhoods, a row and the
    nearest 9 to 59 of its group, and `each` ranges of 10 to 100 rows of like difficulty, which is where mislabelled
    ones are; of few rows a tenth each at most. Weights that are fitted to random subsets know next to nothing of such
    deletions: their rows stand in for each other.
    """
    generator, hardest = torch.Generator().manual_seed(seed), difficulty.argsort()
    most = max(1, len(features) // 10)
    places, masks = features.double(), torch.ones(count, len(features), dtype=torch.bool)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for mask in masks:
        for _ in range(each):
            row = drawn(0, len(features))
            apart = (places - places[row]).square().sum(1).masked_fill(groups != groups[row], torch.inf)
            near = apart.argsort()[: min(drawn(10, 61), most, int((groups == groups[row]).sum()))]
            mask[near] = False
            size = min(drawn(10, 101), most)
            start = drawn(-size // 2, len(features) - size // 2)
            mask[hardest[max(start, 0) : start + size]] = False
        if not mask.any():  # of very few rows all could go
            mask[drawn(0, len(mask))] = True
    return masks


def check_folds(rows: int, count: int) -> None:
    """Raises BadInput for fewer rows than folds."""
    if rows < count:
        raise BadInput(f"folds: {rows} rows do not make {count} folds; ask for fewer")


def folds(features: Tensor, count: int, seed: int) -> Tensor:
    """Masks of which each row is left out by exactly one, together with those that are like it.  -> (count, n).

    features (n, d). Rows are gathered in clusters of about CLUSTER, by k-means, and those dealt out so that folds are
    of about one size. Raises BadInput for fewer rows than folds.
    """
    check_folds(len(features), count)
    clusters = max(count, len(features) // CLUSTER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of copies: then clusters are fewer
        found = KMeans(clusters, n_init=1, random_state=seed).fit_predict(features.double().numpy())
    masks = torch.ones(count, len(features), dtype=torch.bool)
    for rows in sorted((torch.from_numpy(found == c) for c in range(clusters)), key=lambda rows: -int(rows.sum())):
        masks[int(masks.sum(1).argmax())] &= ~rows
    return masks


def partial(features: Tensor, forget: Tensor, rows: int, count: int, seed: int) -> Tensor:
    """Masks that leave out a tenth to a half of the forget set and nothing else.  features (n, d) -> (count, rows).

    Every other one leaves out a row's nearest of the forget set, the rest rows drawn at random: for forget sets that no
    deletion of related rows holds, such as random ones.
    """
    generator, f = torch.Generator().manual_seed(seed), len(forget)
    apart = torch.cdist(features[forget].double(), features[forget].double())
    masks = torch.ones(count, rows, dtype=torch.bool)
    for i, mask in enumerate(masks):
        size = int(torch.randint(max(1, f // 10), max(2, f // 2 + 1), (), generator=generator))
        row = int(torch.randint(f, (), generator=generator))
        order = torch.randperm(f, generator=generator) if i % 2 else apart[row].argsort()
        mask[forget[order[:size]]] = False
    return masks
