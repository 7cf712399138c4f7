from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from calib import BadInput
from unlearn.model.ensemble import folds, initial_ensemble, related, subsets, train_ensemble
from unlearn.model.examples import plain_examples
from unlearn.model.training_recipe import Training

HOW = Training(epochs=3, batch=7, lr=0.1, momentum=0.9, decay=0.01, warmup=0.3)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(rows: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=g, dtype=torch.float64)
    return x, (x[:, :3]).argmax(-1)


def alone(seed: int, x: Tensor, y: Tensor, mask: Tensor, config: Training) -> nn.Module:
    """One model by the library's optimizer, in plain loops."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1, weight_decay=config.decay)
    if config.optimiser == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=config.momentum, weight_decay=config.decay)
    per_epoch = -(-int(mask.sum()) // config.batch)
    for step in range(config.epochs * per_epoch):
        if step % per_epoch == 0:
            order = [i for i in torch.randperm(len(mask), generator=generator).tolist() if mask[i]]
        rows = order[step % per_epoch * config.batch :][: config.batch]
        optimizer.param_groups[0]["lr"] = float(
            config.rate(torch.tensor(step), torch.tensor(config.epochs * per_epoch))
        )
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("optimiser", "schedule"), [("sgd", "linear"), ("sgd", "constant"), ("adamw", "cosine")])
def test_all_at_once_is_each_alone_by_the_library_s_optimizer(optimiser: str, schedule: str) -> None:
    """Subsets of all sizes, so that models stop at different steps of an epoch."""
    x, y = data()
    masks = subsets(6, len(x), 0.6, seed=1)
    masks[0], masks[1, 3:] = True, False
    options = replace(HOW, optimiser=optimiser, schedule=schedule)
    trained = train_ensemble(initial_ensemble(make, range(6)), plain_examples(x, y), masks, range(6), options)
    for seed in range(6):
        single = alone(seed, x, y, masks[seed], options)
        for name, p in single.named_parameters():
            assert torch.allclose(trained.params[name][seed], p, atol=1e-10), (seed, name)
        assert torch.allclose(replace(trained, at_once=9).logits(plain_examples(x, y))[seed], single(x), atol=1e-10)


def test_a_model_never_sees_what_its_mask_leaves_out() -> None:
    x, y = data()
    masks = subsets(5, len(x), 0.5, seed=2)
    masks[:, 7] = False
    before = train_ensemble(initial_ensemble(make, range(5)), plain_examples(x, y), masks, range(5), HOW)
    poisoned = x.clone()
    poisoned[7] = torch.nan
    after = train_ensemble(initial_ensemble(make, range(5)), plain_examples(poisoned, y), masks, range(5), HOW)
    assert all(torch.equal(p, after.params[name]) for name, p in before.params.items())


def test_it_does_not_matter_who_is_trained_beside() -> None:
    x, y = data()
    masks = subsets(4, len(x), 0.5, seed=3)
    every = train_ensemble(initial_ensemble(make, range(4)), plain_examples(x, y), masks, range(4), HOW)
    two = train_ensemble(initial_ensemble(make, [2, 3]), plain_examples(x, y), masks[2:], [2, 3], HOW)
    assert all(torch.allclose(p[2:], two.params[name], atol=1e-12) for name, p in every.params.items())
    joined = every[:2] | two
    assert len(joined) == 4 and torch.allclose(
        joined.logits(plain_examples(x, y)), every.logits(plain_examples(x, y)), atol=1e-10
    )


def test_subsets_leave_their_share() -> None:
    masks = subsets(200, 300, 0.9, seed=0)
    assert masks.double().mean().item() == pytest.approx(0.9, abs=0.005)
    assert torch.equal(masks, subsets(200, 300, 0.9, seed=0)) and not torch.equal(masks, subsets(200, 300, 0.9, seed=1))


def test_related_rows_go_together() -> None:
    """Two blobs of one class and one of another; a row of a blob goes with its blob first."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([centre + 0.1 * torch.randn(70, 2, generator=g) for centre in (0.0, 5.0, 10.0)])
    y = torch.tensor([0] * 140 + [1] * 70)
    difficulty = torch.arange(210.0)
    difficulty[[3, 100, 180]] = 1000.0  # the hard ones are anywhere
    masks = related(x, y, difficulty, 300, seed=0, each=1)
    hard = (~masks)[:, [3, 100, 180]]
    assert (hard.sum(1) == 3).float().mean() > 5 * (0.15**3), "far more often together than by chance"
    easy = torch.randperm(210, generator=g).double()  # ranges of it say nothing of blobs
    deleted = (~related(x, y, easy, 2000, seed=1, each=1)).double()
    alike = torch.corrcoef(deleted.mT)
    assert alike[:70, :70].mean() > alike[:70, 70:140].mean() + 0.1, "neighbours go together"
    assert 0.6 < masks.double().mean() < 0.9
    assert torch.equal(masks, related(x, y, difficulty, 300, seed=0, each=1))


@given(st.integers(2, 5), st.integers(0, 99))
def test_folds_leave_each_row_out_once_together_with_its_like(count: int, seed: int) -> None:
    """Ten blobs of 20 rows, in any order."""
    g = torch.Generator().manual_seed(seed)
    blob = torch.randperm(200, generator=g) // 20
    masks = folds(10.0 * torch.nn.functional.one_hot(blob) + torch.rand(200, 10, generator=g), count, seed)
    assert torch.equal((~masks).sum(0), torch.ones(200, dtype=torch.long))
    sizes = (~masks).sum(1)
    assert int(sizes.max() - sizes.min()) <= 60, "a cluster or two that k-means took together apart"
    alike = (masks[:, :, None] == masks[:, None]).all(0)[blob[:, None] == blob]
    assert alike.double().mean() > 0.9


def test_folds_of_too_few_rows() -> None:
    masks = folds(torch.rand(3, 2), 3, 0)
    assert torch.equal((~masks).sum(1), torch.ones(3, dtype=torch.long))
    assert torch.equal((~folds(torch.ones(50, 2), 2, 0)).sum(0), torch.ones(50, dtype=torch.long)), "copies"
    with pytest.raises(BadInput, match="3 rows do not make 4 folds; ask for fewer"):
        folds(torch.rand(3, 2), 4, 0)


def test_what_cannot_be_trained() -> None:
    x, y = data()
    masks = torch.ones(2, len(x), dtype=torch.bool)
    masks[1] = False
    with pytest.raises(BadInput, match="model 1 has no row to train on"):
        train_ensemble(initial_ensemble(make, range(2)), plain_examples(x, y), masks, range(2), HOW)
    for wrong in ({"batch": 0}, {"lr": -1.0}, {"warmup": 1.0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Training(**wrong)  # type: ignore[arg-type]
