"""Shared fixtures.  Tests that need real data find it under PAREWELL_DATA and skip, saying so, where it is unset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from calib.runtime import progress
from compressor.engine import damage
from tests import bert as encoder
from tests import tiny

JUDGED = {name: getattr(damage, name) for name in ("LEAST_AGREEMENT", "KL_TOLERANCE", "EXPORTED")}
settings.register_profile("parewell", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("parewell")
torch.set_num_threads(1)  # for tensors this small a second thread only waits for the first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the pretend device come last: from then on torch and its libraries see an accelerator."""
    items.sort(key=lambda item: "tests/device/" in item.path.as_posix())


@pytest.fixture(scope="session", autouse=True)
def _any_damage() -> Iterator[None]:
    """Models with random weights mean nothing that rounding could leave alone: jobs on them are not judged, but where a
    test asks for it (`judged`)."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST_AGREEMENT": 0.0, "KL_TOLERANCE": float("inf"), "EXPORTED": float("inf")}.items():
            patch.setattr(damage, name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_lines() -> Iterator[None]:
    """How long the suite runs must not show in what a test sees on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "EVERY", 1e6)
        yield


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are judged as users' are."""
    for name, value in JUDGED.items():
        monkeypatch.setattr(damage, name, value)


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("PAREWELL_DATA")
    if not folder:
        pytest.skip("PAREWELL_DATA is not set: no real models or text here")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama folder; tests must not change it."""
    return tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's folder; tests must not change it."""
    return encoder.save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog while nobody looks\n" * 60)
    return file
