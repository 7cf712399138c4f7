"""States aligned with a mixture, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.distillation.losses.aligned import LATENT, AlignedStates, Mixture


def clusters(n: int, d: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States (n, d) around k centres far apart, and which centre each is of (n,)."""
    g = torch.Generator().manual_seed(seed)
    centres, of = 6 * torch.randn(k, d, generator=g), torch.randint(k, (n,), generator=g)
    return centres[of] + 0.5 * torch.randn(n, d, generator=g), of


def test_a_mixture_finds_clusters_that_lie_apart() -> None:
    points, of = clusters(2000, 4, 3)
    found = Mixture.fitted(points.double(), 3, seed=0)
    labels = found.by_component(points.double()).argmax(-1)
    for centre in range(3):
        of_centre = labels[of == centre]
        assert (of_centre == of_centre[0]).all()
        own = int(of_centre[0])
        assert torch.allclose(found.means[own].float(), points[of == centre].mean(0), atol=1e-3)
        assert torch.allclose(found.variances[own].float(), points[of == centre].var(0, correction=0), atol=1e-2)
        assert float(found.log_weights[own].exp()) == pytest.approx(float((of == centre).float().mean()), abs=1e-3)
    assert float(found.log_weights.exp().sum()) == pytest.approx(1)


def test_the_density_of_one_component_is_the_library_s() -> None:
    points = torch.randn(50, 3, dtype=torch.float64)
    found = Mixture.fitted(points, 1, seed=0)
    normal = torch.distributions.Normal(points.mean(0), points.std(0, correction=0))
    assert torch.allclose(found.log_density(points), normal.log_prob(points).sum(-1))


@torch.no_grad()
def test_against_one_component_the_loss_is_the_closed_form_of_two_gaussians() -> None:
    """The mean over draws: KL of Gaussians per dimension, and the smooth L1 of what is decoded."""
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(400, 20, generator=g, dtype=torch.float64), torch.randn(400, 6, generator=g, dtype=torch.float64)
    aligned = AlignedStates(t, s, 1, seed=0)
    place = s @ aligned.way[:-1] + aligned.way[-1]
    q = torch.distributions.Normal(place, aligned.log_spread.exp().expand_as(place))
    p = torch.distributions.Normal(aligned.mixture.means[0], aligned.mixture.variances[0].sqrt())
    expected = torch.distributions.kl_divergence(q, p).mean(-1)
    torch.manual_seed(0)
    many = torch.stack([aligned(t, s) for _ in range(600)])
    decoded = torch.stack([
        torch.nn.functional.smooth_l1_loss(q.sample() @ aligned.decode, (t - aligned.mean) / aligned.scale,
                                           reduction="none").mean(-1) for _ in range(600)
    ])  # fmt: skip
    error = (many.std(0) / math.sqrt(600)).mean() + (decoded.std(0) / math.sqrt(600)).mean()
    assert torch.allclose(many.mean(0) - decoded.mean(0), expected, atol=6 * float(error))


def test_a_student_starts_in_its_teacher_s_component() -> None:
    """From between the components reverse KL goes nowhere; from the regression each state starts in the right one."""
    t, _ = clusters(3000, 24, 5)
    s = t @ torch.randn(24, 10, generator=torch.Generator().manual_seed(1)) + 3.0
    aligned = AlignedStates(t, s, 5, seed=0)
    latent = ((t - aligned.mean) / aligned.scale) @ torch.linalg.pinv(aligned.decode)
    place = s @ aligned.way[:-1] + aligned.way[-1]
    same = aligned.mixture.by_component(place).argmax(-1) == aligned.mixture.by_component(latent).argmax(-1)
    assert same.float().mean() > 0.95
    assert aligned.decode.shape == (LATENT, 24)


def test_the_teacher_s_own_states_decode_better_than_others_and_descent_helps() -> None:
    t, _ = clusters(500, 12, 3)
    s = (t @ torch.randn(12, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
    aligned = AlignedStates(t, s, 3, seed=0)
    torch.manual_seed(0)
    before = aligned(t, s).mean()
    assert before < aligned(t.flip(0), s.flip(0)[torch.randperm(500)]).mean()
    optimizer = torch.optim.SGD([s], lr=50.0)
    for _ in range(50):
        optimizer.zero_grad()
        aligned(t, s).mean().backward()
        optimizer.step()
    assert aligned(t, s).mean() < before


def test_few_and_equal_states_are_no_trouble() -> None:
    for t in (torch.ones(5, 30), torch.randn(3, 30), torch.zeros(40, 4)):
        s = torch.randn(len(t), 6)
        assert AlignedStates(t, s, 1, seed=0)(t, s).isfinite().all()
