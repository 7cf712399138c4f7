"""The device that computes: which one, how much memory it has left, and what to keep and to do at once on it.

Everything that differs between a CPU and an accelerator is decided here, so that all other code is written once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from calib import BadInput
from calib.runtime.choices import DEVICES
from calib.runtime.memory import available_memory, peak_rss

ACCELERATORS = ("cuda",)

# Values that an elementwise search works on together: on a CPU as many as stay in its cache, on an accelerator so many
# that launching kernels costs nothing beside running them.
CACHED, LAUNCHED = 2**16, 2**26


def pick_device(name: str) -> torch.device:
    """The device called `name`, one of DEVICES; "auto" takes CUDA where there is a device, else the CPU.

    CUDA is asked for deterministic algorithms, so that a job run twice gives the same bytes. Raises BadInput.
    """
    if name not in (*DEVICES, *ACCELERATORS):
        raise BadInput(f"device '{name}' is unknown; choose from {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device cuda: {_why_no_cuda(torch.version.cuda or torch.version.hip)}, or use --device cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda" if name == "auto" else name)


def _why_no_cuda(built_for: str | None) -> str:
    """Why this build of torch has no CUDA device, and what to do; `built_for` is its version of CUDA, if any."""
    if built_for is not None:
        return f"torch is built for CUDA {built_for} and sees no device; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    version = torch.__version__
    return (
        f"torch {version} is built without CUDA; install a build that has it (pip install --force-reinstall "
        f"torch=={version.partition('+')[0]} from the index that pytorch.org/get-started names)"
    )


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors have to be copied to `device`, and its work is launched and not called."""
    return device.type != "cpu"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`, what the allocator keeps unused included."""
    if not is_accelerator(device):
        return available_memory()
    module = _module(device)
    return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held so far, on the accelerator where `device` is one."""
    return int(_module(device).max_memory_allocated(device)) if is_accelerator(device) else peak_rss()


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are what `device` is made for."""
    return is_accelerator(device) and bool(_module(device).is_bf16_supported())


def elements_at_once(device: torch.device) -> int:
    """Values that an elementwise search works on together; on an accelerator with little memory fewer."""
    return max(CACHED, min(LAUNCHED, _total_memory(device) // 64)) if is_accelerator(device) else CACHED


@cache
def _total_memory(device: torch.device) -> int:
    return int(_module(device).mem_get_info(device)[1])


@dataclass(frozen=True)
class DeviceMemory:
    """A cache of tensors on `device`, bounded by what is free there less `reserve` bytes that work needs.

    `limit`: bytes of the accelerator that this process may take in all; None: as many as there are.
    """

    device: torch.device
    reserve: int = 0
    limit: int | None = None

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        free = free_memory(self.device)
        if self.limit is None:
            return free
        return min(free, self.limit - int(_module(self.device).memory_allocated(self.device)))

    def fits(self, size: int) -> bool:
        """Whether `size` bytes may be kept on an accelerator; on a CPU nothing is kept beyond what is asked for."""
        return is_accelerator(self.device) and size + self.reserve <= self.free

    def fits_pinned(self, size: int) -> bool:
        """Whether `size` bytes may be kept in RAM, pinned, for an accelerator: half of what is available."""
        return is_accelerator(self.device) and 2 * size <= available_memory()


def memory_budget_bytes(gibibytes: float | None, device: torch.device) -> int:
    """Bytes of RAM for hidden states: as given, or a quarter of what is available, on a CPU 2 GiB at most."""
    if gibibytes is not None:
        return int(gibibytes * 2**30)
    return available_memory() // 4 if is_accelerator(device) else min(2**31, available_memory() // 4)


def check_budget(gibibytes: float | None, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Raises BadInput where a budget that was given cannot hold the hidden states of one row."""
    least = tokens * width * dtype.itemsize
    if gibibytes is not None and gibibytes * 2**30 < least:
        raise BadInput(
            f"memory-budget is {gibibytes:g} GiB; the hidden states of one row of {tokens:,} tokens take {least:,} "
            f"bytes, so give at least {math.ceil(least / 2**30 * 1e6) / 1e6:g}, or leave it out"
        )


def device_memory_limit(gibibytes: float | None, device: torch.device) -> int | None:
    """Bytes of an accelerator that a job may take.  Raises BadInput where there is none."""
    if gibibytes is None:
        return None
    if not is_accelerator(device):
        raise BadInput("device-memory: is about an accelerator, and this job runs on the CPU; use --memory-budget")
    return int(gibibytes * 2**30)


@contextmanager
def allow_tf32(device: torch.device) -> Iterator[None]:
    """Inside the `with`, products of float32 on CUDA may round what they multiply to 11 bits (TF32), and are faster;
    sums stay float32.  For what is learned by descent, not for what is stored or measured."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fork_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Inside the `with`, torch's generators of the CPU and of `device` start from `seed`; after it they go on as if
    nothing had been drawn."""
    devices = [device] if is_accelerator(device) else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
