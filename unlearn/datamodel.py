"""Datamodels: how much each training row adds to each output of a model trained on it (arXiv:2202.00622).

    f(x; S \\ F) ~ f(x; S) - sum_{i in F} beta_i(x)

All logits have weights of their own, and all weights a scale that was checked: models were trained without other rows,
and what they say is compared with what was predicted. A rank correlation alone cannot see a wrong scale.
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
    """Of predicted changes against true ones: the linear datamodeling score (Spearman's rank correlation over
    deletions, a mean over outputs), the slope of truth on prediction, their cosine, |truth - prediction| / |truth|."""

    score: float
    slope: float
    cosine: float
    error: float

    def asdict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Datamodel:
    """weights (n, m, C), float64: what each of n rows adds to each of C outputs at m points."""

    weights: Tensor

    def change(self, gone: Tensor) -> Tensor:
        """Of the outputs, when rows go.  bool (..., n) -> (..., m, C)."""
        return -torch.tensordot(gone.double(), self.weights, 1)

    def fidelity(self, gone: Tensor, changes: Tensor) -> Fidelity:
        """On deletions it was not fitted to: bool (D, n), and the true changes (D, m, C)."""
        return fidelity(self.change(gone), changes)


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


def regress(gone: Tensor, changes: Tensor, *, penalty: float, lasso: bool = False) -> Datamodel:
    """Fit to deletions and what they changed.  bool (M, n), (M, m, C) -> weights of n rows.

    `changes` are differences from a model that saw all rows, where there is one trained alike, or outputs as they are:
    then their mean is taken off, and the mean of `gone` too. penalty is of least squares as a mean over the M
    deletions, in units of the variance of a column of `gone`; with `lasso` of absolute values, in units of a change.
    """
    x = gone.double()
    x = x - x.mean(0)
    y = changes.double().flatten(1)
    y = y - y.mean(0)
    if lasso:
        fitted = Lasso(alpha=penalty, fit_intercept=False).fit(x.numpy(), y.numpy())
    else:
        fitted = Ridge(alpha=penalty * len(x) * float(x.var(0).mean()), fit_intercept=False).fit(x.numpy(), y.numpy())
    weights = torch.from_numpy(fitted.coef_).view(*changes.shape[1:], -1).movedim(-1, 0)
    return Datamodel(-weights.contiguous())
