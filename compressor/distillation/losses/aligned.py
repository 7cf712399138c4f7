"""A student's states aligned with a mixture of Gaussians that a teacher's fall into.

After Align-Then-stEer, which aligns a policy's actions with a learned latent space (github.com/CloudEngineHub/
Align-Then-Steer) by a reverse KL; the form for hidden states is this toolbox's own. A teacher's states at a block, in
their leading principal components, are described by k diagonal Gaussians; the student's state there becomes a Gaussian
in the same space, by a linear map, and pays its KL from the mixture and what it fails to decode of the teacher's state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from calib.runtime.precision import upcast

LATENT = 16  # leading principal components of a teacher's states
EM_STEPS = 50
LEAST_VARIANCE = 1e-3  # of a component, where all states together have variance 1
RIDGE = 1e-3  # relative, of the first map from student to latent space


class Mixture:
    """k diagonal Gaussians: log weights (k,), means (k, d), variances (k, d)."""

    def __init__(self, log_weights: Tensor, means: Tensor, variances: Tensor) -> None:
        self.log_weights, self.means, self.variances = log_weights, means, variances

    @staticmethod
    def fitted(points: Tensor, components: int, seed: int) -> Mixture:
        """Fit by expectation maximization to points (n, d), from components around points that lie apart."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(points), (1,), generator=generator)
        centres, near = points[first], (points - points[first]).square().sum(-1)
        for _ in range(components - 1):  # each as likely as its squared distance from those before (k-means++)
            drawn = torch.multinomial(near.cpu().clamp(min=1e-12), 1, generator=generator)
            centres = torch.cat([centres, points[drawn]])
            near = torch.minimum(near, (points - points[drawn]).square().sum(-1))
        found = Mixture(
            points.new_full((components,), -math.log(components)), centres,
            points.var(0, correction=0).clamp(min=LEAST_VARIANCE).expand(components, -1),
        )  # fmt: skip
        for _ in range(EM_STEPS):
            share = found.by_component(points).softmax(-1)
            mass = share.sum(0).clamp(min=1e-6)
            means = share.mT @ points / mass[:, None]
            variances = (share.mT @ points.square() / mass[:, None] - means.square()).clamp(min=LEAST_VARIANCE)
            found = Mixture((mass / mass.sum()).log(), means, variances)
        return found

    def by_component(self, points: Tensor) -> Tensor:
        """log of weight times density (n, k) at points (n, d)."""
        apart = (points[:, None] - self.means).square() / self.variances
        return self.log_weights - (apart + (2 * math.pi * self.variances).log()).sum(-1) / 2

    def log_density(self, points: Tensor) -> Tensor:
        """log density (n,) at points (n, d)."""
        return self.by_component(points).logsumexp(-1)


class AlignedStates(nn.Module):
    """The space of a teacher's states at one block, and the student's way into it; what is learned of it is thrown away
    after training."""

    scale: Tensor
    mean: Tensor

    def __init__(self, t: Tensor, s: Tensor, components: int, seed: int) -> None:
        """Fit to a teacher's states (n, D) and a student's at the same positions (n, d).

        The student's map begins as ridge regression to the teacher's own place, so that each state starts at the
        component that its teacher's is in: reverse KL takes one mode, and between two it stays.
        """
        super().__init__()
        t, s = upcast(t.detach()), upcast(s.detach())
        self.register_buffer("mean", t.mean(0))
        self.register_buffer("scale", (t - self.mean).square().mean().sqrt().clamp(min=1e-6))
        centred = (t - self.mean) / self.scale
        size = min(LATENT, t.shape[1], len(t) - 1)
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(t))
        spread = values[-size:].clamp(min=1e-12).sqrt()
        basis = vectors[:, -size:] / spread  # to unit variance
        latent = centred @ basis
        self.mixture = Mixture.fitted(latent, components, seed)
        own = torch.cat([s, s.new_ones(len(s), 1)], 1)
        gram = own.mT @ own
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        self.way = nn.Parameter(torch.linalg.solve(gram, own.mT @ latent))  # (d + 1, size)
        left = (latent - own @ self.way.detach()).var(0, correction=0).clamp(min=LEAST_VARIANCE)
        self.log_spread = nn.Parameter(left.log() / 2)
        self.decode = nn.Parameter(vectors[:, -size:].mT * spread[:, None])

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Teacher's states (n, D), student's (n, d) -> (n,): KL from the mixture, by one draw from torch's generator,
        in nats per dimension, and the smooth L1 distance of what is decoded from the teacher's state, per channel."""
        t, s = upcast(t), upcast(s)
        place = s @ self.way[:-1] + self.way[-1]
        drawn = place + self.log_spread.exp() * torch.randn_like(place)
        entropy = (self.log_spread + 0.5 * math.log(2 * math.pi * math.e)).sum()
        kl = -entropy - self.mixture.log_density(drawn)
        missed = nn.functional.smooth_l1_loss(drawn @ self.decode, (t - self.mean) / self.scale, reduction="none")
        return kl / place.shape[-1] + missed.mean(-1)
