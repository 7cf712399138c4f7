"""Datamodels: how outputs of a model change when rows of its training data go (arXiv:2202.00622).

Two ways to predict the change from models that were trained without other rows. `regress` gives every row a weight of
its own at every output, so that changes add up over rows:

    f(x; S \\ F) ~ f(x; S) - sum_{i in F} beta_i(x)

Rows that stand in for each other do not add up: half of a cluster may go and nothing happens, the rest goes and
everything does. `gp_weights` asks instead which of the deletions that were seen are like the one that is asked for.

All logits are predicted, and all scales are checked: models were trained without still other rows, and what they say is
compared with what was predicted. A rank correlation alone cannot see a wrong scale.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from scipy.stats import rankdata
from sklearn.linear_model import Lasso, Ridge
from torch import Tensor

from calib import BadInput


@dataclass(frozen=True)
class Fidelity:
    """Agreement of predicted changes with true ones: the linear datamodeling score (Spearman's rank correlation over
    deletions, a mean over outputs), the slope of truth on prediction, their cosine, |truth - prediction| / |truth|."""

    score: float
    slope: float
    cosine: float
    error: float

    def asdict(self) -> dict[str, float]:
        """The measures by name."""
        return asdict(self)


@dataclass(frozen=True)
class Datamodel:
    """weights (n, m, C), float64: what each of n rows adds to each of C outputs at m points."""

    weights: Tensor

    def change(self, deleted: Tensor) -> Tensor:
        """Predict the change of the outputs when rows go: bool (..., n) -> (..., m, C)."""
        return -torch.tensordot(deleted.double(), self.weights, 1)

    def fidelity(self, deleted: Tensor, changes: Tensor) -> Fidelity:
        """Compare predictions with true changes (D, m, C) on deletions bool (D, n) that it was not fitted to."""
        return fidelity(self.change(deleted), changes)


def fidelity(predicted: Tensor, true: Tensor) -> Fidelity:
    """(D, ...), (D, ...).  Raises BadInput for fewer than two deletions, which cannot be ranked."""
    if len(true) < 2:
        raise BadInput("datamodel: one deletion cannot be ranked; hold out at least two")
    p, t = predicted.double().flatten(1), true.double().flatten(1)
    ranks = [torch.from_numpy(rankdata(z.numpy(), axis=0)) for z in (p, t)]
    a, b = (r - r.mean(0) for r in ranks)
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    score = ((a * b).sum(0) / size)[size > 0].mean()
    dot, norms = (p * t).sum(), (p.norm(), t.norm())
    return Fidelity(
        float(score) if (size > 0).any() else 0.0,
        float(dot / norms[0].square().clamp(min=1e-300)),
        float(dot / (norms[0] * norms[1]).clamp(min=1e-300)),
        float((t - p).norm() / norms[1].clamp(min=1e-300)),
    )


def regress(deleted: Tensor, changes: Tensor, *, penalty: float, lasso: bool = False) -> Datamodel:
    """Fit to deletions and what they changed.  bool (M, n), (M, m, C) -> weights of n rows.

    `changes` are differences from a model that saw all rows, where there is one trained alike, or outputs as they are:
    then their mean is taken off, and the mean of `deleted` too. penalty is of least squares as a mean over the M
    deletions, in units of the variance of a column of `deleted`; with `lasso` of absolute values, in units of a change.
    Of subsets that keep a share a of all rows, weights are about 1 / a too large for deletions from all of them.
    """
    x = deleted.double()
    x = x - x.mean(0)
    y = changes.double().flatten(1)
    y = y - y.mean(0)
    if lasso:
        fitted = Lasso(alpha=penalty, fit_intercept=False).fit(x.numpy(), y.numpy())
    else:
        fitted = Ridge(alpha=penalty * len(x) * float(x.var(0).mean()), fit_intercept=False).fit(x.numpy(), y.numpy())
    weights = torch.from_numpy(fitted.coef_).view(*changes.shape[1:], -1).movedim(-1, 0)
    return Datamodel(-weights.contiguous())


@dataclass(frozen=True, kw_only=True)
class GaussianProcessConfig:
    """The covariance of two deletions, in units of the variance that deleting the forget set has under the linear part.

    `offset` is what all changes share (how the full models differ from their kind); the linear part is the number of
    rows that both lack, over those of the forget set, which is ridge regression on rows; `bend` times the share of the
    forget set that both lack, to the `power`, is of rows that stand in for each other and hardly count until nearly all
    of them are gone; `own`, at a row of the forget set, is of deletions that hold that row itself. `noise` is the
    variance of one model's change.
    """

    bend: float = 0.35
    power: int = 4
    own: float = 0.0
    noise: float = 1.0
    offset: float = 10.0
    seen: float = 0.9  # share of the forget set that must have been deleted before the bend is trusted,
    fewest: int = 10  # so often: a power must not be carried to where nothing was seen


def bends(deleted: Tensor, forget: Tensor, config: GaussianProcessConfig) -> bool:
    """Whether enough deletions show what happens when nearly all of the forget set goes."""
    return int((shares(deleted, forget) >= config.seen).sum()) >= config.fewest


def gp_weights(deleted: Tensor, forget: Tensor, config: GaussianProcessConfig) -> tuple[Tensor, Tensor]:
    """Weights of the changes of known deletions in the prediction for the forget set, by a Gaussian process.

    bool (D, n), int (f,) -> weights (D,) at rows that stay and weights (D, f) at each row of the forget set, float64.
    """
    x = deleted.double()
    inside, f = x[:, forget], len(forget)
    share = inside.mean(1)
    bend = config.bend if bends(deleted, forget, config) else 0.0
    alike = config.offset + x @ x.mT / f + bend * (inside @ inside.mT / f) ** config.power
    alike.diagonal().add_(config.noise)
    asked = config.offset + share + bend * share**config.power
    solved = torch.cholesky_solve(torch.cat([asked[:, None], inside], 1), torch.linalg.cholesky(alike))
    weights, pulls = solved[:, 0], solved[:, 1:]
    # What `own` adds to the covariance at a row is of rank one (Sherman and Morrison), and it is asked for as well.
    left = config.own * (1 - inside.mT @ weights) / (1 + config.own * (inside * pulls).sum(0))
    return weights, weights[:, None] + pulls * left


def shares(deleted: Tensor, forget: Tensor) -> Tensor:
    """Share of the forget set that each deletion holds: bool (D, n), int (f,) -> (D,)."""
    return deleted[:, forget].double().mean(1)


def spread(
    deleted: Tensor, outputs: Tensor, before: Tensor, forget: Tensor, *, seen: float = 0.8, fewest: int = 20
) -> Tensor:
    """Spread of answers on the forget set once it is gone, over that of full models.  -> (f, C), 1 where it is not
    known.

    said (D, f, C), before (M, f, C). The root of the ratio of their standard deviations: deletions that hold most of
    the forget set hold other rows as well, and spread more for it.
    """
    near = shares(deleted, forget) >= seen
    if int(near.sum()) < fewest:
        return torch.ones_like(before[0])
    return (outputs[near].std(0) / before.std(0).clamp(min=1e-6)).clamp(0.25, 4).sqrt()
