"""Everything here runs on the pretend device, and skips, saying so, where that cannot be compiled; jobs also on CUDA,
with PAREWELL_DEVICE=cuda."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from calib.runtime import device as devices
from tests import pretend
from tests.unlearn.conftest import net, words, words_text

DEVICE = os.environ.get("PAREWELL_DEVICE", "pretend")

__all__ = ["net", "words", "words_text"]


@pytest.fixture(scope="session", autouse=True)
def there() -> Iterator[torch.device]:
    """The pretend device, which jobs know as "pretend", or CUDA."""
    if DEVICE != "pretend":
        yield torch.device(DEVICE)
        return
    try:
        device = pretend.device()
    except pretend.Missing as error:
        pytest.skip(str(error))
    try:
        torch.ones(1, device=device, requires_grad=True).sum().backward()
    except RuntimeError:  # autograd counts devices once
        pytest.skip("gradients were taken before there was a pretend device; run pytest tests/device by itself")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "ACCELERATORS", ("cuda", "pretend"))
        yield device


@pytest.fixture(autouse=True)
def counted_from_zero(there: torch.device) -> Iterator[None]:
    if DEVICE != "pretend":
        yield
        return
    pretend.reset()
    # CUDA's and the CPU's tensors change places within a parameter; those of a device of one's own do so only by this.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU has another, whose last bits differ
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)
    pretend.hold_at_most(0)
