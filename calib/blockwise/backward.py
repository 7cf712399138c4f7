"""Gradients of a whole model, one block in memory at a time.

Forward, every block is read, prepared (transformed, rounded, whatever is learned does) and run without a graph; only
its inputs are kept. Backward, each is read and prepared again, run again with a graph, and the gradient of its inputs
handed to the block before it. What is held is one block, the inputs of all blocks for one batch (on disk beyond a
budget), and what is learned: nothing else grows with depth. Recomputing a forward pass to save what it would have kept
is arXiv:1604.06174; here the weights go too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from calib.blockwise.activation_store import NO_ROOM, ActivationStore
from calib.blockwise.model import Params
from calib.blockwise.walk import RowBatch
from calib.runtime.device import DeviceMemory

_Raw = TypeVar("_Raw")


@dataclass(frozen=True)
class BlockSequence(Generic[_Raw]):
    """A sequence of blocks to run forward and backward.  `prepare` is differentiable in whatever is learned; it is
    called once per block and pass, however many micro-batches then run through the block."""

    layers: int
    reading: Callable[[Iterable[int]], Iterator[tuple[int, _Raw]]]  # blocks, in the order asked for
    prepare: Callable[[int, _Raw], Params]
    run: Callable[[int, Params, Tensor, RowBatch], Tensor]  # (rows, T, d) -> (rows, T, d)
    room: DeviceMemory = NO_ROOM  # what may be kept on the device between uses
    finish: Callable[[int], None] = lambda index: None  # when all gradients of what a block was prepared from are in

    @property
    def device(self) -> torch.device:
        """The device that blocks run on."""
        return self.room.device


def _nothing(index: int, params: Params) -> None:
    pass


def backward(
    walk: BlockSequence[_Raw],
    first: Tensor,
    last: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
    inputs: ActivationStore,
    batches: Sequence[tuple[slice, RowBatch]],
    after: Callable[[int, Params], None] = _nothing,
) -> float:
    """Add the gradients of a batch's loss to the .grad of everything `walk` and `first` depend on.  -> the loss.

    first (B, T, d) enters the first block. last(rows, hidden) -> (the share of these rows in the loss (), its gradient
    with respect to hidden (rows, T, d)). inputs (layers * B, T, d) is room for block inputs; `batches` are the rows
    that pass through a block together. after(index, parameters) is called when gradients have gone through a block.
    """
    batch = len(first)
    if not batch:  # a process among several may have no row of this batch
        return 0.0
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    gradient = torch.empty_like(first, requires_grad=False)

    def place(i: int, rows: slice) -> slice:
        return slice(i * batch + rows.start, i * batch + rows.stop)

    for rows, _ in batches:
        inputs[place(0, rows)] = first[rows]
    # The last block is not run twice: what follows it is known at once.
    reading = walk.reading([*range(walk.layers), *range(walk.layers - 2, -1, -1)])
    for i, raw in islice(reading, walk.layers - 1):
        with torch.no_grad():
            params = walk.prepare(i, raw)
            for rows, some in batches:
                inputs[place(i + 1, rows)] = walk.run(i, params, inputs[place(i, rows)].to(walk.device), some)
        del raw, params  # before the next is read
    for i, raw in reading:
        prepared = walk.prepare(i, raw)
        # What is kept of the way here is where gradients enter it, not what came out.
        edges = {name: get_gradient_edge(p) for name, p in prepared.items() if p.requires_grad}
        params = {name: p.detach().requires_grad_(p.requires_grad) for name, p in prepared.items()}
        del prepared
        for rows, some in batches:
            x = inputs[place(i, rows)].to(walk.device).requires_grad_()
            y = walk.run(i, params, x, some)
            if i == walk.layers - 1:
                loss, from_above = last(rows, y.detach())
                total += loss
            else:
                from_above = gradient[rows]
            torch.autograd.backward(y, from_above)
            assert x.grad is not None
            gradient[rows] = x.grad
        after(i, params)
        gradients = {name: params[name].grad for name in edges}
        del raw, params, x, y, from_above
        for name in list(edges):  # one by one, and each forgotten when it is done; what they share is needed by all
            if (edge := edges.pop(name)) and (from_block := gradients.pop(name)) is not None:
                torch.autograd.backward(edge, from_block, retain_graph=True)
        walk.finish(i)
    if first.requires_grad:
        torch.autograd.backward(first, gradient)
    return float(total)
