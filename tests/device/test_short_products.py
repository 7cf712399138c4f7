"""Products of a block may be short on a device; whatever this project sums itself may not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calib.stats.moments import Moments
from compressor import distill, quantize
from tests import tiny
from tests.device.conftest import DEVICE
from tests.device.test_jobs import DISTILL, QUANTIZE

SUMS = ("sum", "mean", "mm", "bmm", "addmm", "addr", "baddbmm", "dot", "mv", "logsumexp", "_softmax", "_log_softmax",
        "cumsum", "index_add", "linalg_vector_norm", "var", "std", "native_layer_norm", "cdist")  # fmt: skip
ROOT = Path(__file__).parents[2]
BLOCKS_OWN = ROOT / "calib/blockwise/moe_hooks.py"  # stands in for a part of the library's block


class Short(TorchDispatchMode):
    """Notes sums of values in 16 bits that are called from this project, not from within a library's module."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        name = op.overloadpacket.__name__.rstrip("_")
        if name in SUMS and any(
            isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4 for x in tree_leaves(given)
        ):
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back  # type: ignore[assignment]
            file = Path(frame.f_code.co_filename) if frame is not None else Path()
            if file.is_relative_to(ROOT) and ".venv" not in file.parts and file not in (BLOCKS_OWN, Path(__file__)):
                self.found.add(f"{file.name}:{frame.f_lineno} {name}")
        return op(*given, **(options or {}))


JOBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "quantize": lambda model, text, out: quantize(
        model, out, replace(QUANTIZE, data=text, device=DEVICE, precision="auto", scheme="w4a8kv4")
    ),
    "distill": lambda model, text, out: distill(
        model, out,
        replace(DISTILL, data=text, device=DEVICE, precision="auto", layers=1, loss="ce+js(0.9)+0.1*hidden+0.1*cka"),
    ),
    "distill, states": lambda model, text, out: distill(
        model, out,
        replace(DISTILL, data=text, device=DEVICE, precision="auto", layers=1, force=True,
                loss="forward-kl+0.1*gram+0.1*attention+0.1*sinkhorn-hidden+0.1*sinkd"),
    ),
}  # fmt: skip


# A mixture is not distilled: its library asks devices that are no CPU for a histogram of integers, which CUDA has.
@pytest.mark.parametrize(("model_type", "job"), [("mixtral", "quantize"), *(("llama", job) for job in JOBS)])
def test_no_job_sums_in_16_bits(model_type: str, job: str, text_file: Path, tmp_path: Path) -> None:
    model = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.bfloat16), tmp_path / "model")
    with Short() as short:
        JOBS[job](model, text_file, tmp_path / "out")
    assert not short.found


def test_it_would_be_noticed() -> None:
    x = torch.randn(30, 8, device=DEVICE)
    with Short() as short, torch.autocast(DEVICE, torch.bfloat16):
        Moments.zero(8, x.device).add(x)
        assert not short.found
        _shortened(x)


def _shortened(x: Tensor) -> None:
    from calib.losses import chunked_head

    with Short() as short, torch.autocast(DEVICE, torch.bfloat16):
        chunked_head.Head(x)(x)
    assert {found.split()[1] for found in short.found} == {"mm"}
