from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unlearn.conftest import HOW, blobs, make
from unlearn.datamodels.datamodel import regress
from unlearn.datamodels.estimators import places_of, scale_of, weighted
from unlearn.methods.exact import Ridge
from unlearn.model.ensemble import initial_ensemble, partial, train_ensemble
from unlearn.model.examples import IGNORED, Examples, plain_examples
from unlearn.model.margins import margin_slope, margins, margins_of


def changes(seed: int) -> tuple[Tensor, Tensor]:
    """True changes (6, 30), and which are of rows that go."""
    g = torch.Generator().manual_seed(seed)
    own = torch.rand(6, 30, generator=g) < 0.3
    return torch.randn(6, 30, generator=g) * (1 + 4 * own), own


def test_a_wrong_scale_is_found_apart_for_rows_that_go_and_for_others() -> None:
    true, own = changes(0)
    found = scale_of(torch.where(own, 0.5, -2.0) * true, true, own)
    assert found.own == pytest.approx(2) and found.others == 0, "what points the wrong way is not followed"
    right = scale_of(torch.where(own, 0.5, 10.0) * true, true, own)
    assert (right.own, right.others) == (pytest.approx(2), pytest.approx(0.1))
    assert right.held_out is not None and right.raw is not None
    assert right.held_out.error == pytest.approx(0, abs=1e-6) and right.raw.error > 1


def test_noise_is_shrunk_to_nothing_and_the_error_to_that_of_no_change() -> None:
    """Rank correlation and slope of pure noise are none; without a fitted scale the error would be above 1."""
    true, own = changes(1)
    noise = 3 * torch.randn(6, 30, generator=torch.Generator().manual_seed(5))
    found = scale_of(noise, true, own)
    assert found.own < 0.2 and found.others < 0.2
    assert found.raw is not None and found.held_out is not None
    assert found.raw.error > 1.3 > 1.1 > found.held_out.error


def test_each_deletion_is_judged_by_a_scale_of_the_others() -> None:
    """One that is unlike all others: it cannot be right by having been fitted to."""
    true, own = changes(2)
    predicted = true.clone()
    predicted[0] *= 100
    found = scale_of(predicted, true, own)
    assert found.held_out is not None and found.held_out.error > 10


def test_one_deletion_gives_a_scale_and_no_judgement() -> None:
    true, own = changes(3)
    found = scale_of(2 * true[:1], true[:1], own[:1])
    assert found.own == pytest.approx(0.5) and found.raw is None and "raw" not in found.asdict()


def test_the_sheet_s_scales_of_ridge() -> None:
    """Slope of truth on prediction of first-order influence and of leave-one-out sums: 1.18 and 1.08 (30 of 300 rows),
    and their errors .18 and .13."""
    slopes, errors = torch.zeros(2), torch.zeros(2)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 20, generator=g, dtype=torch.float64)
        y = x @ torch.randn(20, 1, generator=g, dtype=torch.float64)
        y = y + torch.randn(300, 1, generator=g, dtype=torch.float64)
        whole, deleted = Ridge.fit(x, y, 1.0), torch.arange(30)
        true = (x @ (whole.without(x[deleted], y[deleted]).theta - whole.theta)).flatten()
        for i, leave_one_out in enumerate((False, True)):
            said = -whole.influences(x, y, x, leave_one_out=leave_one_out)[deleted].sum(0).flatten()
            slopes[i] += (said @ true / said.square().sum() / 5).float()
            errors[i] += ((said - true).norm() / true.norm() / 5).float()
    assert slopes.tolist() == pytest.approx([1.18, 1.08], abs=0.06)
    assert errors.tolist() == pytest.approx([0.18, 0.13], abs=0.05)


def test_common_seeds_cut_the_noise_of_small_deletions() -> None:
    """Differences from a model of the same seed, against outputs as they are: the noise that regression must see
    through."""
    x, y = blobs(0, 90)
    rows, seeds = plain_examples(x, y), [k % 4 for k in range(24)]
    masks = torch.rand(24, 90, generator=torch.Generator().manual_seed(0)) < 0.98
    full = train_ensemble(
        initial_ensemble(make, range(4)), rows, torch.ones(4, 90, dtype=torch.bool), range(4), HOW
    ).logits(rows)
    said = train_ensemble(initial_ensemble(make, seeds), rows, masks, seeds, HOW).logits(rows)
    assert (said - full[seeds]).var(0).mean() < 0.8 * said.var(0).mean()
    model = regress(~masks, said - full[seeds], penalty=1.0)
    assert model.weights.shape == (90, 90, 3)


def test_the_scale_that_is_fitted_is_that_of_logits() -> None:
    """Predictions that are c times what they should be get 1 / c, however far margins are from linear in between."""
    g = torch.Generator().manual_seed(0)
    logits, shift = 3 * torch.randn(50, 6, generator=g), 1e-3 * torch.randn(50, 6, generator=g)
    labels = torch.randint(6, (50,), generator=g)
    true = (margins(logits + shift, labels) - margins(logits, labels))[None]
    for times in (1.0, 50.0, 5000.0):
        slope = margin_slope(logits, labels, times * shift)[None]
        found = scale_of(slope, true, torch.ones_like(true, dtype=torch.bool))
        assert times * found.own == pytest.approx(1, abs=1e-2)


def test_a_weighted_sum_over_models_has_weights_of_its_own_at_every_row() -> None:
    x, _ = blobs(0, 7)
    models, rows = initial_ensemble(make, range(5)), plain_examples(x, torch.zeros(7, dtype=torch.long))
    weights = torch.randn(5, 7, dtype=torch.float64)
    said = models.logits(rows)
    expected = torch.stack([sum(weights[m, i] * said[m, i] for m in range(5)) for i in range(7)])  # type: ignore[misc]
    for stacked in (True, False):
        assert torch.allclose(weighted(replace(models, stacked=stacked), weights, rows), expected.float(), atol=1e-5)


def test_what_belongs_together_shares_words() -> None:
    """Facts of eight people, of ten tokens each, among words that anybody may use; padding says nothing."""
    g = torch.Generator().manual_seed(0)
    person = torch.arange(8).repeat_interleave(10)
    own = torch.arange(200, 280).view(8, 10)
    ids = torch.randint(0, 50, (80, 12), generator=g)
    ids[:, 3:7] = torch.stack([own[p][torch.randperm(10, generator=g)[:4]] for p in person.tolist()])
    narrow = Examples({"input_ids": ids}, ids)
    ids = torch.cat([ids, torch.zeros(80, 20, dtype=torch.long)], 1)
    labels = torch.where(torch.arange(32) < 12, ids, IGNORED)
    for rows in (
        Examples({"input_ids": ids}, labels),
        Examples({"input_ids": ids, "attention_mask": (torch.arange(32) < 12).expand(80, 32)}, torch.zeros(80).long()),
    ):
        places = places_of(rows)
        near = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
        assert (person[near] == person).double().mean() > 0.75, "by chance 0.11"
        assert torch.allclose(places @ places.mT, places_of(narrow) @ places_of(narrow).mT, atol=1e-4)
        one = places_of(rows[:1])
        assert one.shape[0] == 1 and one.isfinite().all()


def test_margins_of_models_and_rows_come_in_pieces() -> None:
    x, y = blobs(0, 90)
    models, rows = initial_ensemble(make, range(13)), plain_examples(x, y)
    assert torch.allclose(margins_of(models, rows), margins(models.logits(rows), y), atol=1e-6)
    assert torch.allclose(margins_of(replace(models, stacked=False), rows), margins(models.logits(rows), y), atol=1e-6)


def test_parts_of_a_forget_set_hold_a_tenth_to_a_half_of_it_and_nothing_else() -> None:
    x, _ = blobs(0, 90)
    forget = torch.arange(10, 50)
    deleted = ~partial(x, forget, 90, 60, seed=0)
    held = deleted.sum(1)
    assert torch.equal(deleted[:, forget].sum(1), held) and held.min() >= 4 and held.max() <= 20
    near = torch.stack([torch.cdist(x[g], x[g]).mean() for g in deleted[0::2]]).mean()
    anyhow = torch.stack([torch.cdist(x[g], x[g]).mean() for g in deleted[1::2]]).mean()
    assert near < 0.8 * anyhow, "every other one is a neighbourhood"
    assert not partial(x, forget[:1], 90, 3, seed=0)[:, 10].any(), "one row goes alone"
