"""Models are parameters and buffers: whoever is trained anew has running statistics of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from calib import BadInput
from calib.jobs.journal import Journal
from tests.kills import kill_and_resume
from tests.unlearn.conftest import FACTORY, Site, blobs
from unlearn import Unlearn, unlearn
from unlearn.datamodels.trak import by_trak
from unlearn.methods.learning_rate import RATES, rates_for
from unlearn.methods.matching import MatchingConfig, match
from unlearn.model.ensemble import initial_ensemble, of_module, subsets, train_ensemble
from unlearn.model.examples import Examples, plain_examples
from unlearn.model.model import open_model
from unlearn.model.train_ensembles import EnsembleTrainer, check_learning
from unlearn.model.training_recipe import Training

CPU = torch.device("cpu")
HOW = Training(epochs=3, batch=7, lr=0.1, momentum=0.9, decay=0.01, warmup=0.3)


def conv() -> nn.Module:
    """Dropout, which stays off, batch norm on maps and on vectors."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 6),
        nn.BatchNorm1d(6), nn.Linear(6, 3),
    ).double()  # fmt: skip


def maps_only() -> nn.Module:
    """A single row has statistics here: of its positions."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def averaging() -> nn.Module:
    """Momentum None: running statistics are the mean over all batches so far."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(64, 3)).double()


def images(rows: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 6, 6, generator=g, dtype=torch.float64) * 3 + 1
    return x, x[:, 0, 0, :3].argmax(-1)


def alone(model: nn.Module, seed: int, rows: Examples, mask: Tensor, config: Training) -> nn.Module:
    """A plain loop by torch's optimizer, norms as `model.train()` has them."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=config.momentum, weight_decay=config.decay)
    vectors = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    per_epoch = -(-(int(mask.sum()) - vectors) // config.batch)
    for step in range(config.epochs * per_epoch):
        at = step % per_epoch
        if at == 0:
            order = [i for i in torch.randperm(len(mask), generator=generator).tolist() if mask[i]]
        some = torch.tensor(order[at * config.batch : (at + 1) * config.batch if at + 1 < per_epoch else len(order)])
        optimizer.param_groups[0]["lr"] = float(
            config.rate(torch.tensor(step), torch.tensor(config.epochs * per_epoch))
        )
        optimizer.zero_grad()
        given = dict(rows.inputs)
        said = model(given[""][some]) if "" in given else model(given["pixel_values"][some]).logits
        cross_entropy(said, rows.labels[some]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("make", "stacked"), [(conv, True), (conv, False), (maps_only, True), (maps_only, False), (averaging, False)]
)
def test_training_is_torch_s_in_training_mode(stacked: bool, make: Any) -> None:
    """Of every model, whatever its number of rows: parameters, running statistics, and how many batches made them. 36
    and 22 rows leave one over in batches of 7, 20 leave 6."""
    x, y = images()
    masks = subsets(5, len(x), 0.6, seed=1)
    for model, count in enumerate((40, 36, 22, 20)):
        masks[model] = torch.arange(40) < count
    models = replace(initial_ensemble(make, range(5)), stacked=stacked)
    trained = train_ensemble(models, plain_examples(x, y), masks, range(5), HOW)
    for seed in range(5):
        torch.manual_seed(seed)
        single = alone(make(), seed, plain_examples(x, y), masks[seed], HOW)
        for name, expected in single.state_dict().items():
            assert trained.params[name].dtype == expected.dtype
            assert torch.allclose(trained.params[name][seed], expected, atol=1e-9), (seed, name)
        assert torch.allclose(trained.logits(plain_examples(x, y))[seed], single(x), atol=1e-9)
    assert len(trained.params["1.num_batches_tracked"].unique()) > 1, "each has its own"
    assert torch.equal(models.params["1.running_mean"], torch.zeros(5, 4).double()), "the start is not touched"


def test_a_row_that_is_left_out_leaves_no_trace_in_statistics() -> None:
    x, y = images()
    masks = subsets(3, len(x), 0.5, seed=2)
    masks[:, 7] = False
    poisoned = x.clone()
    poisoned[7] = torch.nan
    a, b = (
        train_ensemble(initial_ensemble(conv, range(3)), plain_examples(z, y), masks, range(3), HOW)
        for z in (x, poisoned)
    )
    assert all(torch.equal(p, b.params[name]) for name, p in a.params.items())
    with pytest.raises(BadInput, match="model 1 has one row to train on, too few for batch norm"):
        masks[1] = torch.arange(40) == 3
        train_ensemble(initial_ensemble(conv, range(3)), plain_examples(x, y), masks, range(3), HOW)


def test_matching_keeps_statistics() -> None:
    x, y = images()
    models = train_ensemble(
        initial_ensemble(conv, range(2)), plain_examples(x, y), torch.ones(2, 40, dtype=torch.bool), range(2), HOW
    )
    rows = plain_examples(x, y)
    targets = models.logits(rows) + 1.0 * torch.arange(3)
    for stacked in (True, False):
        moved = match(
            replace(models, stacked=stacked), rows, targets, torch.arange(5), torch.arange(5, 40), MatchingConfig()
        )
        assert all(torch.equal(moved.params[name], models.params[name]) for name in models.buffers)
        assert not torch.equal(moved.params["0.weight"], models.params["0.weight"])


def normed_site(net: Site, folder: Path) -> Site:
    """Batch norm on vectors, trained on rows of the fixture by torch alone."""
    from tests.unlearn.conftest import normed

    tensors = load_file(net.train)
    torch.manual_seed(3)
    model = alone(
        normed(), 3, plain_examples(tensors["inputs"], tensors["labels"]), torch.ones(90, dtype=torch.bool), HOW
    )
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "training.json").write_text(json.dumps({"epochs": 3, "batch": 7, "lr": 0.1, "decay": 0.01}))
    return replace(
        net, model=folder / "model.safetensors", factory=FACTORY.replace("make", "normed"),
        training=folder / "training.json",
    )  # fmt: skip


def of(site: Site, method: str, **more: Any) -> Unlearn:
    given: dict[str, Any] = {"train": site.train, "forget": site.forget, "factory": site.factory, "method": method}
    return Unlearn(**given | ({"training": site.training} if more.get("multiplier") is None else {}) | more)


def test_a_factory_s_model_is_retrained_with_statistics_of_its_own(net: Site, tmp_path: Path) -> None:
    """The written model is what a plain loop over the other rows gives, with numbers of batches."""
    from tests.unlearn.conftest import normed

    site = normed_site(net, tmp_path)
    unlearn(site.model, tmp_path / "out", of(site, "retrain"))
    made, tensors = load_file(tmp_path / "out/model.safetensors"), load_file(net.train)
    options = Training(epochs=3, batch=7, lr=0.1, decay=0.01)
    torch.manual_seed(0)
    rows = plain_examples(tensors["inputs"], tensors["labels"])
    expected = alone(normed(), 0, rows, torch.arange(90) >= 10, options).state_dict()
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == made[name].dtype and torch.allclose(made[name], tensor, atol=1e-5), name
    assert int(made["1.num_batches_tracked"]) == 3 * 12
    before = load_file(site.model)
    found = unlearn(site.model, tmp_path / "dmm", of(site, "dmm", calibrate=2))
    assert found["rate"]["tried"][0]["lr"] == 1e-4, "as published, for models whose statistics are frozen"
    after = load_file(tmp_path / "dmm/model.safetensors")
    assert all(torch.equal(after[n], before[n]) == (not n.endswith(("weight", "bias"))) for n in before)


def test_models_whose_statistics_are_means_of_all_batches_are_trained_one_by_one(tmp_path: Path) -> None:
    """vmap takes no momentum None; what it cannot run at once runs one after another, with torch's numbers."""
    torch.manual_seed(4)
    save_file({name: t.clone() for name, t in averaging().float().state_dict().items()}, tmp_path / "model.safetensors")
    x, y = images()
    rows, config = plain_examples(x.float(), y), Training(epochs=2, batch=7)
    trainable = open_model(tmp_path / "model.safetensors", "tensors", factory=f"{__name__}:averaging", device=CPU)
    assert trainable.stackable
    check_learning(trainable, rows)
    assert not trainable.stackable
    trainer = EnsembleTrainer(trainable, rows, config, Journal(tmp_path), lambda: trainable)
    models = trainer.models("all", torch.ones(2, 40, dtype=torch.bool), [0, 1])
    for seed in range(2):
        torch.manual_seed(seed)
        expected = alone(averaging().float(), seed, rows, torch.ones(40, dtype=torch.bool), config).state_dict()
        assert all(
            torch.allclose(models.params[name][seed].double(), t.double(), atol=1e-5) for name, t in expected.items()
        )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_statistics_are_in_the_journal(net: Site, tmp_path: Path) -> None:
    site = normed_site(net, tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"epochs": 30, "batch": 7, "lr": 0.1}))
    place = tmp_path / "runs"
    place.mkdir()
    run = partial(unlearn, site.model, options=of(site, "retrain"))
    kill_and_resume(run, place, ("retrained-moved-0-training",))
    assert int(load_file(place / "out/model.safetensors")["1.num_batches_tracked"]) == 30 * 12


def test_a_library_s_resnet_is_trained_by_its_own_statistics(tmp_path: Path) -> None:
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    g = torch.Generator().manual_seed(0)
    x, (_, y) = torch.randn(20, 1, 16, 16, generator=g), blobs(0, 20)
    save_file({"inputs": x, "labels": y}, tmp_path / "train.safetensors")
    (tmp_path / "training.json").write_text(json.dumps({"epochs": 2, "batch": 6, "lr": 0.05}))
    options = Unlearn(
        train=tmp_path / "train.safetensors", forget_lines="0-4", method="retrain", training=tmp_path / "training.json"
    )
    unlearn(tmp_path / "model", tmp_path / "out", options, allow_damage=True)
    torch.manual_seed(0)
    fresh = ResNetForImageClassification(AutoModelForImageClassification.from_pretrained(tmp_path / "model").config)
    rows = Examples({"pixel_values": x}, y)
    expected = alone(fresh, 0, rows, torch.arange(20) >= 5, Training(epochs=2, batch=6, lr=0.05)).state_dict()
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(made[name], tensor, atol=1e-5), name
    trainable = open_model(tmp_path / "model", "image-classification", device=CPU)
    trainer = EnsembleTrainer(trainable, rows, Training(epochs=1, batch=6), Journal(tmp_path), lambda: trainable)
    one, other = trainer.models("two", torch.arange(20) >= torch.tensor([[0], [10]]), [0, 0]).params[
        "resnet.embedder.embedder.normalization.running_mean"
    ]
    assert not torch.allclose(one, other)


class Frozen(nn.Module):
    """Batch norm in evaluation as a map of its own: scale and shift are learned, statistics are constants."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        assert norm.running_mean is not None and norm.running_var is not None
        self.constants = [norm.running_mean.clone(), norm.running_var.clone()]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.constants[0], self.constants[1], self.weight, self.bias)


def test_trak_scores_rows_of_a_model_with_running_statistics(net: Site, tmp_path: Path) -> None:
    """The same as for that function without buffers, which the package always took; and a whole job does."""
    from tests.unlearn.conftest import normed

    pytest.importorskip("trak", reason="needs the extra trak")
    site = normed_site(net, tmp_path)
    trainable = open_model(site.model, "tensors", factory=site.factory, device=CPU)
    rows = plain_examples(*(load_file(net.train)[name] for name in ("inputs", "labels")))
    twin: Any = normed().eval()
    twin.load_state_dict(load_file(site.model))
    twin[1] = Frozen(twin[1])
    params = {name: p.detach() for name, p in twin.named_parameters()}
    plain = replace(trainable, module=twin, forward=of_module(twin), params=params, buffers={})
    options = of(site, "dmm", estimator="trak", multiplier=1.0, width=12)
    deleted, asked = torch.arange(90) < 5, torch.arange(20)
    found, expected = (by_trak(one, rows, asked, options)(deleted, asked) for one in (trainable, plain))
    assert expected.abs().max() > 1e-3 and torch.allclose(found, expected, atol=1e-5)
    unlearn(site.model, tmp_path / "out", options)
    after, before = load_file(tmp_path / "out/model.safetensors"), load_file(site.model)
    assert torch.equal(after["1.running_var"], before["1.running_var"])


def test_only_matching_of_models_with_running_statistics_begins_at_the_published_rate() -> None:
    assert rates_for(normed=True, matched=True) == tuple(lr for lr in RATES if lr <= 1e-4) == RATES[2:]
    for normed, matched in ((True, False), (False, True), (False, False)):
        assert rates_for(normed=normed, matched=matched) == RATES
