"""Find the calls of blocks in a model's forward: which modules are blocks, and what each multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from calib import BadInput, first_line
from calib.blockwise.arguments import is_hidden, with_hidden, written_in
from calib.blockwise.attention_hooks import watching_attention
from calib.blockwise.linears import Product, watching_products, watching_weights
from calib.blockwise.thin import ThinProducts, constants_of
from calib.runtime.memory import is_out_of_memory

LIGHT = 0.1  # a list of modules that has less than this share of the heaviest's parameters is no stack of blocks


@dataclass(frozen=True)
class Call:
    """A call of a block, in the order of the forward.

    Args:
        name: of its module.
        template: an answer, of which what is not the hidden state counts.
        products: modules of it that multiplied.
        attention: attention layers of it that can be edited, named from it.
        elsewhere: linears of it whose weight is read by others, named from it.
        joint: whether another stack begins after it, or the same block is called again.
    """

    name: str
    template: Any
    products: tuple[Product, ...] = ()
    attention: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    joint: bool = False


@dataclass
class _Seen:
    """Calls of children of module lists, in a forward that is watched."""

    calls: list[tuple[str, Any, bool]] = field(default_factory=list)  # name, answer, whether it may be a block
    templates: dict[Any, Any] = field(default_factory=dict)  # by kind of module
    products: dict[Any, tuple[Product, ...]] = field(default_factory=dict)  # by kind of module
    attention: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # by kind of module
    elsewhere: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # by kind of module


def find_calls(model: nn.Module, sample: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[Call]:
    """Watch one forward with parameters that are all zero, and take no memory, each kind of block run once."""
    lists = _outermost_lists(model)
    owner = {f"{name}.{key}": name for name, of in lists.items() for key, _ in of.named_children()}
    seen = _Seen()
    children = {name: model.get_submodule(name) for name in owner}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    zeros = constants_of(model, 0.0, dtype, device, names)
    try:
        with _watched(children, seen), torch.no_grad(), ThinProducts():
            functional_call(model, zeros, (), dict(sample), tie_weights=False)
    except Exception as error:  # the library's own code, of any of its types
        if is_out_of_memory(error):
            raise
        raise BadInput(
            f"config.json: the library cannot run this model on a short row ({first_line(error)})"
        ) from error
    blocks = [(name, answer) for name, answer, may in seen.calls if may]
    if not blocks:
        raise BadInput("config.json: this model has no list of blocks that its forward runs one after the other")
    weights = dict[str, int]()
    for name in dict.fromkeys(name for name, _ in blocks):
        weights[owner[name]] = weights.get(owner[name], 0) + sum(p.numel() for p in children[name].parameters())
    heaviest = max(weights, key=lambda name: weights[name])
    stacks = {
        name for name, count in weights.items()
        if name == heaviest or (count > LIGHT * weights[heaviest] and len(lists[name]) > 1)
    }  # fmt: skip
    kept = [(name, answer) for name, answer in blocks if owner[name] in stacks]
    names = [name for name, _ in kept]
    kinds = {name: product_kind(children[name]) for name in names}
    for name in {kind: name for name, kind in kinds.items()}.values():
        seen.elsewhere[kinds[name]] += _read_to_initialize(_initializer(model, name), children[name])
    return [
        Call(
            name,
            answer,
            seen.products[kinds[name]],
            seen.attention[kinds[name]],
            seen.elsewhere[kinds[name]],
            i + 1 < len(kept) and (owner[names[i + 1]] != owner[name] or names[i + 1] in names[: i + 1]),
        )
        for i, (name, answer) in enumerate(kept)
    ]


def _initializer(model: nn.Module, block: str) -> Any:
    """The innermost model of the library around a block: it is the one that initializes it, by its own config."""
    around = {name: m for name, m in model.named_modules() if hasattr(m, "_init_weights")}
    return around[max((name for name in around if not name or block.startswith(f"{name}.")), key=len)]


def _read_to_initialize(model: Any, block: nn.Module) -> tuple[str, ...]:
    """Linears of a block whose weight the library reads as it initializes other modules, which it does as it loads."""
    names = {id(module): name for name, module in block.named_modules()}
    with watching_weights() as read, torch.no_grad():
        for module in block.modules():
            if not isinstance(module, nn.Linear):
                model._init_weights(module)
    return tuple(names[i] for i in read if i in names)


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.ModuleDict]:
    found = dict[str, nn.ModuleList | nn.ModuleDict]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) and not inside:
            found[name] = module
    return found


def product_kind(module: nn.Module) -> Any:
    """Equal for modules that multiply alike."""
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


@contextmanager
def _watched(children: Mapping[str, nn.Module], seen: _Seen) -> Iterator[None]:
    """Note calls of `children`; of each kind the first runs, the others answer alike."""

    def forward_of(name: str, module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
        kind = product_kind(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_hidden(leaf)), None)
            # One that is given what blocks hand on to later ones may have to add to it.
            if given is not None and kind in seen.templates and not written_in(kwargs):
                answer = with_hidden(seen.templates[kind], given)
                seen.calls.append((name, answer, True))
                return answer
            products = list[Product]()
            others = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_hidden(leaf) and leaf is not given]
            with (
                watching_products(module, products, others),
                watching_attention() as layers,
                watching_weights() as read,
            ):
                answer = real(*args, **kwargs)
            found = next((leaf for leaf in pytree.tree_leaves(answer) if is_hidden(leaf)), None)
            may = given is not None and found is not None and given.shape == found.shape
            if may:
                names = {id(part): name for name, part in module.named_modules()}
                seen.templates[kind], seen.products[kind] = answer, tuple(products)
                seen.attention[kind] = tuple(dict.fromkeys(names[id(layer)] for layer in layers))
                seen.elsewhere[kind] = tuple(names[i] for i in read if i in names)
            seen.calls.append((name, answer, may))
            return answer

        return forward

    for name, module in children.items():
        module.forward = forward_of(name, module, module.forward)
    try:
        yield
    finally:
        for module in children.values():
            del module.forward
