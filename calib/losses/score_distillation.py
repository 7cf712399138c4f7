"""f-divergences of generators that are trained by scores: one-step students of diffusion models (f-distill)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib import BadInput
from calib.losses.divergences import GENERATORS, f_weight


def score_weight(log_ratio: Tensor, divergence: str, bins: Tensor | None = None, bound: float = 10.0) -> Tensor:
    """h(r) = f''(r) r^2 of samples of a generator q that learns from p, r = p / q (arXiv:2502.15681).

    Reverse KL weighs all alike; forward KL (r), JS (r / (1 + r)) and squared Hellinger (sqrt(r) / 4) weigh down what p
    hardly has, so that the generator stretches to what it leaves out.

    Args:
        log_ratio: log p(x) - log q(x) at the samples, a discriminator's logit, (n,).
        divergence: a name of `calib.losses.divergences.GENERATORS`.
        bins: which noise levels belong together, (n,) ints. Given, weights are normalised in two stages: divided by
            their mean over each bin, then clipped at `bound`. The paper normalises in two stages too; these are ours.
        bound: largest weight after normalisation.

    Returns:
        (n,), without gradient.

    Raises:
        BadInput: `divergence` is not known.
    """
    if divergence not in GENERATORS:
        raise BadInput(f"divergence: {divergence!r} is not known; use one of {', '.join(GENERATORS)}")
    weight = f_weight(GENERATORS[divergence], log_ratio.detach().double().clamp(-30, 30).exp())
    most = torch.finfo(log_ratio.dtype).max  # r is beyond what half precision holds
    if bins is None:
        return weight.clamp(max=most).to(log_ratio.dtype)
    _, place = bins.unique(return_inverse=True)
    count = torch.bincount(place)
    mean = torch.zeros(len(count), dtype=weight.dtype, device=weight.device).index_add(0, place, weight) / count
    return (
        (weight / mean[place].clamp(min=torch.finfo(weight.dtype).tiny)).clamp(max=min(bound, most)).to(log_ratio.dtype)
    )


def score_distillation(x: Tensor, score_p: Tensor, score_q: Tensor, weight: Tensor) -> Tensor:
    """Make a loss of samples x, on which their generator brings its distribution q nearer to p by an f-divergence.

    Its gradient by the generator's parameters, averaged over samples, is that of D_f(p || q) = E_q f(p / q):
    E h(r) (s_q - s_p) dx / dtheta (arXiv:2502.15681, Theorem 1). The value itself means nothing.

    Args:
        x: samples with their gradient to the generator, (n, ...).
        score_p: gradient of log p by x at x, of the teacher, like x.
        score_q: the same of the generator's own distribution, as a small score net fitted to its samples knows it.
        weight: h(r) of each sample (`score_weight`), (n,).

    Returns:
        (n,).
    """
    pull = (score_q - score_p).detach().flatten(1) * weight.detach().reshape(len(x), 1)
    return (x.flatten(1) * pull).sum(1)
