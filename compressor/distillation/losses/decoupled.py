"""Losses of distillation beyond plain divergences: one value in nats for each row, never a model in sight.

`POINTWISE` ones take logits and the class that came; they are weighted cross-entropies, so they are neither zero nor
least where student and teacher agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib.losses.divergences import cross_entropy, forward_kl, reverse_kl
from calib.runtime.precision import upcast

Pointwise = Callable[[Tensor, Tensor, Tensor], Tensor]


def nkd(p_logits: Tensor, q_logits: Tensor, target: Tensor, gamma: float = 1.5, lam: float = 1.0) -> Tensor:
    """-p_y log q_y - gamma lam^2 sum_{i != y} p^_i log q^_i (NKD, arXiv:2303.13005).

    (..., V), (..., V), int (...) -> (...).  p^ and q^ are softmaxes over the classes other than y at temperature
    `lam`, so that the target's logit has no part in the second term; one published revision leaves it in.
    """
    p_logits, q_logits = upcast(p_logits), upcast(q_logits)
    on_target = _at(p_logits.log_softmax(-1), target).exp() * cross_entropy(target, q_logits)
    others = _without(p_logits / lam, target).softmax(-1)
    return on_target - gamma * lam**2 * (others * _log_others(q_logits / lam, target)).sum(-1)


def uskd(
    q_logits: Tensor,
    target: Tensor,
    *,
    weak_logits: Tensor | None = None,
    mask: Tensor | None = None,
    level: Tensor | float | None = None,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
) -> Tensor:
    """-alpha t log q_y - beta sum_{i != y} z_i log q^_i, without a teacher (USKD, after arXiv:2303.13005).

    (..., V), int (...) -> (...).  t = q_y^2 + 1 - level, where `level` is the mean of q_y^2 over the rows of the batch
    that `mask` (...) leaves, or what is given: rows that come in chunks need the whole batch's. z is Zipf's law, 1 / r
    over its sum, r the rank of class i among those other than y by q^_i, softmax without y. Neither t nor z has a
    gradient.

    `weak_logits` (..., V) come from a head on an intermediate layer. They add their own softmax without y to what is
    ranked, and mu times their cross-entropy to the label smoothed by 0.1, which is what trains that head.

    Terms and constants are those of the authors' public code, but for the ranking, which is ours: there the target
    takes a rank too, and log-probabilities of the student are added to probabilities of the weak head.
    """
    logits = upcast(q_logits)
    surprise = cross_entropy(target, logits)
    with torch.no_grad():
        square = (-2 * surprise).exp()
        if level is None:
            counted = torch.ones_like(square, dtype=torch.bool) if mask is None else mask
            level = square.where(counted, 0).sum() / counted.sum().clamp(min=1)
        soft = square + 1 - level
        score = _without(logits, target)
        if weak_logits is not None:
            score = score.softmax(-1) + _without(upcast(weak_logits), target).softmax(-1)
            score = _without(score, target)
        zipf = _zipf(score)
    value = alpha * soft * surprise - beta * (zipf * _log_others(logits, target)).sum(-1)
    if weak_logits is None:
        return value
    log_weak = upcast(weak_logits).log_softmax(-1)
    return value - mu * (0.9 * _at(log_weak, target) + 0.1 * log_weak.mean(-1))


def ofa(p_logits: Tensor, q_logits: Tensor, target: Tensor, e: float = 1.5, temperature: float = 1.0) -> Tensor:
    """-[(1 + p_y)^e - 1] log q_y - sum_{c != y} p_c^e log q_c: adaptive target enhancement (OFA-KD, arXiv:2310.19444).

    (..., V), (..., V), int (...) -> (...).  Cross-entropy with the teacher's distribution at e = 1; above that the
    target's share grows with the teacher's belief in it. `temperature` divides both sides' logits.
    """
    log_p, log_q = ((upcast(z) / temperature).log_softmax(-1) for z in (p_logits, q_logits))
    on_target = torch.expm1(e * _at(log_p, target).exp().log1p())
    weight = (e * log_p).exp().scatter(-1, target[..., None], on_target[..., None])
    return -(weight * log_q).sum(-1)


def _uskd(
    p_logits: Tensor, q_logits: Tensor, target: Tensor, level: Tensor | None = None, weak_logits: Tensor | None = None
) -> Tensor:
    """It has no use for a teacher."""
    return uskd(q_logits, target, level=level, weak_logits=weak_logits)


POINTWISE: dict[str, Pointwise] = {
    "nkd": nkd,
    "ofa": ofa,
    "uskd": _uskd,
}


def bd_kd(log_p: Tensor, log_q: Tensor, heavier: float = 2.0) -> Tensor:
    """w_f KL(p || q) + w_r KL(q || p) (BD-KD, arXiv:2212.12965).  (..., C), (..., C) -> (...).

    w_f is `heavier` where the teacher has the greater entropy, w_r where the student has; the rest is 1. Third-party
    code for language models has both 2 and 3. Weights are constants to the gradient.
    """
    with torch.no_grad():
        gap = (log_q.exp() * log_q).sum(-1) - (log_p.exp() * log_p).sum(-1)  # teacher's entropy less the student's
        forward, reverse = (1 + (heavier - 1) * side.to(gap.dtype) for side in (gap > 0, gap < 0))
    return forward * forward_kl(log_p, log_q) + reverse * reverse_kl(log_p, log_q)


def _at(rows: Tensor, target: Tensor) -> Tensor:
    return rows.gather(-1, target[..., None]).squeeze(-1)


def _without(rows: Tensor, target: Tensor) -> Tensor:
    return rows.scatter(-1, target[..., None], -torch.inf)


def _log_others(logits: Tensor, target: Tensor) -> Tensor:
    """Log-softmax over all classes but the target, whose own entry is finite and means nothing."""
    return logits - _without(logits, target).logsumexp(-1, keepdim=True)


def _zipf(score: Tensor) -> Tensor:
    """1 / r over its sum, r the rank of a score from above; 0 for the last.  (..., V) -> (..., V)."""
    law = 1 / torch.arange(1, score.shape[-1] + 1, dtype=score.dtype, device=score.device)
    law[-1] = 0
    order = score.argsort(stable=True, dim=-1, descending=True)
    return torch.empty_like(score).scatter(-1, order, (law / law.sum()).expand_as(score))
