from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from calib.anatomy import ANATOMIES


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's RMS norms and rotary tables compute in float32 even in a float64 model; here they must not."""

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        gain = self.weight + (1 if "Gemma" in type(self).__name__ else 0)
        return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    for model_type in ANATOMIES:
        module = import_module(CONFIG_MAPPING[model_type].__module__.replace("configuration", "modeling"))
        (norm,) = (
            c for name, c in vars(module).items() if name.endswith("RMSNorm") and c.__module__ == module.__name__
        )
        monkeypatch.setattr(norm, "forward", forward)
    # Routers and eager attention take their softmax in single precision.
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
