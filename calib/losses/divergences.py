"""Divergences between distributions over tokens: one value in nats for each row, never a model in sight.

Each takes log-probabilities of teacher and student, log_p and log_q (..., C) -> (...), normalised and finite. Where
they come from is another matter: from dense logits (`dense`), from a teacher's most likely tokens
(`calib.losses.top_k`), from hidden states some positions at a time (`calib.losses.chunked_head`). All are zero where
the two agree, and never negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.runtime.precision import upcast

Divergence = Callable[[Tensor, Tensor], Tensor]

MAX_LOG_RATIO = 40.0  # exponents beyond it are continued as a line, so that no value and no gradient is infinite


def dense(divergence: Divergence, p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence of softmax(p / T) and softmax(q / T).  (..., V), (..., V) -> (...).

    Not multiplied by T^2, which keeps the size of gradients: that is the weight of a loss, for whoever weighs it.
    """
    p_logits, q_logits = (upcast(z) for z in (p_logits, q_logits))
    if temperature != 1:
        p_logits, q_logits = p_logits / temperature, q_logits / temperature
    if divergence is forward_kl and not p_logits.requires_grad:
        return _ForwardKl.apply(p_logits, q_logits)[0]
    return divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1))


class _ForwardKl(torch.autograd.Function):
    """KL from logits, with the gradient q - p: the loss most used, in a third of the memory of its steps apart."""

    @staticmethod
    def forward(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p, q_total = p_logits.log_softmax(-1), q_logits.logsumexp(-1, keepdim=True)
        gap = (log_p - q_logits).add_(q_total)
        p = log_p.exp_()
        return gap.mul_(p).sum(-1), p, q_total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, p, q_total = output
        ctx.save_for_backward(inputs[1], p, q_total)
        ctx.mark_non_differentiable(p, q_total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[None, Tensor]:
        q_logits, p, q_total = ctx.saved_tensors
        return None, (q_logits - q_total).exp_().sub_(p).mul_(gradient[..., None])


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward Kullback-Leibler divergence, KL(p || q), in nats: (..., C), (..., C) -> (...,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse Kullback-Leibler divergence, KL(q || p), in nats: (..., C), (..., C) -> (...,)."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon (GKD, arXiv:2306.13649) over beta (1 - beta), which makes it continuous in beta.

    With m = beta p + (1 - beta) q: KL(p || m) / (1 - beta) + KL(q || m) / beta. Forward KL at beta 0, reverse KL at 1,
    four times the usual JS at 0.5; without the division it vanishes at both ends.
    """
    if beta in (0, 1):
        return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
    log_m = _mixed(log_p, log_q, beta)
    return forward_kl(log_p, log_m) / (1 - beta) + forward_kl(log_q, log_m) / beta


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv:2402.03898)."""
    return forward_kl(log_p, _mixed(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), with the gradient of the mixture too."""
    return skew_kl(log_q, log_p, alpha)


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float = 0.8, beta: float = 0.3) -> Tensor:
    """The alpha-beta divergence (ABKD, arXiv:2505.04560), continuous also where alpha, beta or their sum is 0.

    (1, 0) is forward KL, (0, 1) reverse KL, (0.5, 0.5) four times squared Hellinger, (1, 1) half |p - q|^2.
    """
    if alpha == 0 and beta == 0:
        return 0.5 * (log_q - log_p).square().sum(-1)
    if alpha == 0:
        return alpha_beta(log_q, log_p, beta, 0)
    ratio = log_q - log_p
    if beta == 0:  # in y = q^alpha / p^alpha: p^alpha (y - 1 - log y) / alpha^2
        terms = _exp(alpha * log_p) * _above_one(alpha * ratio)
        return terms.sum(-1) / alpha**2
    if alpha + beta == 0:
        return _above_one(-alpha * ratio).sum(-1) / alpha**2
    # p^(a+b) [a/(a+b) + b/(a+b) r^(a+b) - r^b] / (a b) with r = q / p, which is zero with its slope at r = 1.
    total = alpha + beta
    mean = (alpha * _exp(total * log_p) + beta * _exp(total * log_q)) / total
    return (mean - _exp(alpha * log_p + beta * log_q)).sum(-1) / (alpha * beta)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum |p - q| / 2, between 0 and 1."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def squared_hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - sum sqrt(p q), between 0 and 1."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1) / 2


def chi_square(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum (p - q)^2 / q (Pearson's)."""
    return (_exp(log_p - log_q / 2, MAX_LOG_RATIO / 2) - (log_q / 2).exp()).square().sum(-1)


def cauchy_schwarz(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-2 log <p, q> + log <p, p> + log <q, q>: symmetric, finite wherever p and q share a token."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a + b).logsumexp(-1)

    return inner(log_p, log_p) + inner(log_q, log_q) - 2 * inner(log_p, log_q)


def f_divergence(f: Callable[[Tensor], Tensor]) -> Divergence:
    """sum q f(p / q) for a convex f with f(1) = 0, differentiable, as a function of r = p / q.

    Where r is less than e^-30 it counts as that, and where it is more than e^30 as less than it is.
    """

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * f(_exp((log_p - log_q).clamp(min=-30), 30))).sum(-1)

    return divergence


def f_weight(f: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """h(r) = f''(r) r^2: what an f-divergence weighs the gap of log-probabilities with, where p / q = r.  (...)."""
    second = torch.func.grad(torch.func.grad(f))
    return torch.func.vmap(second)(r.flatten()).view_as(r) * r.square()


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda r: r * r.log(),
    "reverse-kl": lambda r: -r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),  # two KLs to the middle, added
    "softened-reverse-kl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "chi-square": lambda r: (r - 1).square(),
}


def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def softened_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """2 KL((p + q) / 2 || p): the f-divergence whose weight is 1 / (1 + r)."""
    return 2 * forward_kl(_mixed(log_p, log_q, 0.5), log_p)


DIVERGENCES: dict[str, Divergence] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "js": jensen_shannon,
    "skew-kl": skew_kl,
    "skew-reverse-kl": skew_reverse_kl,
    "alpha-beta": alpha_beta,
    "total-variation": total_variation,
    "hellinger": squared_hellinger,
    "chi-square": chi_square,
    "cauchy-schwarz": cauchy_schwarz,
    "jeffreys": jeffreys,
    "softened-reverse-kl": softened_reverse_kl,
}


def cross_entropy(target: Tensor, q_logits: Tensor) -> Tensor:
    """-log q of the token that came.  target (...) int, q_logits (..., V) -> (...)."""
    return -upcast(q_logits).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


def k2(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(log u)^2 / 2, u = q / p, of tokens x drawn from the student: log p(x), log q(x) (...) -> (...).

    Differentiated, an unbiased gradient of the *reverse* KL (arXiv:2506.02208).
    """
    return (log_q - log_p).square() / 2


def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/u + log u - 1, of tokens x drawn from the student: log p(x), log q(x) (...) -> (...).

    As a value it estimates the reverse KL; differentiated it is an unbiased gradient of the *forward* KL.
    """
    return _above_one(log_p - log_q)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (...) where mask (...) is true; 0, not NaN, where it nowhere is."""
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)


def _mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    log_share, log_rest = torch.tensor([share, 1 - share], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + log_share, log_q + log_rest)


def _exp(x: Tensor, bound: float = MAX_LOG_RATIO) -> Tensor:
    """exp up to `bound`, its tangent there beyond."""
    low = x.clamp(max=bound)
    return low.exp() * (1 + x - low)


def _above_one(x: Tensor) -> Tensor:
    """exp(x) - 1 - x: never negative, zero at 0."""
    return torch.where(x > MAX_LOG_RATIO, _exp(x) - 1, torch.expm1(x.clamp(max=MAX_LOG_RATIO))) - x
