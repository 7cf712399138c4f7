"""The benchmark on digits, small: fifty models a side, mislabelled rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.digits import Family, Problem, Size, by_nearness, digits, family_of, scaled
from unlearn.methods.baselines import BaselineConfig, forget
from unlearn.methods.matching import MatchingConfig, match
from unlearn.methods.preference import PREFERENCE_LOSSES
from unlearn.model.training_recipe import Training


@pytest.fixture(scope="module")
def made() -> tuple[Family, Problem, torch.Tensor, torch.Tensor]:
    """-> models, the forget set, what its oracles say, and what others of them do."""
    size = Size(models=50, related=600, options=Training(epochs=10, batch=64, lr=0.1), width=(64, 24, 10))
    family, deleted = family_of(digits(), "mislabelled", size)
    problem = Problem(family, deleted)
    return family, problem, problem.oracles(1000), problem.oracles(2000)


def test_what_is_known_of_oracles_is_reached_by_matching(
    made: tuple[Family, Problem, torch.Tensor, torch.Tensor],
) -> None:
    """Doing nothing is far off, oracles are the floor, and shifting by the true mean difference comes near it, given
    directly and matched at a fifth of a retrain; NPO does not."""
    family, p, oracles, other = made
    before, (f, r) = family.before, (p.forgotten, p.retained)
    targets = before + (other.mean(0) - before.mean(0))
    options = MatchingConfig(epochs=10, batch=8, lr=1e-2, forget_multiplier=2, retain_multiplier=3.6)
    matched = match(family.originals, family.points, targets, f, r, options)
    config = BaselineConfig(epochs=10, batch=8, lr=1e-3, retain_multiplier=5)
    npo = forget(PREFERENCE_LOSSES["npo"], family.originals, family.points, f, r, config)
    said = {"nothing": before, "floor": other, "direct": targets}
    said |= {"matched": matched.logits(family.points), "npo": npo.logits(family.points)}
    found = {name: p.scores(z, oracles) for name, z in said.items()}
    mean = {name: {group: d.mean for group, d in of.items()} for name, of in found.items()}
    for group in ("forget", "retain", "validation"):
        assert mean["floor"][group] < 1.1
        assert mean["direct"][group] < 1.6 * mean["floor"][group]
        assert mean["matched"][group] < 2 * mean["floor"][group]
    attack = {name: of["forget"].attack or 0 for name, of in found.items()}
    assert mean["nothing"]["forget"] > 8 and mean["npo"]["forget"] > 2 * mean["matched"]["forget"]
    assert attack["nothing"] > 0.95 > 0.75 > attack["matched"]


def test_nearness_to_deletions_of_related_rows_predicts_this_one(
    made: tuple[Family, Problem, torch.Tensor, torch.Tensor],
) -> None:
    family, p, oracles, _ = made
    shift = by_nearness(family)
    _, quality = scaled(family, shift)
    assert quality["score, raw"] > 0.2 and 0.6 < quality["slope, raw"] < 1.7 and quality["error, raw"] < 0.9
    direct = p.scores(family.before + shift(p.deleted), oracles)
    nothing = p.scores(family.before, oracles)
    assert direct["forget"].mean < 0.6 * nothing["forget"].mean
    assert direct["retain"].mean < 0.6 * nothing["retain"].mean
