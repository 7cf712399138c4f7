"""Several processes that share a job: each takes some of the rows, sums are taken over all of them.

The processes and the way between them are torchrun's (or accelerate's) and torch.distributed's; started alone, a
process finds itself the first of one. All must see the folder that OUT lies in.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from calib import BadInput, Diverged, Failed, NoSpace

_alone: bool | None = None  # whether this process, which works as if it were the only one, writes; None: it does not


def world_size() -> int:
    """Count the processes of this job; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() and _alone is None else 1


def rank() -> int:
    """Number this process among those of the job; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() and _alone is None else 0


def is_main_process() -> bool:
    """Whether this is the process of rank 0, which alone writes outputs."""
    return rank() == 0 if _alone is None else _alone


def process_count() -> int:
    """How many processes there are, also where each works as if it were the only one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def replicated() -> Iterator[None]:
    """Have all processes do the same within the `with` block, each as if it were the only one; the main one alone
    writes. What can be divided is divided by `sharing`."""
    global _alone
    before, _alone = _alone, is_main_process()
    try:
        yield
    finally:
        _alone = before


_sharing = False


@contextmanager
def sharing() -> Iterator[Callable[[Sequence[int]], list[int]]]:
    """Divide pieces of work that do not depend on each other, and whose results are written, among processes.

    What it gives chooses this process's among the numbers of all pieces. All leave together, or none does and all
    raise; inside another `sharing`, where the others are elsewhere, all pieces are this process's.
    """
    global _alone, _sharing
    if _sharing:
        yield list
        return
    before, _alone = _alone, None
    own, count, _sharing = rank(), world_size(), True
    try:
        with raise_together():
            _alone = True
            try:
                yield lambda numbers: [number for number in numbers if number % count == own]
            finally:
                _alone = None
    finally:
        _alone, _sharing = before, False


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def shared_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that the first process makes for all, in `parent` or where the system keeps such, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="parewell-", dir=parent) if is_main_process() else nullcontext("") as made:
        found = [made]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        yield Path(found[0])
        barrier()


@contextmanager
def raise_together() -> Iterator[None]:
    """Raise in every process, with the same words, an error that one of them raises (or is interrupted by) within the
    `with` block, instead of leaving the others to wait."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    found: list[tuple[str, str] | None] = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, error and (type(error).__name__, str(error) or "another process was interrupted"))
    if error is not None and not isinstance(error, BadInput):
        raise error
    kind, words = next((one for one in found if one is not None), ("BadInput", str(error) if error else ""))
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if words:
        raise {"Failed": Failed, "Diverged": Diverged, "NoSpace": NoSpace}.get(kind, BadInput)(words) from error


def local_indices(rows: int) -> list[int]:
    """Numbers of the rows, out of `rows`, that this process takes."""
    return list(range(rank(), rows, world_size()))


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes.  All of one dtype; they travel together."""
    if world_size() > 1 and tensors:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, summed in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def all_reduce_max_(tensor: Tensor) -> None:
    """Replace the tensor by its elementwise maximum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


# A model that no process can hold: of each block, every process keeps a share (FSDP2).


def shard(body: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep of each block's parameters a share in every process; a block is whole while it runs.

    What of `body` is outside of its blocks stays whole everywhere. From now on all must call `body` equally often;
    gradients of blocks come as sums over processes. Moves blocks to `device`, the kind that computes, not the rest;
    what is on the meta device stays there, and has still to be given room and values.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        _share(block, mesh)
    inside = {p for block in blocks for p in block.parameters()}
    _share(body, mesh, ignored_params=set(body.parameters()) - inside)


def _share(module: nn.Module, mesh: Any, **options: Any) -> None:
    fully_shard(module, mesh=mesh, **options)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # a sum, not a mean
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has a share of it only."""
    return isinstance(tensor, DTensor)


def group_by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split tensors into those that are whole on every process and those that are sharded, as torch takes no
    mixture."""
    kinds = ([t for t in tensors if is_sharded(t) == shared] for shared in (False, True))
    return [kind for kind in kinds if kind]


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor whole, on the CPU; others stay as they are.  Every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of `value`, which all have whole, if it has but a share of `like`."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local_share(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor, in the same memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def from_local_share(share: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as `like` is, of which this process has `share`."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together, shares of all processes included.  -> ()."""
    found = [nn.utils.get_total_norm(some) for some in group_by_kind(tensors)]
    parts = [size.full_tensor() if isinstance(size, DTensor) else size for size in found]
    return parts[0] if len(parts) == 1 else torch.stack(parts).norm()


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Inside the `with`, this process is one of those that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # A process may wait long for another: the first saves a large model alone.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # what a shared model still holds of the group must not outlive the interpreter
