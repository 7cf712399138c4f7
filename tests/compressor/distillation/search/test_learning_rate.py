"""The search for a learning rate: where it ends, what it is judged by, and that it leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib import Diverged
from calib.data.corpus import Corpus
from calib.jobs.journal import Journal
from calib.jobs.training_loop import OptimizerConfig
from calib.losses.divergences import dense, forward_kl
from calib.quant.scheme import Scheme
from compressor import Distill
from compressor.distillation.batches import TrainingConfig
from compressor.distillation.fake_quant import fake_quantizers
from compressor.distillation.loss_expression import parse_loss
from compressor.distillation.models import Student, Teacher
from compressor.distillation.options import DEFAULT_LR
from compressor.distillation.search import learning_rate
from compressor.distillation.search.learning_rate import LEAST, MOST, lowest, trial_steps, with_rate
from compressor.distillation.train import training_targets
from tests import tiny

OPTIONS = Distill(layers=1, steps=100)


def corpus(rows: int = 20, length: int = 9) -> Corpus:
    ids = torch.randint(2, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    return Corpus(ids, torch.arange(length) < 4 + torch.arange(rows)[:, None] % 6, "random", None)


def config(**more: Any) -> TrainingConfig:
    made = TrainingConfig(terms=parse_loss("forward-kl"), descent=OptimizerConfig(steps=100), lr=1e-2, batch=4, seed=0)
    return replace(made, **more)


def student(scheme: str | None = None) -> Student:
    model = tiny.model_of(tiny.config_of("llama"), seed=1).requires_grad_(True)
    fakes = {} if scheme is None else fake_quantizers(model, Scheme.parse(scheme), torch.float64)
    return Student(model, None, tiny.VOCAB, fakes)


def teacher() -> Teacher:
    return Teacher(tiny.model_of(tiny.config_of("llama"), seed=2), None, tiny.VOCAB)


@given(best=st.integers(-9, 6), diverges=st.integers(0, 9))
def test_the_walk_ends_at_the_lowest_of_a_valley(best: int, diverges: int) -> None:
    """Whatever side of the start it lies on, and even where the start itself diverges."""
    asked = list[float]()

    def loss(lr: float) -> float:
        asked.append(lr)
        exponent = round(math.log2(lr / DEFAULT_LR))
        return math.inf if exponent > best + diverges else abs(exponent - best) + 1.0

    tried = lowest(loss, DEFAULT_LR)
    assert min(tried, key=lambda lr: tried[lr]) == DEFAULT_LR * 2.0**best
    assert len(asked) == len(set(asked)) == len(tried) <= abs(best) + 3
    assert all(LEAST <= lr <= MOST for lr in tried)


def test_all_rates_diverge() -> None:
    tried = lowest(lambda lr: math.inf, DEFAULT_LR)
    assert len(tried) < 15 and min(tried) < 2 * LEAST


@pytest.mark.parametrize("scheme", [None, "w4a16-channel"])
def test_a_search_leaves_the_student_as_it_was_and_is_made_once(
    scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, own, journal, asked = corpus(), student(scheme), Journal(tmp_path), config()
    before = [p.detach().clone() for p in (*own.params, *own.scales)]
    found, report = with_rate(OPTIONS, asked, own, teacher(), data, training_targets(data, answers_only=False), journal)
    assert all(torch.equal(a, b) for a, b in zip(before, (*own.params, *own.scales), strict=True))
    assert report is not None and report["steps"] == trial_steps(100) == 5
    losses = {one["lr"]: one["loss"] for one in report["tried"]}
    assert found.lr == report["lr"] == min(losses, key=lambda lr: losses[lr]) and len(losses) >= 2
    assert found == replace(asked, lr=found.lr), "nothing else is changed"
    monkeypatch.setattr(learning_rate, "train_student", None)  # the journal has it
    assert with_rate(OPTIONS, asked, own, teacher(), data, data.mask[:, 1:], journal) == (found, report)


def test_rates_are_judged_by_rows_that_no_trial_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their KL, as dense logits have it, from the student that has not moved yet at a rate of next to nothing."""
    data, own, orders = corpus(), student(), list[list[list[int]]]()
    train = learning_rate.train_student

    def watched(*arguments: Any, rows_of_step: list[list[int]], **more: Any) -> list[dict[str, float]]:
        orders.append(rows_of_step)
        return train(*arguments, rows_of_step=rows_of_step, **more)

    monkeypatch.setattr(learning_rate, "train_student", watched)
    monkeypatch.setattr(learning_rate, "DEFAULT_LR", LEAST)
    _, report = with_rate(
        OPTIONS, config(balance="recap", ema=0.9), own, teacher(), data, training_targets(data, answers_only=False),
        Journal(tmp_path),
    )  # fmt: skip
    judged = list(range(16, 20))
    assert all(order == orders[0] for order in orders) and orders[0][-1] == judged
    assert not {row for rows in orders[0][:-1] for row in rows} & set(judged)
    q, p = (of.model(data.ids[judged]).logits[:, :-1].detach() for of in (own, teacher()))
    kl = dense(forward_kl, p, q)[data.mask[judged, 1:]].mean()
    assert report is not None and report["rows"] == 4
    assert report["tried"][0]["loss"] == pytest.approx(float(kl), rel=1e-3)


def test_rates_that_diverge_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = learning_rate.train_student

    def failing(*arguments: Any, **more: Any) -> list[dict[str, float]]:
        if arguments[4].lr > 3e-4:
            raise Diverged("step 3: a gradient is not finite; lower the learning rate")
        return train(*arguments, **more)

    monkeypatch.setattr(learning_rate, "train_student", failing)
    data = corpus()
    found, report = with_rate(
        OPTIONS, config(), student(), teacher(), data, training_targets(data, answers_only=False), Journal(tmp_path)
    )
    assert report is not None and found.lr <= 3e-4
    assert {one["lr"]: one["loss"] for one in report["tried"]}[DEFAULT_LR] is None


@pytest.mark.parametrize("more", [{"lr": 1e-4}, {"steps": 49}, {"on_policy": 0.5}, {"task": "sequence-classification"}])
def test_where_there_is_no_search(more: dict[str, Any], tmp_path: Path) -> None:
    options, asked = replace(OPTIONS, **more), config()
    assert with_rate(options, asked, student(), None, corpus(), corpus().mask, Journal(tmp_path)) == (asked, None)
    assert options.rate == more.get("lr", DEFAULT_LR)
