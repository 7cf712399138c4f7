from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib import BadInput
from unlearn.datamodels.datamodel import Datamodel, GaussianProcessConfig, fidelity, gp_weights, regress, shares, spread
from unlearn.methods.exact import Ridge
from unlearn.model.ensemble import subsets


def planted(rows: int = 30) -> Datamodel:
    return Datamodel(torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("lasso", [False, True])
def test_planted_weights_are_found(lasso: bool) -> None:
    truth, deleted = planted(), ~subsets(400, 30, 0.7, seed=1)
    outputs = truth.change(deleted) + 5.0  # whatever the full model says
    found = regress(deleted, outputs, penalty=1e-6, lasso=lasso)
    assert torch.allclose(found.weights, truth.weights, atol=1e-3)


def test_a_change_is_a_sum_over_what_goes() -> None:
    truth, deleted = planted(), torch.zeros(30, dtype=torch.bool)
    deleted[[3, 9]] = True
    assert torch.allclose(truth.change(deleted), -(truth.weights[3] + truth.weights[9]))
    assert torch.equal(truth.change(~deleted[None].expand(2, -1) & False), torch.zeros(2, 4, 2, dtype=torch.float64))


def test_a_rank_correlation_is_blind_to_the_scale_and_the_slope_is_not() -> None:
    truth, deleted = planted(), ~subsets(50, 30, 0.7, seed=2)
    right = truth.fidelity(deleted, truth.change(deleted))
    assert right.score == pytest.approx(1) == right.slope == right.cosine and right.error == pytest.approx(0, abs=1e-12)
    half = Datamodel(0.5 * truth.weights).fidelity(deleted, truth.change(deleted))
    assert half.score == pytest.approx(1) == half.cosine and half.slope == pytest.approx(2)
    assert half.error == pytest.approx(0.5)
    nothing = fidelity(torch.zeros(50, 4, 2), truth.change(deleted))
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
            deleted = ~subsets(40, 300, 0.9, seed=99)
            true = torch.stack([x @ (whole.without(x[g], y[g]).theta - whole.theta) for g in deleted])
            slopes[share].append(model.fidelity(deleted, true).slope)
            errors[share].append(model.fidelity(deleted, true).error)
    mean = {share: sum(values) / 3 for share, values in slopes.items()}
    assert 0.45 < mean[0.5] < 0.62 and 0.9 < mean[0.9] < 1.02
    assert max(errors[0.9]) < 0.25 < 0.6 < min(errors[0.5])


FORGET = torch.tensor([2, 5, 6, 11])


def covariance(a: Tensor, b: Tensor, row: int | None, config: GaussianProcessConfig) -> float:
    """Of two deletions bool (n,), at a row of the forget set or elsewhere; as it is defined."""
    both = (a & b).double()
    found = config.offset + both.sum() / len(FORGET) + config.bend * both[FORGET].mean() ** config.power
    return float(found + (config.own * both[row] if row is not None else 0))


@pytest.mark.parametrize("own", [0.0, 0.7])
def test_nearby_is_a_gaussian_process_with_that_covariance(own: float) -> None:
    options, deleted = GaussianProcessConfig(own=own, noise=0.3, fewest=1), ~subsets(30, 20, 0.6, seed=3)
    deleted[4, FORGET] = True  # so that the bend is trusted
    asked = torch.zeros(20, dtype=torch.bool)
    asked[FORGET] = True
    elsewhere, inside = gp_weights(deleted, FORGET, options)
    for row, found in [(None, elsewhere), *zip(FORGET.tolist(), inside.mT, strict=True)]:
        alike = torch.tensor([[covariance(a, b, row, options) for b in deleted] for a in deleted], dtype=torch.float64)
        wanted = torch.tensor([covariance(a, asked, row, options) for a in deleted], dtype=torch.float64)
        assert torch.allclose(found, torch.linalg.solve(alike + 0.3 * torch.eye(30), wanted), atol=1e-9)


def test_a_deletion_that_was_seen_is_what_is_predicted() -> None:
    deleted = ~subsets(12, 20, 0.7, seed=1)
    deleted[7] = False
    deleted[7, FORGET] = True
    elsewhere, inside = gp_weights(deleted, FORGET, GaussianProcessConfig(noise=1e-9))
    exact = torch.nn.functional.one_hot(torch.tensor(7), 12).double()
    assert torch.allclose(elsewhere, exact, atol=1e-5) and torch.allclose(
        inside, exact[:, None].expand(-1, 4), atol=1e-5
    )


def test_without_a_bend_it_is_ridge_regression_on_rows() -> None:
    """With an offset that is free, as `regress` takes off means."""
    truth, deleted = planted(20), ~subsets(50, 20, 0.7, seed=2)
    outputs = truth.change(deleted) + torch.randn(
        50, 4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    noise = 0.5
    elsewhere, _ = gp_weights(deleted, FORGET, GaussianProcessConfig(bend=0.0, noise=noise, offset=1e7))
    penalty = noise * len(FORGET) / (50 * float(deleted.double().var(0).mean()))
    asked = torch.zeros(20, dtype=torch.bool)
    asked[FORGET] = True
    model = regress(deleted, outputs, penalty=penalty)
    away = asked.double() - deleted.double().mean(0)
    expected = outputs.mean(0) - torch.tensordot(away, model.weights, 1)
    assert torch.allclose(torch.tensordot(elsewhere, outputs, 1), expected, atol=1e-4)


def test_rows_that_stand_in_for_each_other() -> None:
    """Nothing changes until nine tenths of them are gone: additive weights see a share of it, a bend nearly all."""
    g, forget = torch.Generator().manual_seed(0), torch.arange(20)
    deleted = ~subsets(300, 60, 0.8, seed=4)
    for mask in deleted[:100]:
        mask[forget] = torch.rand(20, generator=g) < float(torch.rand((), generator=g)) * 1.2
    changes = (shares(deleted, forget) ** 8)[:, None, None]
    asked = torch.zeros(60, dtype=torch.bool)
    asked[forget] = True
    linear = regress(deleted, changes, penalty=1e-3)
    change = torch.tensordot(gp_weights(deleted, forget, GaussianProcessConfig(bend=5.0, noise=0.01))[0], changes, 1)
    assert linear.change(asked).item() < 0.85 < 0.9 < change.item() < 1.1


def test_a_power_is_not_carried_to_where_nothing_was_seen() -> None:
    deleted = ~subsets(50, 20, 0.7, seed=6)
    assert int((shares(deleted, FORGET) >= 0.9).sum()) < 10
    assert torch.equal(
        gp_weights(deleted, FORGET, GaussianProcessConfig(bend=9.0))[0],
        gp_weights(deleted, FORGET, GaussianProcessConfig(bend=0.0))[0],
    )


def test_the_spread_of_answers_that_nothing_holds_together_any_more() -> None:
    g = torch.Generator().manual_seed(0)
    deleted = torch.zeros(90, 20, dtype=torch.bool)
    deleted[:60, FORGET] = True
    before = torch.randn(50, 4, 3, generator=g)
    said = torch.randn(90, 4, 3, generator=g) * torch.where(shares(deleted, FORGET) > 0, 4.0, 1.0)[:, None, None]
    found = spread(deleted, said, before, FORGET)
    assert found.shape == (4, 3) and found.mean().item() == pytest.approx(2, abs=0.2), "the root of the ratio"
    assert torch.equal(spread(deleted[50:], said[50:], before, FORGET), torch.ones(4, 3)), "ten are too few"
