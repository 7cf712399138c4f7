"""The distribution that a student is to become, known up to a factor, and the pseudo-rewards that lead there: f-DPG
(arXiv:2302.08215), and KL-regularised reinforcement learning as Bayesian inference (arXiv:2205.11275).

With a teacher T and rewards r the target is p(x | c) = T(x | c) exp(r(x, c) / beta) / Z(c), the posterior of answers
given that they are good; or T on answers with a reward above 0 alone. The gradient of D_f(pi || p) = E_p f(pi / p) is
E_pi[f'(pi / p) grad log pi]: policy gradient with the pseudo-reward -f'.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calib import BadInput

LARGEST_LOG_RATIO = 20.0  # of pi to the target; what is beyond it counts as this much
BETA_TOLERANCE = 1e-9  # relative, of a beta that is solved for

# f'(t) of log t, t = pi / p (arXiv:2302.08215, Table 2).
F_PRIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda log_t: -(-log_t).exp(),
    "reverse-kl": lambda log_t: log_t + 1,
    "total-variation": lambda log_t: log_t.sign() / 2,
    "js": lambda log_t: math.log(2) - torch.nn.functional.softplus(-log_t),
    "chi-square": lambda log_t: 1 - (-2 * log_t).exp(),
    "reverse-chi-square": lambda log_t: 2 * log_t.expm1(),
}


def log_target(log_base: Tensor, rewards: Tensor, beta: float | None) -> Tensor:
    """log P(x) (...), not normalised: of log T(x) and rewards (...), T exp(r / beta); or, where `beta` is None, T
    where r > 0 and nothing elsewhere."""
    if beta is None:
        return torch.where(rewards > 0, log_base, -math.inf)
    return log_base + rewards / beta


def pseudo_rewards(log_pi: Tensor, log_p: Tensor, log_z: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """-f'(pi / p), less what the others of its group have in the mean, of answers (P, G); and where the log ratio was
    clamped (P, G).

    log_pi and log_p (P, G) of the student and of the target, not normalised; log_z (P,) its log partition function, or
    -inf where nothing of a prompt's target was seen yet: its answers then count for nothing. Leaving the answer itself
    out of its baseline keeps the gradient unbiased (f-DPG, Eq. 9; REINFORCE leave-one-out, arXiv:2402.14740).
    """
    seen = log_z[:, None].isfinite().expand_as(log_pi)
    log_t = torch.where(seen, log_pi - log_p + log_z[:, None], 0.0)  # inf where the target has no mass
    clamped = log_t.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    gain = -F_PRIMES[divergence](clamped)
    others = (gain.sum(-1, keepdim=True) - gain) / (gain.shape[-1] - 1)
    return torch.where(seen, gain - others, 0.0), seen & (log_t != clamped)


class LogPartition:
    """Running estimate of log Z of each prompt's target: the mean of P(x) / pi(x) over all answers x so far
    (f-DPG, Eq. 10)."""

    def __init__(self, prompts: int) -> None:
        """Nothing is known of any of `prompts` targets."""
        self.kept = {
            "log_sum": torch.full((prompts,), -math.inf, dtype=torch.float64),
            "draws": torch.zeros(prompts, dtype=torch.float64),
        }

    def update(self, prompts: Tensor, log_weights: Tensor) -> Tensor:
        """Take in log P(x) - log pi(x) (P, G) of answers to the prompts of these numbers (P,).  -> log Z (P,)."""
        total, draws = self.kept["log_sum"], self.kept["draws"]
        for prompt, some in zip(prompts.tolist(), log_weights.double(), strict=True):  # one may come twice
            total[prompt] = torch.logaddexp(total[prompt], some.logsumexp(-1))
            draws[prompt] += len(some)
        return (total[prompts] - draws[prompts].log()).to(log_weights.dtype)


def mixture_log_partition(log_p: Tensor, log_pi: Tensor, log_base: Tensor) -> Tensor:
    """log Z (P,) from answers (P, n), half of them drawn from the student and half from the teacher: the mean of
    P / (pi / 2 + T / 2), unbiased, and bounded by twice the largest exp(r / beta)."""
    half = torch.logaddexp(log_pi, log_base) - math.log(2)
    return (log_p - half).logsumexp(-1) - math.log(log_p.shape[-1])


def beta_of_mean_reward(rewards: Tensor, mean: float) -> float:
    """The beta at which the mean reward of T exp(r / beta), over rewards (n,) of answers of T, is `mean`: exponential
    tilting (GDC, arXiv:2012.11635, Section 2.2).

    Raises BadInput where no positive beta does it: the mean must lie between T's own and its best.
    """
    rewards = rewards.double()
    own, best = float(rewards.mean()), float(rewards.max())
    if not own < mean < best:
        raise BadInput(
            f"target-reward {mean:g}: the teacher's own mean reward is {own:.3g} and its best {best:.3g}; give a "
            "number between them"
        )
    low, high = 0.0, 1.0  # of 1 / beta

    def tilted(rate: float) -> float:
        return float(((rate * rewards).softmax(0) * rewards).sum())

    while tilted(high) < mean:
        low, high = high, 2 * high
    while high - low > BETA_TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(middle) < mean else (low, middle)
    return 1 / high
