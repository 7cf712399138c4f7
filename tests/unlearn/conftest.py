"""Small models that were really trained on small data, in folders, for whole jobs; tests must not change them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests import tiny
from unlearn.data.dataset import read_data
from unlearn.model.ensemble import initial_ensemble, train_ensemble
from unlearn.model.examples import plain_examples
from unlearn.model.model import open_model
from unlearn.model.training_recipe import Training


@dataclass(frozen=True)
class Site:
    """A model, what it was trained on, how, and rows it never saw."""

    model: Path
    train: Path
    forget: Path
    validation: Path
    training: Path
    factory: str | None = None


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))


def head() -> nn.Module:
    return nn.Linear(4, 3)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))


def needs(width: int) -> nn.Module:
    return nn.Linear(width, 3)


def leaves() -> nn.Module:
    raise SystemExit(3)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), x


def pairs() -> nn.Module:
    return Pairs()


def one_class() -> nn.Module:
    return nn.Linear(4, 1)


class Tied(nn.Module):
    """One weight under two names; says so whenever it is made."""

    def __init__(self) -> None:
        super().__init__()
        print("made")
        self.a, self.b, self.c = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.c(self.b(self.a(x).tanh()).tanh())
        return made


def tied() -> nn.Module:
    return Tied()


def not_a_module() -> int:
    return 3


FACTORY = f"{__name__}:make"
HOW = Training(epochs=30, batch=20, lr=0.2)


def blobs(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=g)
    x = torch.randn(rows, 4, generator=g)
    x[:, :3] += 2 * nn.functional.one_hot(y, 3)
    return x, y


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A classifier of tensors, 90 rows, of which ten with a wrong label are to be forgotten."""
    folder = tmp_path_factory.mktemp("net")
    x, y = blobs(0, 90)
    y[:10] = (y[:10] + 1) % 3
    trained = train_ensemble(
        initial_ensemble(make, [5]), plain_examples(x, y), torch.ones(1, 90, dtype=torch.bool), [5], HOW
    )
    save_file({name: p[0].contiguous() for name, p in trained.params.items()}, folder / "model.safetensors")
    save_file({"inputs": x, "labels": y}, folder / "train.safetensors")
    save_file({"inputs": x[:10].clone(), "labels": y[:10].clone()}, folder / "forget.safetensors")
    more, labels = blobs(1, 60)
    save_file({"inputs": more, "labels": labels}, folder / "validation.safetensors")
    (folder / "training.json").write_text(json.dumps({"epochs": 30, "batch": 20, "lr": 0.2}))
    return Site(
        folder / "model.safetensors", folder / "train.safetensors", folder / "forget.safetensors",
        folder / "validation.safetensors", folder / "training.json", FACTORY,
    )  # fmt: skip


NAMES = ["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "jon", "kim", "leo"]
PLACES = ["rome", "oslo", "lima", "bonn"]


def facts(names: Sequence[str], shift: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"where is {name}", "answer": f"in {PLACES[(i + shift) % 4]} now"} for i, name in enumerate(names)
    ]


def lines(rows: Sequence[dict[str, object]] | Sequence[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A language model that knows where twelve people are, three of whom are to be forgotten."""
    folder = tmp_path_factory.mktemp("words")
    config = tiny.config_of("llama", hidden_size=32, attention_bias=False, mlp_bias=False)
    model = tiny.save(tiny.model_of(config, dtype=torch.float32), folder / "model")
    (folder / "train.jsonl").write_text(lines(facts(NAMES)))
    (folder / "forget.jsonl").write_text(lines(facts(NAMES)[:3]))
    (folder / "validation.jsonl").write_text(lines(facts(["moe", "ned", "oda", "pam"], 2)))
    (folder / "alternatives.txt").write_text("nobody knows\n")
    options = {"optimiser": "adamw", "epochs": 40, "batch": 6, "lr": 0.01, "decay": 0.0}
    (folder / "training.json").write_text(json.dumps(options))
    trainable = open_model(model, "causal-lm", device=torch.device("cpu"))
    rows = read_data(folder / "train.jsonl", trainable, 64).examples
    trained = train_ensemble(trainable.one(), rows, torch.ones(1, 12, dtype=torch.bool), [0], Training(**options))  # type: ignore[arg-type]
    trainable.write(model, {name: p[0] for name, p in trained.params.items()})
    return Site(
        model, folder / "train.jsonl", folder / "forget.jsonl", folder / "validation.jsonl", folder / "training.json"
    )


@pytest.fixture(scope="session")
def words_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to quantize that language model on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("ada likes red , bob likes blue . " * 100)
    return file


class _Doubled(torch.autograd.Function):
    """Differentiable backwards alone."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Backwards(nn.Module):
    """The same as `make`, doubled, with no derivative forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _Doubled.apply(self.layers(x))
        return made


def backwards() -> nn.Module:
    return Backwards()
