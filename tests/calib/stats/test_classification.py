"""Figures of several labels and of numbers, against scikit-learn and scipy."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from calib.data.targets import MULTI, REGRESSION, SINGLE
from calib.stats.classification import metrics_of, multi_label_metrics, regression_metrics
from calib.stats.perplexity import standard_error

SEEDS = st.integers(0, 1000)


@given(SEEDS)
def test_several_labels_against_scikit_learn(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(12, 5, generator=g) - 0.7 for _ in range(2))
    targets = (torch.rand(12, 5, generator=g) < 0.3).float()
    logits[:, 4], targets[:, 4] = -1, 0  # one label is never there
    found, answers = multi_label_metrics(logits, targets, reference), (logits.sigmoid() >= 0.5).int()
    for average, value in (("micro", found.f1_micro), ("macro", found.f1_macro)):
        assert value == pytest.approx(f1_score(targets.int(), answers, average=average, zero_division=0)), average
    assert found.subset_accuracy == pytest.approx(accuracy_score(targets.int(), answers))
    assert found.same_labels == pytest.approx(accuracy_score((reference >= 0).int(), answers))
    assert found.rows == 12


@given(SEEDS)
def test_numbers_against_scipy(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    outputs, reference = (torch.randn(15, 1, generator=g) for _ in range(2))
    outputs[3] = outputs[7]  # ties
    targets = (5 * torch.rand(15, generator=g)).round()
    found = regression_metrics(outputs, targets, reference)
    values = outputs[:, 0].double().numpy()
    assert found.mse == pytest.approx(mean_squared_error(targets.numpy(), values))
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(values, targets.numpy()).statistic)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(values, targets.numpy()).statistic)
    assert found.teacher_mse == pytest.approx(mean_squared_error(reference[:, 0].double().numpy(), values))


def test_what_cannot_be_correlated_has_no_correlation() -> None:
    for rows in (1, 4):
        found = regression_metrics(torch.randn(rows, 1), torch.ones(rows), torch.randn(rows, 1))
        assert found.pearson == found.spearman == 0


def test_each_problem_has_its_own_figures() -> None:
    logits, reference = torch.randn(6, 3), torch.randn(6, 3)
    assert {"accuracy", "kl", "kl_error"} <= metrics_of(logits, torch.arange(6) % 3, reference, SINGLE).keys()
    many = metrics_of(logits, torch.ones(6, 3), reference, MULTI)
    assert {"f1_micro", "f1_macro", "subset_accuracy", "kl"} <= many.keys() and "accuracy" not in many
    one = metrics_of(logits[:, :1], torch.randn(6), reference[:, :1], REGRESSION)
    apart = (logits - reference)[:, 0].square().double()
    assert one["teacher_mse_error"] == pytest.approx(standard_error(apart, torch.ones_like(apart)))
    assert {"mse", "pearson", "spearman"} <= one.keys() and "kl" not in one
