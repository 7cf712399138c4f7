"""Linear heads on frozen features, from which rows are deleted exactly: what every other method is measured by.

Ridge regression, also of one-hot labels, forgets rows in closed form (the block form of Sherman, Morrison and Woodbury,
no approximation). Multinomial logistic regression forgets by Newton steps from where it is, two of which are as good as
a new fit where few rows go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib import BadInput
from unlearn.methods.job import Forgetting, Method, UnlearningJob
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn


@dataclass(frozen=True)
class Ridge:
    """theta (d, C) = A^-1 X^T Y, and `inverse` (d, d) = A^-1, with A = X^T X + penalty I."""

    theta: Tensor
    inverse: Tensor

    @staticmethod
    def fit(x: Tensor, y: Tensor, penalty: float) -> Ridge:
        """x (n, d), y (n, C), of one dtype, float64 for exactness; penalty > 0."""
        gram = x.mT @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return Ridge(inverse @ (x.mT @ y), inverse)

    def without(self, x: Tensor, y: Tensor) -> Ridge:
        """The fit to all rows but these, x (f, d) and y (f, C), which must be among those it was fitted to.

            theta - A^-1 X_F^T (I - H_FF)^-1 E_F,  H_FF = X_F A^-1 X_F^T,  E_F = Y_F - X_F theta

        The penalty stays as it was; one that grows with the number of rows would be another problem.
        """
        reached = x @ self.inverse  # (f, d)
        left = torch.eye(len(x), dtype=x.dtype, device=x.device) - reached @ x.mT
        theta = self.theta - reached.mT @ torch.linalg.solve(left, self.residuals(x, y))
        return Ridge(theta, self.inverse + reached.mT @ torch.linalg.solve(left, reached))

    def residuals(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, C): y - x theta."""
        return y - x @ self.theta

    def leverages(self, x: Tensor) -> Tensor:
        """(n,): x_i^T A^-1 x_i, which lie between 0 and 1 for rows that it was fitted to."""
        return ((x @ self.inverse) * x).sum(-1)

    def influences(self, x: Tensor, y: Tensor, at: Tensor, *, leave_one_out: bool = False) -> Tensor:
        """First-order influence of each row (n) on the outputs at some points `at` (m, d).  -> (n, m, C).

        With `leave_one_out` exactly, each row on its own: e_i / (1 - h_i) in place of e_i. A sum over several rows is
        not exact in either case, only `without` is.
        """
        pull = self.residuals(x, y)
        if leave_one_out:
            pull = pull / (1 - self.leverages(x))[:, None]
        return (x @ self.inverse @ at.mT)[..., None] * pull[:, None]


@dataclass(frozen=True)
class Logistic:
    """theta (d, C) at the least sum of cross-entropies + penalty / 2 |theta|^2."""

    theta: Tensor
    penalty: float

    @staticmethod
    def fit(x: Tensor, labels: Tensor, classes: int, penalty: float, steps: int = 50) -> Logistic:
        """x (n, d) in float64, labels int (n,), penalty > 0.  Newton's method with halved steps where needed."""
        start = Logistic(torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device), penalty)
        return start.newton(x, labels, steps)

    def newton(self, x: Tensor, labels: Tensor, steps: int = 1) -> Logistic:
        """So many Newton steps on these rows: from a fit to more rows, this is to forget the others."""
        now = self
        for _ in range(steps):
            gradient = now.gradient(x, labels)
            move = torch.linalg.solve(now.hessian(x), gradient.flatten()).view_as(gradient)
            if move.abs().max() < 1e-14 * (1 + now.theta.abs().max()):
                break
            now = now._moved(move, x, labels)
        return now

    def _moved(self, move: Tensor, x: Tensor, labels: Tensor) -> Logistic:
        before, share = self.objective(x, labels), 1.0
        while share > 1e-6:
            there = Logistic(self.theta - share * move, self.penalty)
            if there.objective(x, labels) <= before + 1e-12 * before.abs():
                return there
            share /= 2
        return self

    def without(self, x: Tensor, labels: Tensor, forget: Tensor) -> Logistic:
        """Delete rows by one step with the Hessian of all rows, theta + H^-1 sum_F grad l: the influence function's
        deletion."""
        deleted = Logistic(self.theta, 0.0).gradient(x[forget], labels[forget])
        return Logistic(
            self.theta + torch.linalg.solve(self.hessian(x), deleted.flatten()).view_as(deleted), self.penalty
        )

    def objective(self, x: Tensor, labels: Tensor) -> Tensor:
        """Penalized cross-entropy, a sum over rows."""
        nats = torch.nn.functional.cross_entropy(x @ self.theta, labels, reduction="sum")
        return nats + self.penalty / 2 * self.theta.square().sum()

    def gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the objective (d, C)."""
        wrong = (x @ self.theta).softmax(-1) - torch.nn.functional.one_hot(labels, self.theta.shape[1])
        return x.mT @ wrong + self.penalty * self.theta

    def hessian(self, x: Tensor) -> Tensor:
        """(d C, d C): sum_i x_i x_i^T (x) (diag p_i - p_i p_i^T) + penalty I."""
        p = (x @ self.theta).softmax(-1)
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        size = self.theta.numel()
        whole = torch.einsum("ni,nj,nab->iajb", x, x, spread).reshape(size, size)
        return whole + self.penalty * torch.eye(size, dtype=x.dtype, device=x.device)


def exactly(models: Ensemble, rows: Examples, deleted: Tensor, options: Unlearn) -> Ensemble:
    """Each model, a linear head with its bias as one more input, without the rows `deleted` bool (n,).

    Raises BadInput where the models are no linear heads, or not fitted to these rows.
    """
    names = set(models.params)
    weight = next((name for name in names if name.endswith("weight")), "")
    bias = weight.removesuffix("weight") + "bias"
    inputs = next(iter(rows.inputs.values()))
    if not weight or names - {weight, bias} or inputs.dim() != 2 or models.params[weight].dim() != 3:
        raise BadInput(
            "method exact: the model must be one linear layer on features (rows, width); choose another method"
        )
    x = inputs.double()
    if bias in names:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1)
    moved = {name: p.clone() for name, p in models.params.items()}
    for i in range(len(models)):
        parts = [models.params[name][i].double().view(-1, len(models.params[weight][i])) for name in (weight, bias) if name in names]  # fmt: skip  # noqa: E501
        parts[0] = models.params[weight][i].double().mT
        theta = _head_without(torch.cat(parts), x, rows.labels, deleted, options)
        moved[weight][i] = theta[: inputs.shape[1]].mT.to(moved[weight])
        if bias in names:
            moved[bias][i] = theta[inputs.shape[1]].to(moved[bias])
    return models.with_params(moved)


def _head_without(theta: Tensor, x: Tensor, labels: Tensor, deleted: Tensor, options: Unlearn) -> Tensor:
    if options.head == "ridge":
        y = torch.nn.functional.one_hot(labels, theta.shape[1]).double()
        fitted = Ridge.fit(x, y, options.penalty)
        _check_fit(theta, fitted.theta, options)
        return fitted.without(x[deleted], y[deleted]).theta
    fit = Logistic(theta, options.penalty)
    _check_fit(theta, fit.newton(x, labels).theta, options)
    return fit.newton(x[~deleted], labels[~deleted], 50).theta


def _check_fit(theta: Tensor, fitted: Tensor, options: Unlearn) -> None:
    away = float((theta - fitted).norm() / fitted.norm().clamp(min=1e-30))
    if away > 1e-3:
        raise BadInput(
            f"method exact: the weights are {away:.1%} away from a {options.head} fit with penalty {options.penalty:g} "
            "to these rows, so nothing is known of a fit to fewer; give the --penalty and --head it was fitted with"
        )


def _prepare(work: UnlearningJob) -> Forgetting:
    return Forgetting(lambda models, name: exactly(models, work.rows, work.deleted, work.options), {})


def _check(trainable: TrainableModel, rows: Examples, options: Unlearn) -> None:
    exactly(trainable.one(), rows, torch.zeros(len(rows), dtype=torch.bool), options)


ENTRIES = {"exact": Method(_prepare, _check)}
