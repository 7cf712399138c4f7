"""Double precision all the way: the library's norms, rotary tables and routers use single precision even in a float64
model, and where gradients or functions are compared to the last digit they must not."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from calib.blockwise.architectures import ARCHITECTURES

Set = Callable[[object, str, object], None]


def exact_norms(replace: Set) -> None:
    """`replace(owner, name, value)` is setattr, or a monkeypatch's, which undoes it."""

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        gain = self.weight + (1 if "Gemma" in type(self).__name__ else 0)
        return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    for model_type in ARCHITECTURES:
        module = import_module(CONFIG_MAPPING[model_type].__module__.replace("configuration", "modeling"))
        own = (c for c in vars(module).values() if getattr(c, "__module__", None) == module.__name__)
        (norm,) = (c for c in own if getattr(c, "__name__", "").endswith("RMSNorm"))
        replace(norm, "forward", forward)
    # Routers and eager attention take their softmax in single precision.
    replace(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
