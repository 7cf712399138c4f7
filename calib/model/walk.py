"""Run any model of the library block by block, by its own forward.

The library's `forward` is run with every block replaced by a stub. What it hands to the stub of a block is what the
block is called with: masks, positions, rotary tables, whatever the architecture needs; what it does with the answer of
the last one is the final norm, the head, caps and scales. So nothing of an architecture is written down here, and what
stands around the blocks runs as the library wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from calib import BadInput

LIGHT = 0.1  # a list of modules that has less than this share of the heaviest's parameters is no stack of blocks
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by position and by name


@dataclass(frozen=True)
class Call:
    """A call of a block in the order of the forward: its module's name, what it answers beside the hidden state (a
    template), and whether another stack begins after it, or the same block is called again."""

    name: str
    template: Any
    joint: bool = False


class _Stop(Exception):  # noqa: N818  # no error: it ends a forward whose rest is not needed
    pass


class Walk:
    """The calls of blocks that a model's forward makes, and what stands between them.

    Args:
        model: a model of the library, whose blocks may be on the meta device; other modules are given their parameters
            with each run. Buffers must be real.
        sample: keyword arguments of its forward, a short row of token ids for example.

    Raises:
        BadInput: no blocks are to be found.
    """

    def __init__(self, model: nn.Module, sample: Mapping[str, Any]) -> None:
        self.model = model
        self.calls: Sequence[Call] = _found_calls(model, sample)
        self.modules = [model.get_submodule(call.name) for call in self.calls]

    @property
    def names(self) -> list[str]:
        """Names of the blocks, each once, in the order of their first calls."""
        return list(dict.fromkeys(call.name for call in self.calls))

    def enter(self, outer: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Arguments:
        """What the first block is called with, for a batch's `inputs`; `outer` are parameters of what is no block."""
        arguments = self._run(outer, inputs, 0, {})
        assert isinstance(arguments, tuple)
        return arguments

    def advance(
        self, outer: Mapping[str, Tensor], inputs: Mapping[str, Any], index: int, answers: Mapping[int, Any]
    ) -> Arguments | Any:
        """What follows call `index`.

        Args:
            outer: parameters of what is no block.
            inputs: of the batch.
            index: of the call that was made last.
            answers: what calls answered, by index: that of `index`, and of joints before it.

        Returns:
            What the next block is called with; after the last one what the model gives.
        """
        return self._run(outer, inputs, index + 1, answers)

    def _run(self, outer: Mapping[str, Tensor], inputs: Mapping[str, Any], end: int, answers: Mapping[int, Any]) -> Any:
        """Up to call `end`; calls before it that have no answer in `answers` give what they are given."""
        met: list[Arguments] = []

        def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == end:
                met.append((args, kwargs))
                raise _Stop
            if index in answers:
                return answers[index]
            return with_hidden(self.calls[index].template, hidden_of((args, kwargs)))

        with _stubbed([(module, stub) for module in self.modules]):
            try:
                return functional_call(self.model, dict(outer), (), dict(inputs), strict=False)
            except _Stop:
                return met[0]


def hidden_of(tree: Any) -> Tensor:
    """The hidden state in a block's arguments or answer: the first floating tensor of three or four axes."""
    return next(leaf for leaf in pytree.tree_leaves(tree) if _is_hidden(leaf))


def with_hidden(tree: Any, hidden: Tensor) -> Any:
    """A block's arguments or answer with another hidden state, wherever the old one stands."""
    old = hidden_of(tree)
    return pytree.tree_map(lambda leaf: hidden if leaf is old else leaf, tree)


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() in (3, 4)


@contextmanager
def _stubbed(stubs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have stub(index of the call, args, kwargs) answer for each module; attributes that the model's loop reads stay."""
    made = [0]

    def forward_of(stub: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            made[0] += 1
            return stub(made[0] - 1, args, kwargs)

        return forward

    replaced = dict.fromkeys(module for module, _ in stubs)
    for module, stub in stubs:
        module.forward = forward_of(stub)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


@dataclass
class _Seen:
    """Calls of children of module lists, in a forward that is watched."""

    calls: list[tuple[str, Any, bool]] = field(default_factory=list)  # name, answer, whether it may be a block
    templates: dict[Any, Any] = field(default_factory=dict)  # by kind of module


def _found_calls(model: nn.Module, sample: Mapping[str, Any]) -> list[Call]:
    """Watch one forward with parameters that are all zero, and take no memory, each kind of block run once."""
    lists = _outermost_lists(model)
    owner = {f"{name}.{key}": name for name, of in lists.items() for key, _ in of.named_children()}
    seen = _Seen()
    children = {name: model.get_submodule(name) for name in owner}
    zeros = {name: torch.zeros((), dtype=p.dtype).expand(p.shape) for name, p in model.named_parameters()}
    with _watched(children, seen):
        functional_call(model, zeros, (), dict(sample))
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
    return [
        Call(name, answer, i + 1 < len(kept) and (owner[names[i + 1]] != owner[name] or names[i + 1] in names[: i + 1]))
        for i, (name, answer) in enumerate(kept)
    ]


def _outermost_lists(model: nn.Module) -> dict[str, nn.Module]:
    found = dict[str, nn.Module]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not len(module):
            continue
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


@contextmanager
def _watched(children: Mapping[str, nn.Module], seen: _Seen) -> Iterator[None]:
    """Note calls of `children`; of each kind the first runs, the others answer alike."""

    def forward_of(name: str, module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
        kind = (type(module), tuple((n, p.shape) for n, p in module.named_parameters()))

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_hidden(leaf)), None)
            if given is not None and kind in seen.templates:
                answer = with_hidden(seen.templates[kind], given)
                seen.calls.append((name, answer, True))
                return answer
            answer = real(*args, **kwargs)
            found = next((leaf for leaf in pytree.tree_leaves(answer) if _is_hidden(leaf)), None)
            may = given is not None and found is not None and given.shape == found.shape
            if may:
                seen.templates[kind] = answer
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
