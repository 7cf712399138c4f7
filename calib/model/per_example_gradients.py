"""Per-example gradients of linears, randomly projected, without a loop over examples.

The gradient of one example's loss by a weight is a sum over its tokens of (gradient of the output) x (input). Both
factors pass by on the way, for all examples of a batch, so both are projected before they meet (LoGra,
arXiv:2405.13954): a weight of out x in becomes outs x ins numbers for each example, and the whole gradient never
exists. What a linear does with a bias counts as one more input, which is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib import BadInput


@dataclass(frozen=True)
class LinearModule:
    """A module that multiplies by a weight (out, in): how wide its inputs (with one for the bias) and outputs are."""

    module: nn.Module
    ins: int
    outs: int
    bias: bool = False
    shape: tuple[int, ...] | None = None  # of the weight as it is kept, where that is not (out, in)
    transposed: bool = False


def linear_layers(module: nn.Module) -> dict[str, LinearModule]:
    """The linear layers of a module by their weights' names; convolutions count as linears of patches."""
    found = dict[str, LinearModule]()
    for name, m in module.named_modules():
        bias, weight = getattr(m, "bias", None) is not None, f"{name}.weight".removeprefix(".")
        if isinstance(m, nn.Linear):
            found[weight] = LinearModule(m, m.in_features + bias, m.out_features, bias)
        elif isinstance(m, Conv1D):
            found[weight] = LinearModule(m, m.nx + bias, m.nf, bias, transposed=True)
        elif isinstance(m, nn.Conv2d) and m.groups == 1 and isinstance(m.padding, tuple) and m.padding_mode == "zeros":
            shape = tuple(m.weight.shape)
            found[weight] = LinearModule(m, m.weight[0].numel() + bias, m.out_channels, bias, shape)
    return found


@dataclass(frozen=True)
class GradientProjection:
    """Random projections of one weight's gradient: ins (in, a) and outs (out, b), which keep lengths on average;
    identities where the weight is narrow."""

    ins: Tensor
    outs: Tensor

    @property
    def size(self) -> int:
        """Numbers that the projected gradient of an example has."""
        return self.ins.shape[1] * self.outs.shape[1]


def projections(
    linears: Mapping[str, LinearModule], each: int, seed: int | torch.Generator, device: torch.device | None = None
) -> dict[str, GradientProjection]:
    """Draw a projection for each linear, by its weight's name, of at most `each` squared numbers an example; the same
    on every device."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def drawn(rows: int) -> Tensor:
        if rows <= each:
            return torch.eye(rows, device=device)
        return (torch.randn(rows, each, generator=generator) / each**0.5).to(device)

    return {name: GradientProjection(drawn(one.ins), drawn(one.outs)) for name, one in linears.items()}


@dataclass
class CapturedLinear:
    """One call of a linear: its input (..., in), and a leaf of zeros that was added to its output."""

    inputs: Tensor
    probe: Tensor


@contextmanager
def probing(linears: Mapping[str, LinearModule]) -> Iterator[dict[str, list[CapturedLinear]]]:
    """Inside the `with`, each call of a linear is written down by its weight's name."""
    seen: dict[str, list[CapturedLinear]] = {name: [] for name in linears}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
            probe, x = torch.zeros_like(made, requires_grad=True), given[0].detach()
            if isinstance(module, nn.Conv2d):  # patches, as if they were tokens
                options: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
                x = nn.functional.unfold(x, *options).mT
            seen[name].append(CapturedLinear(x, probe))
            return made + probe

        return hook

    hooks = [one.module.register_forward_hook(watch(name)) for name, one in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def project_gradients(
    linears: Mapping[str, LinearModule],
    projected: Mapping[str, GradientProjection],
    run: Callable[[], Sequence[Tensor]],
    row_index: Tensor,
    rows: int,
) -> list[Tensor]:
    """Projected gradients of several sums over one pass.  -> (rows, D) each: names in order, one after another.

    run() passes `rows` examples through the model and gives scalars, each a sum of something of every example that
    depends on no other. A module sees examples, or decisions (d, in), and then `row_index` (d,) says whose they are.
    Raises BadInput where no linear is seen.
    """
    with probing(linears) as seen:
        totals = run()
    probes = [one.probe for calls in seen.values() for one in calls]
    if not probes:
        raise BadInput("features: the model runs no linear that attribution can see into; choose another estimator")
    results = []
    for i, total in enumerate(totals):
        gradients = torch.autograd.grad(total, probes, retain_graph=i + 1 < len(totals), allow_unused=True)
        results.append(project_captured(seen, gradients, projected, row_index, rows))
    return results


def project_captured(
    seen: Mapping[str, Sequence[CapturedLinear]],
    gradients: Sequence[Tensor | None],
    projected: Mapping[str, GradientProjection],
    row_index: Tensor,
    rows: int,
) -> Tensor:
    """Project each row's gradient from the gradients of all calls' probes, in order (None: zero).  -> (rows, D)."""
    left, parts = iter(gradients), []
    for name, calls in seen.items():
        p = projected[name]
        like = calls[0].probe if calls else p.ins
        part = like.new_zeros(rows, p.outs.shape[1], p.ins.shape[1])
        for one in calls:
            if (gradient := next(left)) is not None:
                part = part + outer_products(one.inputs, gradient, p, row_index, rows)
        parts.append(part.flatten(1))
    return torch.cat(parts, 1)


def outer_products(x: Tensor, gradient: Tensor, p: GradientProjection, row_index: Tensor, rows: int) -> Tensor:
    """(rows, b, a): sums over tokens of projected gradient x projected input."""
    if gradient.dim() == 4:  # of a convolution, channels first
        gradient = gradient.flatten(2).mT
    ins, outs = p.ins.to(x), p.outs.to(gradient)
    small, pulled = x @ ins[: x.shape[-1]], gradient @ outs
    if len(ins) > x.shape[-1]:
        small = small + ins[-1]
    if x.dim() > 2 and len(x) == rows:
        small, pulled = (z.reshape(rows, -1, z.shape[-1]) for z in (small, pulled))
        return torch.einsum("nto,nti->noi", pulled, small)
    if x.dim() > 2 or len(x) not in (rows, len(row_index)):
        raise BadInput(
            "features: a linear sees neither rows nor decisions, as those of experts do; choose another estimator"
        )
    each = torch.einsum("no,ni->noi", pulled, small)
    return each if len(x) == rows else each.new_zeros(rows, *each.shape[1:]).index_add(0, row_index, each)


def lifted(
    values: Tensor, linears: Mapping[str, LinearModule], projected: Mapping[str, GradientProjection]
) -> dict[str, Tensor]:
    """Map a vector (D,) of projected gradients back to weights and biases, by name: the projections' transpose."""
    found, start = dict[str, Tensor](), 0
    for name, one in linears.items():
        p = projected[name]
        part = values[start : start + p.size].view(p.outs.shape[1], p.ins.shape[1]).to(p.ins.dtype)
        start += p.size
        whole = p.outs @ part @ p.ins.mT
        if one.bias:
            found[name.removesuffix("weight") + "bias"] = whole[:, -1]
            whole = whole[:, :-1]
        whole = whole.mT if one.transposed else whole
        found[name] = whole if one.shape is None else whole.reshape(one.shape)
    return found
