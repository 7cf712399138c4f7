"""A teacher's distributions kept as their most likely tokens and the mass of all others, and losses against them.

KL-Top is OSTQuant's loss (OpenReview rAcgDBdKnP). Its paper and its code hold two different losses under that name,
and neither is a divergence of the whole distribution: they are kept here under names of their own, beside the form
with a tail bucket, which is a true KL on k + 1 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.losses.divergences import Divergence, forward_kl
from calib.runtime.precision import upcast


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens of each teacher row.

    index (..., k) int; log_p (..., k) log-probabilities under the full softmax; log_tail (...) log of the mass left
    over, -inf where nothing is (k = V).
    """

    index: Tensor
    log_p: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> TopK:
        return TopK(self.index[rows], self.log_p[rows], self.log_tail[rows])

    def to(self, device: torch.device) -> TopK:
        """Move all tensors to a device."""
        return TopK(self.index.to(device), self.log_p.to(device), self.log_tail.to(device))


def top_k(logits: Tensor, k: int) -> TopK:
    """The sparse form of a teacher's logits (..., V); k is cut to V."""
    logits = upcast(logits)
    index = logits.topk(min(k, logits.shape[-1]), sorted=False).indices
    log_p, log_tail = _split(logits, index)
    return TopK(index, log_p, log_tail)


def _split(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities at `index` (..., k), and the log of the mass elsewhere (...).

    The tail is a logsumexp over the complement: 1 - sum(p) would cancel to nothing where the top holds nearly all.
    """
    top = logits.gather(-1, index)
    log_top = top.logsumexp(-1)
    if index.shape[-1] == logits.shape[-1]:  # nothing is left over; logsumexp of nothing has no gradient
        return top - log_top[..., None], torch.full_like(log_top.detach(), -torch.inf)
    log_rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    log_z = torch.logaddexp(log_top, log_rest)
    return top - log_z[..., None], log_rest - log_z


def with_tail_bucket(divergence: Divergence, top: TopK, q_logits: Tensor) -> Tensor:
    """The divergence on k + 1 classes, the last being "any other token".  q_logits (..., V) -> (...).

    Of an f-divergence never more than the full one (data processing), and the full one at k = V.
    """
    log_q, log_q_tail = _split(upcast(q_logits), top.index)
    if top.index.shape[-1] == q_logits.shape[-1]:
        return divergence(top.log_p, log_q)
    log_p = torch.cat([top.log_p, top.log_tail[..., None]], -1)
    return divergence(log_p, torch.cat([log_q, log_q_tail[..., None]], -1))


def kl_top_tail(top: TopK, q_logits: Tensor) -> Tensor:
    """KL(p || q) on k + 1 classes.  -> (...).

    Never negative, zero iff student and teacher agree on the top, never above the full KL, equal to it at k = V.
    """
    return with_tail_bucket(forward_kl, top, q_logits)


def kl_top_partial(top: TopK, q_logits: Tensor) -> Tensor:
    """Terms of KL(p || q) on the top-k alone.  -> (...).  What OSTQuant's scripts run.

    Can be negative: its minimum is m log m (m the top's mass), reached by putting all mass on the top, so the teacher
    itself does not minimise it.
    """
    log_q, _ = _split(upcast(q_logits), top.index)
    return (top.log_p.exp() * (top.log_p - log_q)).sum(-1)


def kl_top_renormalised(top: TopK, q_logits: Tensor) -> Tensor:
    """KL between the two softmaxes over the top-k logits alone.  -> (...).  Blind to mass that leaks to the tail."""
    log_p = top.log_p.log_softmax(-1)
    log_q = upcast(q_logits).gather(-1, top.index).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


KL_TOP = {"tail": kl_top_tail, "partial": kl_top_partial, "renormalised": kl_top_renormalised}


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from each teacher row (RS-KD, arXiv:2503.16870), those drawn several times kept once.

    index (..., k) int; weight (..., k), shares of the draws, zero where fewer tokens came than there is room for.
    """

    index: Tensor
    weight: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> SampledTargets:
        return SampledTargets(self.index[rows], self.weight[rows])

    def to(self, device: torch.device) -> SampledTargets:
        """Move all tensors to a device."""
        return SampledTargets(self.index.to(device), self.weight.to(device))


def sample_targets(logits: Tensor, draws: int, generator: torch.Generator) -> SampledTargets:
    """`draws` tokens of each row of logits (..., V), with replacement."""
    rows = upcast(logits).flatten(0, -2).softmax(-1)
    index = torch.multinomial(rows, draws, replacement=True, generator=generator).sort(-1).values
    again = torch.zeros_like(index, dtype=torch.bool)
    again[:, 1:] = index[:, 1:] == index[:, :-1]
    slot = (~again).cumsum(-1) - 1  # where each token is kept
    weight = rows.new_zeros(index.shape).scatter_add(-1, slot, rows.new_full(index.shape, 1 / draws))
    kept = torch.zeros_like(index).scatter(-1, slot, index)
    shape = (*logits.shape[:-1], draws)
    return SampledTargets(kept.view(shape), weight.view(shape))


def sampled_cross_entropy(drawn: SampledTargets, q_logits: Tensor) -> Tensor:
    """-sum weight log q.  q_logits (..., V) -> (...).

    Its expectation is the forward KL plus the teacher's entropy, which the student cannot change: the gradient is
    unbiased, where that of any top-k is not.
    """
    logits = upcast(q_logits)
    return logits.logsumexp(-1) - (drawn.weight * logits.gather(-1, drawn.index)).sum(-1)
