"""Projected per-example gradients of a causal language model, with one block in memory at a time.

The numbers are those of `calib.model.per_example_gradients` for the whole model, to rounding: of every `nn.Linear`
inside a block (its bias as one more input; a tensor that keeps several linears is one) and of the product with the
head. Not in it are norms, the embedding's rows as they are looked up (also where the head is the same tensor), and
experts, whose weights the library stacks outside of linears.

Forward, each block's inputs are kept; backward, a block is read again, run again with a graph, and what its linears saw
meets the gradients of what they gave, projected. What is held is one block, beside embedding or head: not the model,
not its graph, and not the projections, which are drawn again where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.walk import RowBatch
from calib.model.per_example_gradients import (
    GradientProjection,
    LinearModule,
    linear_layers,
    outer_products,
    probing,
    project_captured,
    projections,
)

Totals = Callable[[slice, Tensor], Sequence[Tensor]]
Store = Callable[[tuple[int, ...], torch.dtype], ActivationStore]


class BlockwiseLinears:
    """The linears of a model in parts: those of each block in turn, and last the head. How the gradients of a part are
    projected is what `projections` draws for all of them together."""

    def __init__(self, stream: BlockwiseModel, width: int, seed: int) -> None:
        """width: how many numbers inputs and outputs of a linear are projected to, each."""
        self.stream, self.width = stream, width
        every = linear_layers(stream.skeleton)
        prefixes = [f"{stream.block_name(i)}." for i in range(stream.layers)]
        self.parts = [{n: one for n, one in every.items() if n.startswith(prefix)} for prefix in prefixes]
        name, head = stream.head
        self.parts.append({stream.tied.get(name, name): LinearModule(head, *head.weight.shape[::-1])})
        generator = torch.Generator().manual_seed(seed)
        self._starts = list[Tensor]()
        for part in self.parts:
            self._starts.append(generator.get_state())
            projections(part, width, generator)

    def projections(self, part: int) -> dict[str, GradientProjection]:
        """Projections by the weight's name, in the precision that the model runs in."""
        generator = torch.Generator()
        generator.set_state(self._starts[part])
        drawn = projections(self.parts[part], self.width, generator, self.stream.device)
        dtype = self.stream.dtype
        return {name: GradientProjection(p.ins.to(dtype), p.outs.to(dtype)) for name, p in drawn.items()}

    def sizes(self, part: int) -> dict[str, int]:
        """How many numbers an example's gradient has, by the weight's name."""
        return {n: min(self.width, one.ins) * min(self.width, one.outs) for n, one in self.parts[part].items()}


def blockwise_gradients(
    linears: BlockwiseLinears, ids: Tensor, target_mask: Tensor, totals: Totals, slices: Sequence[slice], store: Store
) -> Iterator[tuple[int, list[Tensor]]]:
    """Projected gradients of sums over rows, part by part from the head down to the first block.

    Args:
        linears: which linears, and how their gradients are projected.
        ids: token ids (n, T), padded on the right.
        target_mask: bool (n, T), where logits are asked for.
        totals: `totals(rows, logits)` gives scalars, each a sum over rows of something of a row's own logits; logits
            (d, V) are those at the decisions of `rows`, in order.
        slices: which rows pass through a block together.
        store: room for hidden states of a shape and dtype.

    Yields:
        (part, one tensor (n, D of the part) for each total).
    """
    stream, count, layers = linears.stream, len(ids), linears.stream.layers
    if not stream.walk.static:
        raise BadInput(
            f"config.json: blocks of {stream.config.model_type} are told of more than the hidden state, and gradients "
            "are not followed there; take a model of another type"
        )
    batches = [(rows, stream.batch(ids[rows])) for rows in slices]
    inputs = store((layers * count, *ids.shape[1:], *stream.walk.state_shape), stream.dtype)

    def place(i: int, rows: slice) -> slice:
        return slice(i * count + rows.start, i * count + rows.stop)

    # The last block is not run twice: what follows it is known at once.
    reading = stream.reading([*range(layers), *range(layers - 2, -1, -1)])
    _forward(stream, islice(reading, layers - 1), batches, inputs, place)
    above: ActivationStore | None = None  # gradients (K * n, T, d) of what a block gives
    head = _Head(linears, totals)
    for i, params in reading:
        projected, parts, heads = linears.projections(i), list[list[Tensor]](), list[list[Tensor]]()
        for rows, batch in batches:
            run = _Run(linears, i, params, inputs[place(i, rows)].to(stream.device), batch)
            if i == layers - 1:
                pulled, of_head = head.gradients(rows, run.output.detach(), target_mask[rows].to(stream.device))
                heads.append(of_head)
                if above is None:
                    above = store((len(pulled) * count, *pulled[0].shape[1:]), stream.dtype)
            else:
                assert above is not None
                pulled = [above[place(k, rows)].to(stream.device) for k in range(len(above) // count)]
            entering, found = run.pulled(pulled, projected)
            for k, gradient in enumerate(entering):
                above[place(k, rows)] = gradient
            parts.append(found)
            del run, pulled, entering, found
        del params, projected
        if heads:
            head.release()
            yield layers, [torch.cat(k) for k in zip(*heads, strict=True)]
        yield i, [torch.cat(k) for k in zip(*parts, strict=True)]


@torch.no_grad()
def _forward(
    stream: BlockwiseModel,
    reading: Iterator[tuple[int, Params]],
    batches: Sequence[tuple[slice, RowBatch]],
    inputs: ActivationStore,
    place: Callable[[int, slice], slice],
) -> None:
    """Keep what enters each block, as far as blocks are read."""
    start = stream.read_start()
    for rows, batch in batches:
        inputs[place(0, rows)] = stream.start(batch, start)
    del start
    for i, params in reading:
        for rows, batch in batches:
            inputs[place(i + 1, rows)] = stream.run(i, params, inputs[place(i, rows)].to(stream.device), batch)
        del params  # before the next is read


class _Run:
    """A block that has run on hidden states (b, T, d), with a graph from its inputs and its linears to its output."""

    def __init__(self, linears: BlockwiseLinears, block: int, params: Params, x: Tensor, batch: RowBatch) -> None:
        with torch.enable_grad(), probing(linears.parts[block]) as seen:
            self._x = x.requires_grad_()
            self.output = linears.stream.run(block, params, self._x, batch)
        self._seen = seen

    def pulled(
        self, from_above: Sequence[Tensor], projected: Mapping[str, GradientProjection]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From gradients of the output, those of the inputs (b, T, d) and of the linears (b, D), projected."""
        probes = [one.probe for calls in self._seen.values() for one in calls]
        entering, found, rows = list[Tensor](), list[Tensor](), len(self._x)
        for k, gradient in enumerate(from_above):
            again = k + 1 < len(from_above)
            to_x, *rest = torch.autograd.grad(
                self.output, [self._x, *probes], gradient, retain_graph=again, allow_unused=True
            )
            entering.append(to_x)
            found.append(project_captured(self._seen, rest, projected, torch.arange(rows, device=to_x.device), rows))
        return entering, found


class _Head:
    """The final norm and the head, read where they are first needed."""

    def __init__(self, linears: BlockwiseLinears, totals: Totals) -> None:
        self._linears, self._totals = linears, totals
        self._read: tuple[dict[str, Tensor], GradientProjection] | None = None

    def release(self) -> None:
        self._read = None

    def gradients(self, rows: slice, hidden: Tensor, target_mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of each total at hidden (b, T, d), and projected at the head's weight (b, D)."""
        stream = self._linears.stream
        if self._read is None:
            (projection,) = self._linears.projections(stream.layers).values()
            self._read = stream.read_end(), projection
        end, projection = self._read
        row_index = torch.arange(len(hidden), device=hidden.device).repeat_interleave(target_mask.sum(1))
        with torch.enable_grad():
            at = hidden[target_mask].requires_grad_()
            met = list[Tensor]()  # what the head is given, and what it makes of it
            hook = stream.head[1].register_forward_hook(lambda _, given, made: met.extend((given[0], made)))
            try:
                logits = stream.logits(at, end)
            finally:
                hook.remove()
            normed, product = met
            sums = self._totals(rows, logits)
        entering, found = list[Tensor](), list[Tensor]()
        for k, total in enumerate(sums):
            again = k + 1 < len(sums)
            (pulled,) = torch.autograd.grad(total, product, retain_graph=True)
            (to_hidden,) = torch.autograd.grad(product, at, pulled, retain_graph=again)
            whole = torch.zeros_like(hidden)
            whole[target_mask] = to_hidden
            entering.append(whole)
            found.append(
                outer_products(
                    normed.detach().flatten(0, -2), pulled.flatten(0, -2), projection, row_index, len(hidden)
                ).flatten(1)
            )
        return entering, found
