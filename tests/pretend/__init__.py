"""A pretend accelerator, the device "pretend": CPU memory that behaves as a GPU's does, and counts.

It refuses operations whose tensors lie on two devices, as CUDA does, and counts kernel launches, copies and their bytes
each way, and the times the host waits. It is compiled from `device.cpp` when it is first asked for, which needs a C++
compiler, ninja and a minute, and is kept in the environment's own folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import types
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOM = 2**33  # bytes that it says it has
SOURCE = Path(__file__).with_name("device.cpp")


class Missing(Exception):
    """There is no pretend device to be had, and why."""


@cache
def device() -> torch.device:
    """Raises Missing."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        raise Missing(f"the pretend device is for torch 2.13; with {torch.__version__} jobs on it abort the process")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's ninja
    if lacking := [name for name in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(name) is None]:
        raise Missing(f"no {' and no '.join(lacking)} here, to compile the pretend device with")
    from torch.utils import cpp_extension

    text = SOURCE.read_bytes() + torch.__version__.encode()
    place = Path(sys.prefix) / "pretend-device" / hashlib.sha256(text).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "pretend_device", [str(SOURCE)], extra_cflags=["-O1", "-w"], build_directory=str(place), is_python_module=False
    )
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _module())
    # The CPU's optimizers take one parameter after the other; so that the bits are the same, these do too.
    sys.modules["torch.optim.optimizer"]._get_foreach_kernels_supported_devices = lambda: ["cuda"]  # type: ignore
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return torch.device("pretend")


def _module() -> types.ModuleType:
    """What torch asks of an accelerator's module."""
    module: Any = types.ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.manual_seed = module.manual_seed_all = lambda value: None
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.synchronize = lambda device=None: None
    module.device = lambda device: nullcontext()
    module.is_bf16_supported = lambda: True
    module.mem_get_info = lambda device=None: (ROOM - counted()["held_bytes"], ROOM)
    module.memory_reserved = module.memory_allocated = lambda device=None: counted()["held_bytes"]
    module.max_memory_allocated = lambda device=None: counted()["most_bytes"]
    return module


def counted() -> dict[str, int]:
    """launches, to_device(_bytes), to_host(_bytes), waits, most_bytes and held_bytes since `reset`."""
    return dict(torch.ops.pretend.counted())


def launches() -> dict[str, int]:
    """Operations by their names since `reset`."""
    return dict(torch.ops.pretend.launches())


def reset() -> None:
    torch.ops.pretend.reset()


def hold_at_most(bytes: int) -> None:
    """What is asked for beyond is out of memory, as on a device of that size; 0: no end."""
    torch.ops.pretend.hold_at_most(bytes)
