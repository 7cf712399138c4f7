from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of widths that blocks of 128 divide."""
    model = tiny.model_of(tiny.config_of("llama", **tiny.BY_128), dtype=torch.bfloat16)
    return tiny.save(model, tmp_path_factory.mktemp("by_128") / "model")
