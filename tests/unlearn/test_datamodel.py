from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib import BadInput
from unlearn.datamodel import Datamodel, fidelity, regress
from unlearn.ensemble import subsets
from unlearn.exact import Ridge


def planted(rows: int = 30) -> Datamodel:
    return Datamodel(torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("lasso", [False, True])
def test_planted_weights_are_found(lasso: bool) -> None:
    truth, gone = planted(), ~subsets(400, 30, 0.7, seed=1)
    outputs = truth.change(gone) + 5.0  # whatever the full model says
    found = regress(gone, outputs, penalty=1e-6, lasso=lasso)
    assert torch.allclose(found.weights, truth.weights, atol=1e-3)


def test_a_change_is_a_sum_over_what_goes() -> None:
    truth, gone = planted(), torch.zeros(30, dtype=torch.bool)
    gone[[3, 9]] = True
    assert torch.allclose(truth.change(gone), -(truth.weights[3] + truth.weights[9]))
    assert torch.equal(truth.change(~gone[None].expand(2, -1) & False), torch.zeros(2, 4, 2, dtype=torch.float64))


def test_a_rank_correlation_is_blind_to_the_scale_and_the_slope_is_not() -> None:
    truth, gone = planted(), ~subsets(50, 30, 0.7, seed=2)
    right = truth.fidelity(gone, truth.change(gone))
    assert right.score == pytest.approx(1) == right.slope == right.cosine and right.error == pytest.approx(0, abs=1e-12)
    half = Datamodel(0.5 * truth.weights).fidelity(gone, truth.change(gone))
    assert half.score == pytest.approx(1) == half.cosine and half.slope == pytest.approx(2)
    assert half.error == pytest.approx(0.5)
    nothing = fidelity(torch.zeros(50, 4, 2), truth.change(gone))
    assert nothing.error == pytest.approx(1) and nothing.score == 0


def test_one_deletion_cannot_be_ranked() -> None:
    with pytest.raises(BadInput, match="hold out at least two"):
        fidelity(torch.zeros(1, 3), torch.zeros(1, 3))


def ridge(seed: int, rows: int = 300, width: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    y = x @ torch.randn(width, 1, generator=g, dtype=torch.float64)
    return x, y + torch.randn(rows, 1, generator=g, dtype=torch.float64)


def test_weights_from_half_of_the_data_are_twice_too_large_and_near_the_full_set_they_are_right() -> None:
    """Ridge, where the deletion of 30 of 300 rows is known: slope of truth on prediction, and relative error."""
    slopes: dict[float, list[float]] = {0.5: [], 0.9: []}
    errors: dict[float, list[float]] = {0.5: [], 0.9: []}
    for seed in range(3):
        x, y = ridge(seed)
        whole = Ridge.fit(x, y, 1.0)
        for share in slopes:
            masks = subsets(3000, 300, share, seed=seed)
            said = torch.stack([x @ Ridge.fit(x[m], y[m], 1.0).theta for m in masks])
            model = regress(~masks, said, penalty=1e-6)
            gone = ~subsets(40, 300, 0.9, seed=99)
            true = torch.stack([x @ (whole.without(x[g], y[g]).theta - whole.theta) for g in gone])
            slopes[share].append(model.fidelity(gone, true).slope)
            errors[share].append(model.fidelity(gone, true).error)
    mean = {share: sum(values) / 3 for share, values in slopes.items()}
    assert 0.45 < mean[0.5] < 0.62 and 0.9 < mean[0.9] < 1.02
    assert max(errors[0.9]) < 0.25 < 0.6 < min(errors[0.5])
