"""Distil a small diffusion model of handwritten digits into one step, by several f-divergences, and compare them.

python examples/one_step_generator.py [--divergences reverse-kl forward-kl js] [--steps 2000] [--seeds 3]

The teacher is a denoiser of 8 x 8 digits, whose samples take many steps. The student draws a digit in one. It learns
from the teacher's scores, from those of a score net that follows the student's own samples, and from a discriminator,
whose logit is log p / q (arXiv:2502.15681). Two figures of 1,797 samples against as many digits, in 16 principal
components: the Frechet distance, and recall, the share of digits that have a sample nearer than their third nearest
digit.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from calib.losses.divergences import GENERATORS
from calib.losses.score_distillation import score_distillation, score_weight

LEAST, MOST, SPREAD, BINS = 0.1, 10.0, 0.5, 8  # of noise; SPREAD is about that of the pixels


class Denoiser(nn.Module):
    """The digit under noise of a known level: (n, 64), (n,) -> (n, 64).  Its score is (answer - x) / level^2."""

    def __init__(self, width: int = 256, out: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out)
        )

    def raw(self, x: Tensor, level: Tensor) -> Tensor:
        scaled = x / (level.square() + SPREAD**2).sqrt()[:, None]
        return self.net(torch.cat([scaled, level.log()[:, None] / 4, torch.ones_like(level)[:, None]], 1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        whole = (level.square() + SPREAD**2)[:, None]
        return x * SPREAD**2 / whole + self.raw(x, level) * level[:, None] * SPREAD / whole.sqrt()

    def score(self, x: Tensor, level: Tensor) -> Tensor:
        return (self(x, level) - x) / level.square()[:, None]


def levels(n: int) -> tuple[Tensor, Tensor]:
    """Noise levels, even in their logarithm, and the bin of each: (n,), (n,)."""
    where = torch.rand(n)
    return LEAST * (MOST / LEAST) ** where, (where * BINS).long().clamp(max=BINS - 1)


def denoising(net: Denoiser, x: Tensor) -> Tensor:
    level, _ = levels(len(x))
    off = net(x + level[:, None] * torch.randn_like(x), level) - x
    return ((1 / level.square() + 1 / SPREAD**2)[:, None] * off.square()).mean()


def trained(net: nn.Module, loss: Callable[[Tensor], Tensor], data: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(data[torch.randint(len(data), (256,))]).backward()
        optimizer.step()


@torch.no_grad()
def sampled(net: Denoiser, n: int, steps: int = 40) -> Tensor:
    """By Heun's steps from the most noise to none, as in arXiv:2206.00364."""
    line = torch.linspace(MOST ** (1 / 7), LEAST ** (1 / 7), steps) ** 7
    x = MOST * torch.randn(n, 64)
    for now, then in pairwise(line):
        slope = -now * net.score(x, now.expand(n))
        ahead = x + (then - now) * slope
        x = x + (then - now) * (slope - then * net.score(ahead, then.expand(n))) / 2
    return net(x, line[-1].expand(n))


def generated(student: Denoiser, n: int) -> Tensor:
    """What it takes noise alone for, in one step."""
    return student(MOST * torch.randn(n, 64), torch.full((n,), MOST))


at_once = torch.no_grad()(generated)


def one_step(teacher: Denoiser, data: Tensor, divergence: str, steps: int) -> Denoiser:
    """A generator in one step, which begins as the teacher."""
    student, follower, judge = Denoiser(), Denoiser(), Denoiser(out=1)
    student.load_state_dict(teacher.state_dict())
    follower.load_state_dict(teacher.state_dict())
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.99))
        for net, lr in ((student, 2e-4), (follower, 1e-3), (judge, 1e-3))
    ]

    for _ in range(steps):
        for _ in range(2):  # what follows the student must keep up with it
            real, made = data[torch.randint(len(data), (128,))], generated(student, 128).detach()
            level, _ = levels(128)
            apart = [judge.raw(x + level[:, None] * torch.randn_like(x), level).squeeze(1) for x in (real, made)]
            losses = (denoising(follower, made), F.softplus(-apart[0]).mean() + F.softplus(apart[1]).mean())
            for optimizer, loss in zip(optimizers[1:], losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        level, bins = levels(128)
        x = generated(student, 128)
        x = x + level[:, None] * torch.randn_like(x)
        with torch.no_grad():
            s_p, s_q = teacher.score(x, level), follower.score(x, level)
            weight = score_weight(judge.raw(x, level).squeeze(1), divergence, bins) * level.square()
        optimizers[0].zero_grad()
        score_distillation(x, s_p, s_q, weight).mean().backward()
        optimizers[0].step()
    return student


def frechet(a: Tensor, b: Tensor) -> float:
    """Between Gaussians of two samples: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    (m, c), (m2, c2) = ((x.mean(0), x.T.cov()) for x in (a.double(), b.double()))
    root = torch.linalg.eigvals(c @ c2).real.clamp(min=0).sqrt().sum()
    return float((m - m2).square().sum() + c.trace() + c2.trace() - 2 * root)


def recall(real: Tensor, made: Tensor, k: int = 3) -> float:
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the digit itself
    return float((torch.cdist(real, made).amin(1) <= radius).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", nargs="+", default=["reverse-kl", "js", "forward-kl"], choices=GENERATORS)
    parser.add_argument("--steps", type=int, default=2000, help="of the student; the teacher takes four times as many")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    data = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    axes = torch.linalg.svd(data - data.mean(0), full_matrices=False)[2][:16].T
    print("maker, seed: Frechet distance, recall")
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        teacher = Denoiser()
        trained(teacher, partial(denoising, teacher), data, 4 * args.steps)
        makers = {"teacher in 40 steps": partial(sampled, teacher), "teacher in one": partial(at_once, teacher)}
        for divergence in args.divergences:
            torch.manual_seed(seed)
            makers[divergence] = partial(at_once, one_step(teacher, data, divergence, args.steps))
        for name, draw in makers.items():
            made = draw(len(data))
            print(f"{name}, {seed}: {frechet(data @ axes, made @ axes):.2f}, {recall(data @ axes, made @ axes):.1%}")


if __name__ == "__main__":
    main()
