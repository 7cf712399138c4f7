from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib import BadInput
from unlearn.audit.klom import gaussian_klom, klom, klom_summaries, lira
from unlearn.model.margins import margins

seeds = st.integers(0, 10_000)


def normal(seed: int, models: int, examples: int = 5) -> Tensor:
    return torch.randn(models, examples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_klom(p: list[float], q: list[float]) -> float:
    """One example, 20 bins, by loops."""
    p, q = ([min(max(m, -100.0), 100.0) for m in side] for side in (p, q))
    low, high = min(p + q), max(p + q)
    high = low + 1 if high == low else high
    counts = [[0] * 20, [0] * 20]
    for side, values in enumerate((p, q)):
        for value in values:
            counts[side][min(int((value - low) / (high - low) * 20), 19)] += 1
    shares = [[c / len(side) for c in found] for found, side in zip(counts, (p, q), strict=True)]
    return sum(a * math.log(a / max(b, 1e-5)) for a, b in zip(*shares, strict=True) if a > 0)


@given(seeds, st.integers(50, 80), st.integers(50, 80))
def test_klom_against_plain_loops(seed: int, n: int, m: int) -> None:
    p, q = normal(seed, n), 2 * normal(seed + 1, m) + 0.5
    expected = [plain_klom(p[:, i].tolist(), q[:, i].tolist()) for i in range(5)]
    assert klom(p, q).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seeds)
def test_identical_sets_score_zero_in_any_order(seed: int) -> None:
    p = normal(seed, 60)
    assert klom(p, p.flip(0)).abs().max() == 0
    assert gaussian_klom(p, p.flip(0)).abs().max() < 1e-12


def test_disjoint_sets_score_the_log_of_the_floor_and_published_code_calls_them_equal() -> None:
    """All unlearned margins at the greatest of both sets: bins that are open at the end count none of them."""
    p, q = torch.full((100, 1), 100.0), torch.zeros(100, 1)
    assert klom(p, q).item() == pytest.approx(math.log(1e5))
    assert klom(torch.full((100, 1), 1e30), q).item() == pytest.approx(math.log(1e5)), "clipped"
    edges = torch.linspace(0, 100, 21, dtype=torch.float64)
    index = torch.bucketize(p.double().flatten(), edges, right=True)
    assert not ((index >= 1) & (index <= 20)).any(), "as published: nothing is counted, the score is 0"


def test_the_direction() -> None:
    """Narrow unlearned margins against wide ones of oracles, and the other way round."""
    narrow, wide = 0.2 * normal(0, 100, 4000), normal(1, 100, 4000)
    assert klom(narrow, wide).mean().item() == pytest.approx(1.13, abs=0.05)
    assert klom(wide, narrow).mean().item() == pytest.approx(4.40, abs=0.2)
    narrow, wide = 0.2 * normal(0, 20_000, 1), normal(1, 20_000, 1)
    assert gaussian_klom(narrow, wide).item() == pytest.approx(math.log(5) + 0.04 / 2 - 0.5, abs=0.02)


@pytest.mark.parametrize(
    ("models", "mean", "upper"), [(50, 0.85, 1.68), (100, 0.34, 0.65), (200, 0.14, 0.27), (500, 0.05, 0.09)]
)
def test_the_noise_floor(models: int, mean: float, upper: float) -> None:
    """Of two sets from one distribution: never zero, and less with more models."""
    scores = klom(normal(1, models, 4000), normal(2, models, 4000))
    assert scores.mean().item() == pytest.approx(mean, rel=0.1)
    assert scores.quantile(0.95).item() == pytest.approx(upper, rel=0.1)


@pytest.mark.parametrize(("models", "mean", "upper"), [(5, 0.93, 2.9), (10, 0.28, 0.89), (20, 0.12, 0.38)])
def test_the_noise_floor_of_the_gaussian_estimator(models: int, mean: float, upper: float) -> None:
    scores = gaussian_klom(normal(1, models, 20_000), normal(2, models, 20_000))
    assert scores.mean().item() == pytest.approx(mean, rel=0.1)
    assert scores.quantile(0.95).item() == pytest.approx(upper, rel=0.1)


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_unit_nor_origin_counts(seed: int, scale: float, shift: float) -> None:
    p, q = normal(seed, 50), normal(seed + 1, 60)
    assert torch.allclose(gaussian_klom(scale * p + shift, scale * q + shift), gaussian_klom(p, q), rtol=1e-6)
    assert (klom(p, q) >= -1e-3).all() and (klom(p, q) <= math.log(1e5)).all()


@given(seeds)
def test_margins_are_log_odds(seed: int) -> None:
    logits = 3 * normal(seed, 4, 6)
    labels = torch.tensor([0, 5, 2, 1])
    p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    assert torch.allclose(margins(logits, labels), (p / (1 - p)).log(), atol=1e-9)
    assert torch.allclose(margins(logits[None].expand(3, -1, -1) + 7, labels)[1], margins(logits, labels), atol=1e-9)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(BadInput, match=r"49 models are too few .* Gaussian"):
        klom(normal(0, 49), normal(1, 100))
    broken = normal(0, 60)
    broken[7, 3] = math.nan
    for score in (klom, gaussian_klom):
        for pair in ((broken, normal(1, 60)), (normal(1, 60), broken)):
            with pytest.raises(BadInput, match="model 7 has nan at example 3"):
                score(*pair)
    with pytest.raises(BadInput, match="at least two"):
        gaussian_klom(normal(0, 1), normal(1, 5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_broke_is_an_error_and_not_a_score(value: float) -> None:
    """A run whose outputs were NaN once scored 0 and won."""
    p, q = normal(0, 60), normal(1, 60)
    p[7, 2] = value
    for measure in (klom, gaussian_klom, lira):
        with pytest.raises(BadInput, match=rf"model 7 has {value} at example 2"):
            measure(p, q)


def plain_lira(p: list[float], q: list[float]) -> float:
    """One example: each margin judged by normal distributions fitted to all others."""
    right = 0.0
    for own, other in ((p, q), (q, p)):
        for i, x in enumerate(own):
            rest = NormalDist.from_samples(own[:i] + own[i + 1 :])
            right += rest.pdf(x) > NormalDist.from_samples(other).pdf(x)
    return right / 2 / len(p)


@given(seeds, st.floats(0, 3))
def test_lira_against_plain_loops(seed: int, shift: float) -> None:
    p, q = normal(seed, 12, 3), normal(seed + 1, 12, 3) * 1.3 + shift
    expected = [plain_lira(p[:, i].tolist(), q[:, i].tolist()) for i in range(3)]
    assert lira(p, q).tolist() == pytest.approx(expected)


def test_an_attacker_is_blind_to_equal_sets_and_sees_disjoint_ones() -> None:
    p = normal(0, 400, 20)
    assert lira(p, normal(1, 400, 20)).mean().item() == pytest.approx(0.5, abs=0.02)
    assert lira(p, normal(1, 400, 20) + 20).min() == 1
    one = lira(p, normal(1, 400, 20) + 1).mean().item()
    assert one == pytest.approx(NormalDist().cdf(0.5), abs=0.02), "what the best attacker can do"
    with pytest.raises(BadInput, match="at least three on each side"):
        lira(p[:2], p)


def test_distances_by_group() -> None:
    p, q = normal(0, 60, 10), normal(1, 60, 10)
    p[:, :4] += 50
    groups = {"forget": torch.arange(4), "retain": torch.arange(4, 10), "validation": torch.arange(0)}
    found = klom_summaries(p, q, groups, binned=True)
    assert list(found) == ["forget", "retain"]
    assert found["forget"].mean == pytest.approx(klom(p, q)[:4].mean().item())
    assert found["retain"].p95 == pytest.approx(klom(p, q)[4:].quantile(0.95).item())
    assert (
        found["retain"].p50
        <= found["retain"].p95
        <= found["retain"].p99
        == pytest.approx(klom(p, q)[4:].quantile(0.99).item())
    )
    assert found["forget"].attack == 1 == found["forget"].attack_p95
    assert found["retain"].attack == pytest.approx(lira(p, q)[4:].mean().item())
    gaussian = klom_summaries(p[:4], q[:4], groups, binned=False)["retain"]
    assert gaussian.p95 == gaussian.gaussian_p95 == pytest.approx(gaussian_klom(p[:4], q[:4])[4:].quantile(0.95).item())
