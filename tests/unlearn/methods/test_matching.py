from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calib import BadInput
from unlearn.methods.exact import Ridge
from unlearn.methods.matching import DISTANCES, MatchingConfig, match, schedule
from unlearn.model.ensemble import Ensemble, of_module
from unlearn.model.examples import Examples, plain_examples


def rows(x: Tensor) -> Examples:
    """Labels do not matter where outputs are matched."""
    return plain_examples(x, torch.zeros(len(x), dtype=torch.long))


HOW = MatchingConfig(epochs=2, batch=4, retain_multiplier=2.0)


def test_matching_exact_targets_is_the_exact_deletion() -> None:
    """Linear heads: what block deletion predicts pins the weights, and matching finds them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g, dtype=torch.float64)
    y = x @ torch.randn(5, 2, generator=g, dtype=torch.float64) + torch.randn(40, 2, generator=g, dtype=torch.float64)
    whole = Ridge.fit(x, y, 0.5)
    exact = whole.without(x[:8], y[:8])
    heads = Ensemble(of_module(nn.Linear(5, 2, bias=False).double()), {"weight": whole.theta.mT[None].repeat(2, 1, 1)})
    options = MatchingConfig(epochs=4000, batch=100, lr=0.02, retain_multiplier=4.0, fresh=False)
    targets = (x @ exact.theta)[None].expand(2, -1, -1)
    moved = match(heads, rows(x), targets, torch.arange(8), torch.arange(8, 40), options)
    assert torch.allclose(moved.params["weight"], exact.theta.mT.expand(2, -1, -1), atol=1e-8)


def test_nothing_to_forget_is_nothing_done() -> None:
    heads = Ensemble(of_module(nn.Linear(3, 2)), {"weight": torch.randn(2, 2, 3), "bias": torch.randn(2, 2)})
    none = torch.zeros(0, dtype=torch.long)
    assert match(heads, rows(torch.randn(9, 3)), torch.randn(2, 9, 2), none, torch.arange(9), HOW) is heads


def test_each_model_goes_its_own_way() -> None:
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, 2, 4, generator=g), torch.randn(3, 2, generator=g)
    heads = Ensemble(of_module(nn.Linear(4, 2)), {"weight": weight, "bias": bias})
    x, targets = torch.randn(12, 4, generator=g), torch.randn(3, 12, 2, generator=g)
    split = torch.arange(3), torch.arange(3, 12)
    for distance in DISTANCES:
        options = replace(HOW, distance=distance)
        every = match(heads, rows(x), targets, *split, options)
        alone = match(heads[1:2], rows(x), targets[1:2], *split, options)
        assert torch.allclose(every.params["weight"][1:2], alone.params["weight"], atol=1e-6), distance


def test_an_epoch_has_all_that_is_forgotten_and_some_of_what_is_retained() -> None:
    forget, retain = torch.arange(4), torch.arange(4, 40)
    for fresh in (False, True):
        options = MatchingConfig(epochs=3, batch=5, forget_multiplier=2, retain_multiplier=3.0, fresh=fresh)
        epochs = torch.cat(schedule(forget, retain, options)).view(3, 20)
        assert all((epoch < 4).sum() == 8 and len(epoch.unique()) == 16 for epoch in epochs)
        chosen = {tuple(sorted(epoch[epoch >= 4].tolist())) for epoch in epochs}
        assert len(chosen) == (3 if fresh else 1)
        assert not torch.equal(epochs[0], epochs[0].sort().values), "mixed, not the forget set first"


def test_options_that_will_not_do() -> None:
    for wrong in ({"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"distance": "l3"}, {"retain_multiplier": -1.0}):
        with pytest.raises(BadInput):
            MatchingConfig(**wrong)  # type: ignore[arg-type]
