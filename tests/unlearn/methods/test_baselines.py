from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from calib import BadInput
from calib.losses.top_k import top_k
from tests.drawn import pair, targets
from unlearn.methods.baselines import BaselineConfig, Reference, forget
from unlearn.methods.gradient import GRADIENT_LOSSES, gradient_ascent, negative_kl, scrub_retain
from unlearn.methods.losses import (
    REHEARSALS,
    RETAIN_LOSSES,
    Loss,
    LossInputs,
    LossPair,
    kl_to_reference,
    label_cross_entropy,
)
from unlearn.methods.preference import PREFERENCE_LOSSES, SCORES, npo, simnpo
from unlearn.methods.representation import REPRESENTATION_LOSSES
from unlearn.model.ensemble import Ensemble, initial_ensemble, train_ensemble
from unlearn.model.examples import IGNORED, Examples, plain_examples
from unlearn.model.training_recipe import Training

seeds = st.integers(0, 10_000)
OF_LOGITS = {**GRADIENT_LOSSES, **PREFERENCE_LOSSES}
BASELINES = {**OF_LOGITS, **REPRESENTATION_LOSSES}
LOSSES: dict[str, Loss] = {"astray": negative_kl, "scrubbed": scrub_retain, **RETAIN_LOSSES}
LOSSES |= {name: m.forget for name, m in OF_LOGITS.items() if m.forget is not None}


def rows(seed: int, labels: Tensor | None = None) -> LossInputs:
    """Four decisions: of four rows, or as `labels` has them."""
    now, before = pair(seed)
    of = plain_examples(now, targets(seed)) if labels is None else Examples({}, labels)
    return LossInputs(now, before, cross_entropy(before, of.targets, reduction="none"), of)


def gradient(loss: Loss, some: LossInputs) -> Tensor:
    now = some.now.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(replace(some, now=now)), now)
    return found


def still(some: LossInputs) -> LossInputs:
    """As it was before anything moved."""
    return replace(some, before=some.now, nats_before=some.nats)


@given(seeds, st.floats(0.05, 3))
def test_npo_and_simnpo_against_plain_loops(seed: int, beta: float) -> None:
    some = rows(seed)
    now, before = some.nats.tolist(), some.nats_before.tolist()
    bound = [2 / beta * math.log1p(math.exp(-beta * (a - b))) for a, b in zip(now, before, strict=True)]
    assert npo(some, beta).item() == pytest.approx(sum(bound) / 4)
    plainly = [2 / beta * math.log1p(math.exp(-beta * (a - 0.5))) for a in now]
    assert simnpo(some, beta, 0.5).item() == pytest.approx(sum(plainly) / 4)


@given(seeds)
def test_npo_is_of_whole_rows_and_simnpo_of_means_of_their_tokens(seed: int) -> None:
    """Two rows, of three decisions and of one, with prompts and padding around them."""
    labels = torch.full((2, 6), IGNORED)
    labels[0, 1:4], labels[1, 3] = targets(seed)[:3], targets(seed)[3]
    some = rows(seed, labels)
    ratios = (some.nats_before - some.nats).tolist()
    whole = [sum(ratios[:3]), ratios[3]]
    assert npo(some, 1.0).item() == pytest.approx(sum(2 * math.log1p(math.exp(r)) for r in whole) / 2)
    means = [sum(some.nats.tolist()[:3]) / 3, some.nats.tolist()[3]]
    assert simnpo(some, 1.0).item() == pytest.approx(sum(2 * math.log1p(math.exp(-m)) for m in means) / 2)


@given(seeds)
def test_npo_begins_as_ascent_and_then_lets_go(seed: int) -> None:
    """Where nothing has moved yet their gradients are equal; where a row is forgotten NPO's has vanished."""
    some = rows(seed)
    assert torch.allclose(gradient(npo, still(some)), gradient(gradient_ascent, still(some)), atol=1e-12)
    far = replace(some, now=some.now - 50 * nn.functional.one_hot(some.of.targets, 9))
    assert gradient(lambda r: npo(r, 1.0), far).norm() < 1e-3 * gradient(gradient_ascent, far).norm()


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_other_divergences(name: str) -> None:
    """f'(u) up to a constant: f'' = 1 / (u (u + 1)), 1 / u^2, u^(a - 2); as a function of r = log u."""
    second = {"js": lambda u: 1 / (u * (u + 1)), "forward-kl": lambda u: u**-2, "alpha": lambda u: u**-1.5}[name]
    r = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(SCORES[name](r).sum(), r)
    u = r.detach().exp()
    assert torch.allclose(slope, second(u) * u, rtol=1e-6)  # d/dr = u d/du
    assert SCORES[name](torch.zeros(1)).item() == pytest.approx(0, abs=1e-6)
    bounds = {"js": math.log(2), "forward-kl": 1.0, "alpha": 2.0}
    assert SCORES[name](torch.tensor([100.0])).item() == pytest.approx(bounds[name]), "bounded, however likely a row"
    assert SCORES[name](torch.tensor([-1e4])).isfinite()


@pytest.mark.parametrize("name", REHEARSALS)
def test_rehearsals_are_never_negative_and_zero_with_their_slope_where_nothing_moved(name: str) -> None:
    r = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert REHEARSALS[name](r).min() > -1e-12 and REHEARSALS[name](r)[[0, -1]].min() > 0.1
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(REHEARSALS[name](zero), zero)
    assert REHEARSALS[name](zero).abs() < 1e-12 and slope.abs() < 1e-12
    u = torch.tensor([0.3, 2.5], dtype=torch.float64)
    forms = {
        "forward-kl": u - 1 - u.log(),
        "js": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": (u**0.8 - 0.8 * u - 0.2) / (0.2 * -0.8),
    }
    assert torch.allclose(REHEARSALS[name](u.log()), forms[name])


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds, constants=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_a_constant_added_to_logits_changes_nothing(name: str, seed: int, constants: tuple[float, float]) -> None:
    """Published code takes NPO and its KL of raw logits, without a softmax: there it changes everything."""
    some = rows(seed)
    assert isinstance(some.before, Tensor)
    moved = replace(some, now=some.now + constants[0], before=some.before + constants[1])
    assert torch.allclose(LOSSES[name](moved), LOSSES[name](some), rtol=1e-9, atol=1e-9)


@given(seeds)
def test_what_is_kept_as_before_has_no_pull_from_its_divergence(seed: int) -> None:
    some = still(rows(seed))
    assert gradient(negative_kl, some).abs().max() < 1e-12
    assert torch.allclose(gradient(scrub_retain, some), gradient(label_cross_entropy, some), atol=1e-12)
    for name in ("kl", "rehearsal-js"):
        assert gradient(RETAIN_LOSSES[name], some).abs().max() < 1e-12


@given(seeds)
def test_the_most_likely_tokens_do_for_what_was_said_before(seed: int) -> None:
    """All nine of them, exactly; and a part of them gives less, never more."""
    some = rows(seed)
    assert isinstance(some.before, Tensor)
    whole = replace(some, before=top_k(some.before, 9))
    assert kl_to_reference(whole).item() == pytest.approx(kl_to_reference(some).item())
    assert kl_to_reference(replace(some, before=top_k(some.before, 3))) <= kl_to_reference(some) + 1e-12


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def trained() -> tuple[Ensemble, Examples]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = x[:, :3].argmax(-1)
    y[:10] = (y[:10] + 1) % 3  # mislabelled, and learned by heart
    masks = torch.ones(3, 60, dtype=torch.bool)
    options = Training(epochs=150, batch=20, lr=0.2)
    return train_ensemble(
        initial_ensemble(make, range(3)), plain_examples(x, y), masks, range(3), options
    ), plain_examples(x, y)


GONE, KEPT = torch.arange(10), torch.arange(10, 60)
HOW = BaselineConfig(epochs=12, batch=5, lr=1e-2, retain_multiplier=4.0)


def nats(ensemble: Ensemble, some: Examples) -> Tensor:
    said = ensemble.logits(some).log_softmax(-1)
    return -said.gather(-1, some.labels.expand(len(ensemble), -1)[..., None]).mean((1, 2))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_every_baseline_does_what_it_says(name: str, trained: tuple[Ensemble, Examples]) -> None:
    """One published SCRUB never moves its student."""
    models, every = trained
    moved = forget(BASELINES[name], models, every, GONE, KEPT, HOW)
    if BASELINES[name].forget is not None:
        assert (nats(moved, every[GONE]) > nats(models, every[GONE]) + 0.3).all()
    if BASELINES[name].retain is not None:
        assert (nats(moved, every[KEPT]) < nats(models, every[KEPT]) + 0.3).all()
    assert all(not torch.equal(p, moved.params[parameter]) for parameter, p in models.params.items())
    alone = forget(BASELINES[name], models[1:2], every, GONE, KEPT, HOW)
    assert torch.allclose(alone.params["0.weight"][0], moved.params["0.weight"][1], atol=1e-4)
    assert forget(BASELINES[name], models, every, GONE[:0], KEPT, HOW) is models


@pytest.mark.parametrize("retain", RETAIN_LOSSES)
@pytest.mark.parametrize("balance", ["gradient", "recap"])
def test_losses_on_what_is_retained_and_balances(retain: str, balance: str, trained: tuple[Ensemble, Examples]) -> None:
    models, every = trained
    name = "difference" if balance == "gradient" else "npo"
    moved = forget(BASELINES[name], models, every, GONE, KEPT, replace(HOW, retain_loss=retain, balance=balance))
    alone = forget(BASELINES[name], models[2:], every, GONE, KEPT, replace(HOW, retain_loss=retain, balance=balance))
    assert torch.allclose(alone.params["0.weight"][0], moved.params["0.weight"][2], atol=1e-3)
    assert (nats(moved, every[GONE]) > nats(models, every[GONE])).all()
    assert (nats(moved, every[KEPT]) < nats(models, every[KEPT]) + 0.5).all()


def test_a_balance_by_gradients_makes_a_loss_times_a_constant_the_same_loss(
    trained: tuple[Ensemble, Examples],
) -> None:
    models = replace(trained[0], params={name: p.double() for name, p in trained[0].params.items()})
    every, found = plain_examples(trained[1].inputs[""].double(), trained[1].labels), {}
    for balance in ("gradient", "none"):
        options = replace(HOW, balance=balance, weight=0.3)
        plainly = forget(BASELINES["difference"], models, every, GONE, KEPT, options)
        louder = LossPair(lambda r: 5 * gradient_ascent(r), label_cross_entropy)
        loud = forget(louder, models, every, GONE, KEPT, options)
        found[balance] = (plainly.params["0.weight"] - loud.params["0.weight"]).abs().max().item()
    assert found["gradient"] < 1e-6 < 0.01 < found["none"]


def test_states_are_steered_where_they_are_forgotten_and_stay_where_they_are_not(
    trained: tuple[Ensemble, Examples],
) -> None:
    models, every = trained

    def states(params: object, some: Examples) -> Tensor:
        p = dict(params)  # type: ignore[call-overload]
        return (some.inputs[""] @ p["0.weight"].mT + p["0.bias"]).relu()

    reference = Reference.of(models, every, states)
    moved = forget(BASELINES["rmu"], models, every, GONE, KEPT, replace(HOW, lr=3e-2), None, reference)
    was, now = (m.each(lambda p: states(p, every), m.params) for m in (models, moved))
    apart = (now - was).norm(dim=-1) / was.norm(dim=-1).mean()
    assert apart[:, GONE].mean() > 1.2 * apart[:, KEPT].mean()
    assert torch.equal(models.params["2.weight"], moved.params["2.weight"]), "what comes after has no gradient"


def test_what_is_frozen_stays(trained: tuple[Ensemble, Examples]) -> None:
    models, every = trained
    held = replace(models, frozen=frozenset({"0.weight", "0.bias"}))
    moved = forget(BASELINES["npo"], held, every, GONE, KEPT, HOW)
    assert torch.equal(moved.params["0.weight"], models.params["0.weight"])
    assert not torch.equal(moved.params["2.weight"], models.params["2.weight"])


def test_what_will_not_do(trained: tuple[Ensemble, Examples]) -> None:
    models, every = trained
    for name, balance in (("ascent", "gradient"), ("scrub", "recap"), ("difference", "recap")):
        with pytest.raises(BadInput, match=f"balance {balance}"):
            forget(BASELINES[name], models, every, GONE, KEPT, replace(HOW, balance=balance))
    with pytest.raises(BadInput, match="has a loss of its own"):
        forget(BASELINES["scrub"], models, every, GONE, KEPT, replace(HOW, retain_loss="kl"))
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"weight": -1.0}, {"retain_loss": "x"}, {"balance": "x"}):
        with pytest.raises(BadInput):
            BaselineConfig(**wrong)  # type: ignore[arg-type]
