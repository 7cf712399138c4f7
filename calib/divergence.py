"""Divergences between next-token distributions: one value in nats for each row, never a model in sight.

Teacher p, student q, logits (..., V). KL-Top is OSTQuant's loss (OpenReview rAcgDBdKnP). Its paper and its code hold
two different losses under that name, and neither is a divergence of the whole distribution: they are kept here under
names of their own, beside the form with a tail bucket, which is a true KL on k + 1 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def forward_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q).  (..., V), (..., V) -> (...).  Zero iff rows agree up to a constant."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(q || p).  (..., V), (..., V) -> (...)."""
    return forward_kl(q_logits, p_logits)


@dataclass(frozen=True)
class Top:
    """The k most likely tokens of each teacher row.

    index (..., k) int; log_p (..., k) log-probabilities under the full softmax; log_tail (...) log of the mass left
    over, -inf where nothing is (k = V).
    """

    index: Tensor
    log_p: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> Top:
        return Top(self.index[rows], self.log_p[rows], self.log_tail[rows])

    def to(self, device: torch.device) -> Top:
        return Top(self.index.to(device), self.log_p.to(device), self.log_tail.to(device))


def top_k(logits: Tensor, k: int) -> Top:
    """The sparse form of a teacher's logits (..., V); k is cut to V."""
    logits = logits.float()
    index = logits.topk(min(k, logits.shape[-1]), sorted=False).indices
    log_p, log_tail = _split(logits, index)
    return Top(index, log_p, log_tail)


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


def kl_top_partial(top: Top, q_logits: Tensor) -> Tensor:
    """Terms of KL(p || q) on the top-k alone.  -> (...).  What OSTQuant's scripts run.

    Can be negative: its minimum is m log m (m the top's mass), reached by putting all mass on the top, so the teacher
    itself does not minimise it.
    """
    log_q, _ = _split(q_logits.float(), top.index)
    return (top.log_p.exp() * (top.log_p - log_q)).sum(-1)


def kl_top_renormalised(top: Top, q_logits: Tensor) -> Tensor:
    """KL between the two softmaxes over the top-k logits alone.  -> (...).  Blind to mass that leaks to the tail."""
    log_p = top.log_p.log_softmax(-1)
    log_q = q_logits.float().gather(-1, top.index).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_top_tail(top: Top, q_logits: Tensor) -> Tensor:
    """KL on k + 1 classes, the last being "any other token".  -> (...).

    Never negative, zero iff student and teacher agree on the top, never above the full KL, equal to it at k = V.
    """
    log_q, log_q_tail = _split(q_logits.float(), top.index)
    on_top = (top.log_p.exp() * (top.log_p - log_q)).sum(-1)
    if top.index.shape[-1] == q_logits.shape[-1]:
        return on_top
    return on_top + top.log_tail.exp() * (top.log_tail - log_q_tail)


KL_TOP = {"tail": kl_top_tail, "partial": kl_top_partial, "renormalised": kl_top_renormalised}


def cross_entropy(target: Tensor, q_logits: Tensor) -> Tensor:
    """-log q of the token that came.  target (...) int, q_logits (..., V) -> (...)."""
    return -q_logits.float().log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


CHUNK_BYTES = 2**25  # of float32 logits that exist at a time


def chunks(tokens: int, vocab: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `tokens` positions, of `size` each, or of as many as fill CHUNK_BYTES with logits."""
    size = size or max(1, CHUNK_BYTES // (4 * vocab))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def by_chunks(
    hidden: Tensor, loss: Callable[[slice, Tensor], Tensor], vocab: int, size: int | None = None
) -> tuple[float, Tensor]:
    """Sum of loss(positions, hidden[positions]), a scalar for each chunk of hidden (T, d), and its gradient (T, d).

    Gradients of whatever else `loss` depends on are added to their .grad. Logits, and what is made of them, exist for
    one chunk at a time.
    """
    gradient, total = torch.empty_like(hidden), 0.0
    for positions in chunks(len(hidden), vocab, size):
        x = hidden[positions].detach().requires_grad_()
        value = loss(positions, x)
        value.backward()
        total += float(value.detach())
        assert x.grad is not None
        gradient[positions] = x.grad
    return total, gradient
