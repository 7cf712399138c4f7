"""Targets and pseudo-rewards, by enumerating every sequence of three tokens out of four."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib import BadInput
from compressor.on_policy.options import F_DIVERGENCES
from compressor.on_policy.policy import policy_loss
from compressor.on_policy.targets import (
    F_PRIMES,
    LogPartition,
    beta_of_mean_reward,
    log_target,
    mixture_log_partition,
    pseudo_rewards,
)

TOKENS, LENGTH = 4, 3
SEQUENCES = torch.tensor(list(product(range(TOKENS), repeat=LENGTH)))
# f of each D_f(pi || p) = E_p f(pi / p), whose derivatives F_PRIMES are.
GENERATORS = {
    "forward-kl": lambda t: -t.log(),
    "reverse-kl": lambda t: t * t.log(),
    "total-variation": lambda t: (t - 1).abs() / 2,
    "js": lambda t: t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log(),
    "chi-square": lambda t: t + 1 / t - 2,
    "reverse-chi-square": lambda t: (t - 1).square(),
}


class Chain:
    """Each next token depends on the last two, by a table of logits."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.table = torch.randn(TOKENS + 1, TOKENS + 1, TOKENS, generator=g, dtype=torch.float64).requires_grad_()

    def log_prob(self, rows: Tensor) -> Tensor:
        """rows (n, 3) -> (n,)."""
        start = torch.full((len(rows), 2), TOKENS)
        whole = torch.cat([start, rows], 1)
        log_q = self.table.log_softmax(-1)
        return torch.stack(
            [log_q[whole[:, i], whole[:, i + 1], whole[:, i + 2]] for i in range(LENGTH)]
        ).sum(0)  # fmt: skip


@pytest.fixture(scope="module")
def chains() -> tuple[Chain, Chain, Tensor]:
    """A student, a teacher, and the reward of every sequence."""
    return Chain(0), Chain(1), (SEQUENCES.sum(1) % 3 == 0).double()


def test_the_names_are_those_of_the_command_line() -> None:
    assert tuple(F_PRIMES) == F_DIVERGENCES == tuple(GENERATORS)


@pytest.mark.parametrize("name", F_DIVERGENCES)
@given(log_t=st.floats(-6, 6).filter(lambda x: abs(x) > 1e-3))
def test_derivatives(name: str, log_t: float) -> None:
    t = torch.tensor(log_t, dtype=torch.float64).exp().requires_grad_()
    (slope,) = torch.autograd.grad(GENERATORS[name](t), t)
    assert float(F_PRIMES[name](t.detach().log())) == pytest.approx(float(slope), rel=1e-9, abs=1e-12)
    if name in ("js", "total-variation"):
        assert F_PRIMES[name](t.detach().log()) <= math.log(2)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_expected_gradient_of_the_loss_is_that_of_the_divergence(
    name: str, chains: tuple[Chain, Chain, Tensor]
) -> None:
    """Theorem 1 of f-DPG, with the baseline, over all 4,096 groups of two answers."""
    student, teacher, reward = chains
    log_pi = student.log_prob(SEQUENCES)
    log_p = log_target(teacher.log_prob(SEQUENCES).detach(), reward, 0.7)
    log_z = log_p.logsumexp(0)
    divergence = ((log_p - log_z).exp() * GENERATORS[name]((log_pi - log_p + log_z).exp())).sum()
    (expected,) = torch.autograd.grad(divergence, student.table, retain_graph=True)
    drawn = torch.cartesian_prod(torch.arange(len(SEQUENCES)), torch.arange(len(SEQUENCES)))
    chance = log_pi.detach().exp()[drawn].prod(-1)
    credit, clamped = pseudo_rewards(log_pi.detach()[drawn], log_p[drawn], log_z.expand(len(drawn)), name)
    assert not clamped.any()
    value = policy_loss(log_pi[drawn], log_pi[drawn].detach(), credit, torch.zeros_like(credit)).mean(-1)
    (found,) = torch.autograd.grad((chance * value).sum(), student.table)
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_objective_is_a_divergence_from_the_posterior(chains: tuple[Chain, Chain, Tensor]) -> None:
    """E r - beta KL(pi || T) = beta log Z - beta KL(pi || p*), for any policy; and p* is its only optimum."""
    student, teacher, reward = chains
    beta, log_t = 0.3, teacher.log_prob(SEQUENCES).detach()
    log_p = log_target(log_t, reward, beta)
    log_z = log_p.logsumexp(0)
    for log_pi in (student.log_prob(SEQUENCES).detach(), log_t, log_p - log_z):
        pi = log_pi.exp()
        objective = (pi * reward).sum() - beta * (pi * (log_pi - log_t)).sum()
        apart = (pi * (log_pi - log_p + log_z)).sum()
        assert float(objective) == pytest.approx(float(beta * log_z - beta * apart), abs=1e-12)
    logits = (log_p - log_z).clone().requires_grad_()
    log_pi = logits.log_softmax(0)
    objective = (log_pi.exp() * reward).sum() - beta * (log_pi.exp() * (log_pi - log_t)).sum()
    (slope,) = torch.autograd.grad(objective, logits)
    assert slope.abs().max() < 1e-12


def test_a_small_beta_leaves_the_best_answers_as_the_teacher_weighs_them(chains: tuple[Chain, Chain, Tensor]) -> None:
    _, teacher, reward = chains
    log_t = teacher.log_prob(SEQUENCES).detach()
    verified = log_target(log_t, reward, None).softmax(0)
    assert torch.allclose(log_target(log_t, reward, 1e-3).softmax(0), verified, atol=1e-12)
    assert not verified[reward == 0].any()


def test_the_partition_function_is_found_in_draws(chains: tuple[Chain, Chain, Tensor]) -> None:
    student, teacher, reward = chains
    log_pi, log_t = student.log_prob(SEQUENCES).detach(), teacher.log_prob(SEQUENCES).detach()
    log_p, g = log_target(log_t, reward, 0.5), torch.Generator().manual_seed(0)
    partition, prompts = LogPartition(3), torch.tensor([2, 0])
    for _ in range(40):
        drawn = torch.multinomial(log_pi.exp(), 4000, replacement=True, generator=g).view(2, -1)
        found = partition.update(prompts, (log_p - log_pi)[drawn])
    assert torch.allclose(found, log_p.logsumexp(0), atol=0.06) and partition.kept["draws"].tolist() == [8e4, 0, 8e4]
    mine = torch.multinomial(log_pi.exp(), 40_000, replacement=True, generator=g)
    theirs = torch.multinomial(log_t.exp(), 40_000, replacement=True, generator=g)
    both = torch.cat([mine, theirs])[None]
    mixed = mixture_log_partition(log_p[both], log_pi[both], log_t[both])
    assert float(mixed) == pytest.approx(float(log_p.logsumexp(0)), abs=0.02)


def test_what_has_no_mass_yet_teaches_nothing_and_what_has_none_at_all_is_pushed_away() -> None:
    log_pi, log_p = torch.full((2, 3), -2.0), torch.full((2, 3), -math.inf)
    log_p[1, 0] = -2.0
    log_z = torch.tensor([-math.inf, -1.0])
    for name in F_DIVERGENCES:
        gain, clamped = pseudo_rewards(log_pi, log_p, log_z, name)
        assert gain.isfinite().all() and not gain[0].any(), name
        assert gain[1, 0] > gain[1, 1] and clamped[1].tolist() == [False, True, True], name


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=9), st.floats(0.05, 0.95))
def test_beta_gives_the_mean_reward(rewards: list[float], share: float) -> None:
    some = torch.tensor(rewards, dtype=torch.float64)
    mean = float(some.mean() + share * (some.max() - some.mean()))
    if not float(some.mean()) + 1e-3 < mean < float(some.max()) - 1e-3:
        return
    beta = beta_of_mean_reward(some, mean)
    assert float(((some / beta).softmax(0) * some).sum()) == pytest.approx(mean, abs=1e-6)


def test_a_mean_reward_that_no_beta_gives_is_refused() -> None:
    for mean in (0.2, 1.0, 3.0):
        with pytest.raises(BadInput, match=r"own mean reward is 0.25 and its best 1; give a number between them"):
            beta_of_mean_reward(torch.tensor([0.0, 0.0, 0.0, 1.0]), mean)
