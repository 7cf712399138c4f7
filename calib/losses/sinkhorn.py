"""Entropic optimal transport between two sets of points, in the log domain.

The cost C (..., n, m) is the caller's; marginals are uniform over what a mask leaves. Two losses follow. `sharp` is
<P, C>, what SinKD publishes (arXiv:2402.17110), whose gradient runs through every sweep; it is not zero at equality.
`debiased` is S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (arXiv:1810.08278), zero at equality, with the
gradient dOT/dC = P that holds where the sweeps have converged. Both are blind to permutations: they say that the sets
agree, not which point went where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Cost = Callable[[Tensor, Tensor], Tensor]  # (..., n, d), (..., m, d) -> (..., n, m)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """sum |x_i - y_j|; between distributions twice their total variation, in [0, 2]."""
    return torch.cdist(x, y, p=1)


def half_square(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 / 2."""
    norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (norms / 2 - x @ y.mT).clamp(min=0)


COSTS: dict[str, Cost] = {"l1": l1, "squared": half_square}


@dataclass(frozen=True)
class TransportPlan:
    """P (..., n, m) sums to one; `dual` is f_i + g_j of the potentials; `error` (...) is the largest relative error of
    a row's mass (columns are exact, or like rows)."""

    p: Tensor
    dual: Tensor
    error: Tensor


def transport(
    cost: Tensor,
    eps: float,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    sweeps: int = 100,
    tolerance: float = 0.0,
    anneal: bool = True,
    symmetric: bool = False,
) -> TransportPlan:
    """Sinkhorn's plan for cost C (..., n, m) and entropic weight `eps`, differentiable in C through every sweep.

    rows (..., n) and columns (..., m) are masks. Where `anneal`, the first sweeps halve the weight from the cost's
    greatest value down to `eps`; then at most `sweeps` follow, until all errors are below `tolerance`. `symmetric` is
    for the cost of a set to itself: there both potentials are one, and a few averaged sweeps find it.
    """
    log_a, log_b = _uniform(rows, cost, -2), _uniform(columns, cost, -1)
    g = torch.zeros_like(cost[..., 0, :])
    start = float(cost.detach().max()) if anneal and cost.numel() else 0.0
    falling = _falling(start, eps)
    for sweep, weight in enumerate([*falling, *[eps] * sweeps]):
        f = _soft_min(cost - g[..., None, :], log_b[..., None, :], weight, -1)
        if symmetric:
            f = g = (f + g) / 2
        else:
            g = _soft_min(cost - f[..., :, None], log_a[..., :, None], weight, -2)
        dual = f[..., :, None] + g[..., None, :]
        if sweep < len(falling):
            continue
        if tolerance and float(_plan(cost, dual, log_a, log_b, eps).error.max()) < tolerance:
            break
    return _plan(cost, dual, log_a, log_b, eps)


def sharp(cost: Tensor, plan: TransportPlan) -> Tensor:
    """<P, C>, a mean over pairs.  (..., n, m) -> (...)."""
    return (plan.p * cost).sum((-2, -1))


def entropic(cost: Tensor, plan: TransportPlan) -> Tensor:
    """<P, C> + eps KL(P || a b^T), whose gradient in C is P.  (..., n, m) -> (...)."""
    p = plan.p.detach()
    value = (p * plan.dual.detach()).sum((-2, -1))
    through = (p * cost).sum((-2, -1))
    return value + through - through.detach()


def debiased(
    x: Tensor,
    y: Tensor,
    cost: Cost,
    eps: float,
    *,
    mask: Tensor | None = None,
    sweeps: int = 100,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """S(x, y) of points x, y (..., n, d) -> (...), and the error of its worst plan (...).

    mask (..., n) tells which points count, in both sets; 0 where none does. No gradient goes into y's own term.
    """

    def term(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        c = cost(a, b)
        with torch.no_grad():
            plan = transport(
                c, eps, rows=mask, columns=mask, sweeps=sweeps, tolerance=tolerance, symmetric=a is b
            )  # fmt: skip
        return entropic(c, plan), plan.error

    y_alone = y.detach()
    (xy, e_xy), (xx, e_xx), (yy, e_yy) = term(x, y), term(x, x), term(y_alone, y_alone)
    value = xy - xx / 2 - yy / 2
    if mask is not None:
        value = value * mask.any(-1)
    return value, torch.stack([e_xy, e_xx, e_yy]).amax(0)


def sinkd(
    p_logits: Tensor, q_logits: Tensor, *, tau: float = 2.0, eps: float = 0.1, sweeps: int = 20, factor: float = 0.001
) -> Tensor:
    """SinKD's loss as its code has it: rows of a batch (b, C), a sum over the batch times `factor` (0.001; 0.0008)."""
    cost = l1((q_logits / tau).softmax(-1), (p_logits / tau).softmax(-1))
    return factor * len(cost) * sharp(cost, transport(cost, eps, sweeps=sweeps, anneal=False))


def _uniform(mask: Tensor | None, cost: Tensor, axis: int) -> Tensor:
    """Log of equal weights along `axis` of the cost for what the mask leaves; for all where it leaves nothing."""
    if mask is None:
        mask = torch.ones(cost.shape[axis], dtype=torch.bool, device=cost.device)
    mask = mask | ~mask.any(-1, keepdim=True)
    return mask.to(cost.dtype).log() - mask.sum(-1, keepdim=True).to(cost.dtype).log()


def _falling(start: float, eps: float) -> list[float]:
    weights = []
    while start > eps:
        weights.append(start)
        start /= 2
    return weights


def _soft_min(value: Tensor, log_weight: Tensor, eps: float, axis: int) -> Tensor:
    return -eps * (log_weight - value / eps).logsumexp(axis)


def _plan(cost: Tensor, dual: Tensor, log_a: Tensor, log_b: Tensor, eps: float) -> TransportPlan:
    p = ((dual - cost) / eps + log_a[..., :, None] + log_b[..., None, :]).exp()
    mass = log_a.exp()
    error = ((p.sum(-1) - mass).abs() / mass.amax(-1, keepdim=True)).amax(-1)
    return TransportPlan(p, dual, error)
