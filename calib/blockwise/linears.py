"""The matrix products of a block: where each weight lies, what it is called on disk, and which read the same input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.blockwise import moe_hooks
from calib.blockwise.stored_names import Piece


@dataclass(frozen=True)
class Linear:
    """A matrix (out, in) that a block multiplies by.

    Args:
        name: of the tensor on disk, without `.weight`.
        site: name of the first linear that reads the same input, which is this one's where it reads alone.
        module: from the block, that multiplies.
        parameter: from the block, that holds the matrix or has it as a part.
        shape: (out, in).
        expert: where the parameter is stacked, which of its matrices.
        rows: where the parameter holds several, the range of its outputs.
        step: of an expert, which of its two inputs it reads.
        transposed: whether the parameter is (in, out).
        named_here: whether the checkpoint has one tensor for all experts, so that the name is ours.
        read_elsewhere: whether the library's code reads the weight past the module that multiplies by it, or has a
            class of its own for that, so that no other loader can put codes in its place.
        crosses: whether it reads another stack's answer, as the keys and values of cross-attention do, and not what
            stands for the block's own tokens.
    """

    name: str
    site: str
    module: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    step: Literal["in", "down"] | None = None
    transposed: bool = False
    named_here: bool = False
    read_elsewhere: bool = False
    crosses: bool = False

    def of(self, params: Mapping[str, Tensor]) -> Tensor:
        """The matrix (out, in), a view into the block's parameters."""
        whole = params[self.parameter]
        matrix = whole if self.expert is None else whole[self.expert]
        matrix = matrix.mT if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]


def put_together(linears: Sequence[Linear], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a block from its matrices (out, in) by name; of a parameter all parts must be there, or none."""
    parts = dict[str, dict[int | None, list[Linear]]]()
    for linear in linears:
        if linear.name in weights:
            parts.setdefault(linear.parameter, {}).setdefault(linear.expert, []).append(linear)

    def whole(some: list[Linear]) -> Tensor:
        rows = [weights[one.name] for one in sorted(some, key=lambda one: one.rows or (0, 0))]
        matrix = rows[0] if len(rows) == 1 else torch.cat(rows)
        return matrix.mT if some[0].transposed else matrix

    return {
        name: whole(by_expert[None]) if None in by_expert
        else torch.stack([whole(by_expert[e]) for e in sorted(by_expert, key=lambda e: e or 0)])
        for name, by_expert in parts.items()
    }  # fmt: skip


def without(linears: Sequence[Linear], names: Collection[str]) -> tuple[Linear, ...]:
    """The linears but for those called `names`; of those left that read one input the first is their site."""
    kept, sites = [one for one in linears if one.name not in names], dict[str, str]()
    for one in kept:
        sites.setdefault(one.site, one.name)
    return tuple(replace(one, site=sites[one.site]) for one in kept)


@dataclass(frozen=True)
class Product:
    """A module that multiplied while a block ran: its name from the block, that of the first that read the same input,
    and whether that was handed to the block beside the hidden state."""

    module: str
    site: str
    crosses: bool = False


@contextmanager
def watching_weights() -> Iterator[set[int]]:
    """The ids of linears whose weight others read within the `with` block, not they themselves as they multiply."""
    read, inside = set[int](), list[int]()
    forward = nn.Linear.forward

    def multiply(self: nn.Linear, x: Tensor) -> Tensor:
        inside.append(id(self))
        try:
            return forward(self, x)
        finally:
            inside.pop()

    def look(self: nn.Linear, name: str) -> Any:
        if name == "weight" and id(self) not in inside:
            read.add(id(self))
        return nn.Module.__getattr__(self, name)

    nn.Linear.forward, nn.Linear.__getattr__ = multiply, look  # type: ignore[method-assign,assignment]
    try:
        yield read
    finally:
        nn.Linear.forward = forward  # type: ignore[method-assign]
        del nn.Linear.__getattr__


@contextmanager
def watching_products(block: nn.Module, seen: list[Product], others: Sequence[Tensor] = ()) -> Iterator[None]:
    """Note, in their order, modules of a block that multiply while it runs; `others` are what it is given beside the
    hidden state."""
    inputs = list[tuple[str, Tensor]]()

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            first = next((n for n, other in inputs if other is x), name)
            inputs.append((name, x))
            seen.append(Product(name, first, any(x is other for other in others)))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or moe_hooks.has_experts(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linears_of(
    block: nn.Module,
    prefix: str,
    products: Sequence[Product],
    elsewhere: Collection[str],
    pieces: Callable[[str], Sequence[Piece]],
) -> tuple[Linear, ...]:
    """The linears of a block that are to be quantized: all but routers.

    Args:
        block: the library's, on the meta device.
        prefix: its name in the model.
        products: what was seen while it ran.
        elsewhere: names of linears whose weight others read.
        pieces: the stored tensors that a parameter of the model is made of.

    Returns:
        The linears in the order in which data meets them.
    """
    experts = {getattr(module, "num_experts", None) for module in block.modules() if moe_hooks.has_experts(module)}
    routers = tuple(f"{name}." for name, module in block.named_modules() if "router" in type(module).__name__.lower())
    sites, crossing = dict[str, set[str]](), {product.module for product in products if product.crosses}
    for product in products:
        sites.setdefault(product.module, set()).add(product.site)
    found, names = list[Linear](), dict[str, str]()
    for name, read in sites.items():
        module = block.get_submodule(name)
        if moe_hooks.has_experts(module):
            found += _of_experts(module, name, prefix, pieces)
            continue
        weight = module.get_parameter("weight")
        transposed = isinstance(module, Conv1D)
        out, into = weight.shape[::-1] if transposed else weight.shape
        # A router, or a gate of one number: what they say is a decision.
        if out in experts or out == 1 or f"{name}.".startswith(routers):
            continue
        site = next(iter(read)) if len(read) == 1 else name  # one that runs on several inputs reads alone
        for piece in pieces(f"{prefix}.{name}.weight"):
            stored, rows = piece.name.removesuffix(".weight"), piece.rows
            size = (out if rows is None else rows[1] - rows[0], into)
            first = names.setdefault(site, stored)
            found.append(
                Linear(
                    stored, first, name, f"{name}.weight", size, rows=rows, transposed=transposed,
                    read_elsewhere=name in elsewhere, crosses=name in crossing,
                )
            )  # fmt: skip
    return tuple(found)


def _of_experts(
    module: nn.Module, name: str, prefix: str, pieces: Callable[[str], Sequence[Piece]]
) -> Iterator[Linear]:
    """Of every expert first what reads its input, then what reads what it makes of that."""
    transposed = bool(getattr(module, "is_transposed", False))
    steps: tuple[tuple[str, Literal["in", "down"]], ...] = (
        ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "in"), ("down_proj", "down"),
    )  # fmt: skip
    by_expert = dict[int, list[Linear]]()
    for parameter, step in steps:
        shape = module.get_parameter(parameter).shape
        out, into = shape[:0:-1] if transposed else shape[1:]
        for piece in pieces(f"{prefix}.{name}.{parameter}"):
            for expert in range(shape[0]) if piece.expert is None else [piece.expert]:
                stored = piece.name.removesuffix(".weight")
                if piece.expert is None:  # stacked on disk as well
                    stored = f"{prefix}.{name}.{expert}.{parameter}"
                rows = piece.rows
                size = (out if rows is None else rows[1] - rows[0], into)
                mine = by_expert.setdefault(expert, [])
                site = next((one.name for one in mine if one.step == step), stored)
                mine.append(
                    Linear(
                        stored,
                        site,
                        name,
                        f"{name}.{parameter}",
                        size,
                        expert,
                        rows,
                        step,
                        transposed,
                        piece.expert is None,
                    )
                )
    for expert in sorted(by_expert):
        yield from by_expert[expert]
