from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from calib import BadInput
from tests.drawn import pair, targets
from unlearn.baselines import BASELINES, Rows, Tuning, as_before, astray, away, forget, npo, simnpo, towards
from unlearn.ensemble import Ensemble, Training, initial, train

seeds = st.integers(0, 10_000)
LOSSES = {"away": away, "towards": towards, "npo": npo, "simnpo": simnpo, "astray": astray, "as_before": as_before}


def rows(seed: int) -> Rows:
    now, before = pair(seed)
    return Rows(now, before, targets(seed))


def gradient(loss: object, some: Rows) -> Tensor:
    now = some.now.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(replace(some, now=now)), now)  # type: ignore[operator]
    return found


@given(seeds, st.floats(0.05, 3))
def test_npo_and_simnpo_against_plain_loops(seed: int, beta: float) -> None:
    some = rows(seed)
    now, before = some.nats.tolist(), some.nats_before.tolist()
    bound = [2 / beta * math.log1p(math.exp(-beta * (a - b))) for a, b in zip(now, before, strict=True)]
    assert npo(some, beta).item() == pytest.approx(sum(bound) / 4)
    plain = [2 / beta * math.log1p(math.exp(-beta * (a - 0.5))) for a in now]
    assert simnpo(some, beta, 0.5).item() == pytest.approx(sum(plain) / 4)


@given(seeds)
def test_npo_begins_as_ascent_and_then_lets_go(seed: int) -> None:
    """Where nothing has moved yet their gradients are equal; where a row is forgotten NPO's has vanished."""
    some = rows(seed)
    still = replace(some, before=some.now)
    assert torch.allclose(gradient(npo, still), gradient(away, still), atol=1e-12)
    far = replace(some, now=some.now - 50 * nn.functional.one_hot(some.labels, 9))
    assert gradient(lambda r: npo(r, 1.0), far).norm() < 1e-3 * gradient(away, far).norm()


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds, constants=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_a_constant_added_to_logits_changes_nothing(name: str, seed: int, constants: tuple[float, float]) -> None:
    """Published code takes NPO and its KL of raw logits, without a softmax: there it changes everything."""
    some = rows(seed)
    moved = replace(some, now=some.now + constants[0], before=some.before + constants[1])
    assert torch.allclose(LOSSES[name](moved), LOSSES[name](some), rtol=1e-9, atol=1e-9)


@given(seeds)
def test_what_is_kept_as_before_has_no_pull_from_its_divergence(seed: int) -> None:
    some = rows(seed)
    still = replace(some, before=some.now)
    assert gradient(astray, still).abs().max() < 1e-12
    assert torch.allclose(gradient(as_before, still), gradient(towards, still), atol=1e-12)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def trained() -> tuple[Ensemble, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = x[:, :3].argmax(-1)
    y[:10] = (y[:10] + 1) % 3  # mislabelled, and learned by heart
    masks = torch.ones(3, 60, dtype=torch.bool)
    return train(initial(make, range(3)), x, y, masks, range(3), Training(epochs=150, batch=20, lr=0.2)), x, y


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_does_what_it_says(name: str, trained: tuple[Ensemble, Tensor, Tensor]) -> None:
    """One published SCRUB never moves its student."""
    models, x, y = trained
    gone, kept = torch.arange(10), torch.arange(10, 60)
    how = Tuning(epochs=12, batch=5, lr=1e-2, retain_multiplier=4.0)
    moved = forget(name, models, x, y, gone, kept, how)

    def nats(ensemble: Ensemble, some: Tensor) -> Tensor:
        said = ensemble.logits(x[some]).log_softmax(-1)
        return -said.gather(-1, y[some].expand(3, -1)[..., None]).mean((1, 2))

    if BASELINES[name].forget is not None:
        assert (nats(moved, gone) > nats(models, gone) + 0.3).all()
    if BASELINES[name].retain is not None:
        assert (nats(moved, kept) < nats(models, kept) + 0.3).all()
    assert all(not torch.equal(p, moved.params[parameter]) for parameter, p in models.params.items())
    alone = forget(name, models[1:2], x, y, gone, kept, how)
    assert torch.allclose(alone.params["0.weight"][0], moved.params["0.weight"][1], atol=1e-4)
    assert forget(name, models, x, y, gone[:0], kept, how) is models


def test_what_will_not_do(trained: tuple[Ensemble, Tensor, Tensor]) -> None:
    models, x, y = trained
    with pytest.raises(BadInput, match="method 'wish' is unknown; choose from ascent, retain, difference"):
        forget("wish", models, x, y, torch.arange(3), torch.arange(3, 60), Tuning())
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"weight": -1.0}):
        with pytest.raises(BadInput, match="must be"):
            Tuning(**wrong)  # type: ignore[arg-type]
