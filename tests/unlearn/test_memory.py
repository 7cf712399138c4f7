"""What keeps memory low changes nothing else: steps in parts, logits in chunks, activations made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib import BadInput
from calib.jobs.training_loop import Group, OptimizerConfig, Parts
from calib.losses.chunked_head import Head
from cli.main import LESS, parewell
from tests.unlearn.conftest import FACTORY, Site
from unlearn import Unlearn, unlearn
from unlearn.data.dataset import classes_of, read_data
from unlearn.datamodels.influence import Seen
from unlearn.methods.baselines import BaselineConfig, Reference, forget
from unlearn.methods.gradient import GRADIENT_LOSSES
from unlearn.methods.matching import MatchingConfig, match
from unlearn.methods.moving import answers_of
from unlearn.methods.preference import PREFERENCE_LOSSES
from unlearn.methods.representation import REPRESENTATION_LOSSES
from unlearn.model.ensemble import Ensemble, train_ensemble
from unlearn.model.examples import IGNORED, Examples
from unlearn.model.model import TrainableModel, blocks_of, limit_memory, open_model
from unlearn.model.train_ensembles import check_learning
from unlearn.model.training_recipe import Training
from unlearn.options.methods import MICRO_BATCH_TOKENS

BASELINES = {**GRADIENT_LOSSES, **PREFERENCE_LOSSES, **REPRESENTATION_LOSSES}
CPU = torch.device("cpu")
GONE, KEPT = torch.arange(5), torch.arange(5, 12)
Gradients = dict[str, Tensor]
First = Callable[[Callable[[], Any]], tuple[Gradients, Parts]]


def trainable(words: Site, *, checkpointing: bool = False) -> tuple[TrainableModel, Examples]:
    found = open_model(words.model, "causal-lm", device=CPU)
    limit_memory(found, MICRO_BATCH_TOKENS, checkpointing=checkpointing)
    rows = read_data(words.train, found, None).examples
    labels = rows.labels.clone()
    for i in range(0, len(rows), 2):  # no two rows that follow each other are equally long
        labels[i, rows.target_mask[i].nonzero().max()] = IGNORED
    return found, replace(rows, labels=labels)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> First:
    """Gradients and losses of the first step of what is called; it descends no further."""
    found: list[tuple[Gradients, Parts]] = []

    def fit(groups: Sequence[Group], gradients: Callable[[int], Parts], config: OptimizerConfig, **_: Any) -> None:
        params = groups[0].params
        parts = gradients(0)
        found.append(({str(i): p.grad.clone() for i, p in enumerate(params) if p.grad is not None}, parts))

    monkeypatch.setattr(import_module("unlearn.methods.descent"), "optimize", fit)

    def run(job: Callable[[], Any]) -> tuple[Gradients, Parts]:
        job()
        return found.pop()

    return run


def same(a: tuple[Gradients, Parts], b: tuple[Gradients, Parts]) -> bool:
    largest = max(float(g.abs().max()) for g in a[0].values())
    return (
        a[0].keys() == b[0].keys()
        and all((a[0][name] - b[0][name]).abs().max() < 1e-6 * max(1.0, largest) for name in a[0])
        and all(a[1][name] == pytest.approx(b[1][name], rel=1e-6, abs=1e-6) for name in a[1])
    )


def away(models: Ensemble) -> Ensemble:
    """Not where it began, where many gradients vanish; in double precision."""
    g = torch.Generator().manual_seed(0)
    params = {n: p.double() + 0.02 * torch.randn(p.shape, generator=g) for n, p in models.params.items()}
    return models.with_params(params)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", [*BASELINES, "match", "balance"])
def test_a_step_in_parts_is_the_step(
    name: str, chunks: bool, words: Site, first: First, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = trainable(words)
    assert rows.counts.unique().numel() > 1, "of rows that are not equally long"
    before, now = model.one(), away(model.one())
    said, nats = answers_of(before, rows, 5)
    states = model.states(blocks_of(model)[0]) if name == "rmu" and model.states else None

    def step(at_once: int) -> tuple[Gradients, Parts]:
        models = replace(now, at_once=at_once)
        if name == "match":
            options = MatchingConfig(batch=9, distance="kl")
            return first(lambda: match(models, rows, said, GONE, KEPT, options))
        tuning = BaselineConfig(batch=5, balance="gradient" if name == "balance" else "none")
        kind = "difference" if name == "balance" else name
        reference = Reference.of(before, rows, states) if states else Reference(said, nats)
        return first(lambda: forget(BASELINES[kind], models, rows, GONE, KEPT, tuning, reference=reference))

    whole = step(10**6)
    if chunks:
        monkeypatch.setattr(import_module("calib.losses.chunked_head"), "HEAD_BYTES", 3 * 4 * 40)
    assert same(whole, step(2 * rows.width)) and same(whole, step(1))


def test_training_in_parts_is_training(words: Site) -> None:
    model, rows = trainable(words)
    masks = torch.ones(1, len(rows), dtype=torch.bool)
    options = Training(epochs=2, batch=6, lr=0.05)
    whole = train_ensemble(model.one(), rows, masks, [0], options)
    parts = train_ensemble(replace(model.one(), at_once=1), rows, masks, [0], options)
    assert all((whole.params[n] - parts.params[n]).abs().max() < 1e-5 for n in whole.params)
    assert any(not torch.equal(whole.params[n], model.one().params[n]) for n in whole.params)


def test_activations_made_again_are_those_of_the_parameters_that_were_given(words: Site, first: First) -> None:
    """Not of those that the module has by the time it goes back."""
    found = []
    for checkpointing in (False, True):
        model, rows = trainable(words, checkpointing=checkpointing)
        said, nats = answers_of(model.one(), rows, 5)
        now = away(model.one())

        def job(now: Ensemble = now, said: Any = said, nats: Tensor = nats, rows: Examples = rows) -> Any:
            return forget(
                BASELINES["scrub"], now, rows, GONE, KEPT, BaselineConfig(batch=5), reference=Reference(said, nats)
            )

        found.append(first(job))
    assert same(*found)


def test_a_step_with_checkpointing_keeps_less(words: Site) -> None:
    """Bytes that autograd keeps for the way back."""
    kept = []
    for checkpointing in (False, True):
        model, rows = trainable(words, checkpointing=checkpointing)
        params = {n: p.clone().requires_grad_() for n, p in model.params.items()}
        own, sizes = {p.data_ptr() for p in params.values()}, list[int]()

        def pack(x: Tensor, own: set[int] = own, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if x.data_ptr() in own else x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.forward({**params, **model.buffers}, rows).sum()
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_values_through_a_head_in_chunks(size: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 4, generator=g, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=g, dtype=torch.float64)
    targets, factors = torch.arange(10) % 7, torch.randn(10, generator=g, dtype=torch.float64)
    found = []
    for chunked in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = Head(w, 0.5, 3.0, 7)

        def values(at: slice, logits: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits, targets[at], reduction="none")

        plainly = 3 * ((x @ w[:7].mT * 0.5) / 3).tanh()
        made = head.each(x, values, size) if chunked else values(slice(None), plainly)
        (factors * made).sum().backward()
        found.append((made.detach(), x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-12)


def test_one_model_is_not_copied(words: Site) -> None:
    """As it is opened, alone, picked out of one: all are views of the module's own parameters."""
    model, _ = trainable(words)
    own = {p.data_ptr() for p in model.module.parameters()}
    for ensemble in (model.one(), model.one()[[0]], model.one()[0:1]):
        assert {p.data_ptr() for n, p in ensemble.params.items() if n in model.params} == own


def test_options_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"train": Path("t"), "forget_lines": "1"}
    with pytest.raises(BadInput, match="micro-batch-tokens is 0"):
        Unlearn(micro_batch_tokens=0, **given)
    for idle in ({"micro_batch_tokens": 9}, {"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}):
        with pytest.raises(BadInput, match=f"{next(iter(idle)).replace('_', '-')}: changes nothing"):
            Unlearn(method="exact", **given, **idle)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="optimizer 'sgd' is unknown"):
        Unlearn(optimizer="sgd", **given)
    monkeypatch.setattr(import_module("unlearn.options.unlearning"), "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"bitsandbytes: is not installed; pip install 'parewell\[eight-bit\]'"):
        Unlearn(optimizer="adamw8bit", **given)


def test_advice_is_about_options_that_there_are() -> None:
    for command, options in LESS.items():
        there = {name for option in parewell.commands[command].params for name in option.opts}
        assert options and all(f"--{option}" in there for option in options), command


def test_want_of_memory_is_no_fault_of_rows_or_models(net: Site) -> None:
    """What fails while inputs are tried out is the input's fault, but where there is no memory."""
    trainable = open_model(net.model, "tensors", factory=net.factory, device=torch.device("cpu"))
    rows = read_data(net.train, trainable).examples

    def failing(error: Exception) -> Any:
        def forward(params: Any, rows: Any) -> Any:
            raise error

        return replace(trainable, forward=forward, learning=forward)

    for check in (lambda o: classes_of(o, rows, net.train), lambda o: check_learning(o, rows)):
        with pytest.raises(BadInput, match="broken"):
            check(failing(RuntimeError("broken")))
        with pytest.raises(torch.OutOfMemoryError):
            check(failing(torch.OutOfMemoryError("CUDA out of memory")))


def test_a_model_without_a_derivative_forwards(net: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused by name; what else fails there is not put down to it."""
    save_file({f"layers.{n}": t for n, t in load_file(net.model).items()}, tmp_path / "model.safetensors")
    options = Unlearn(
        train=net.train, forget=net.forget, factory=FACTORY.replace("make", "backwards"), method="dmm", multiplier=1.0
    )
    with pytest.raises(BadInput, match="estimator gradients: this model cannot be differentiated forwards"):
        unlearn(tmp_path / "model.safetensors", tmp_path / "out", options)

    def other(*_: object) -> None:
        raise RuntimeError("another fault")

    monkeypatch.setattr(Seen, "along", other)
    with pytest.raises(RuntimeError, match="another fault"):
        unlearn(net.model, tmp_path / "out", replace(options, factory=net.factory))
