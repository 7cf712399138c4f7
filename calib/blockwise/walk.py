"""Run any model of the library block by block, by its own forward.

The library's `forward` is run with every block replaced by a stub. What it hands to the stub of a block is what the
block is called with: masks, positions, rotary tables, whatever the architecture needs; what it does with the answer of
the last one is the final norm, the head, caps and scales. So nothing of an architecture is written down here, and what
stands around the blocks runs as the library wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from calib import BadInput, first_line
from calib.blockwise.attention_hooks import watching_attention
from calib.blockwise.linears import Product, watching_products, watching_weights
from calib.blockwise.thin import ThinProducts, constants_of, drawn_lines
from calib.runtime.memory import is_out_of_memory

SHAPES = 4  # of batches, for which what blocks are called with is kept
LIGHT = 0.1  # a list of modules that has less than this share of the heaviest's parameters is no stack of blocks
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by position and by name


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


class _Stop(Exception):  # no error: it ends a forward whose rest is not needed
    pass


@dataclass
class RowBatch:
    """Rows that go through the blocks together: what the model's forward is given for them, and what blocks hand on
    beside the hidden state.

    `followed`: what blocks are given depends on these rows, as it does where images stand among the tokens, so that the
    forward is run anew for each block; what is seen of images is kept in `seen`.
    """

    inputs: Mapping[str, Any]
    outer: Mapping[str, Tensor] = field(default_factory=dict)  # parameters of what is no block, where they are needed
    answers: dict[int, Any] = field(default_factory=dict)  # of calls that end a stack, by their index
    shared: dict[str, Any] = field(default_factory=dict)  # arguments that blocks write into, by name
    followed: bool = False
    seen: dict[tuple[str, int], Any] = field(default_factory=dict)  # answers of what only images go through

    def copy(self) -> RowBatch:
        """Copy the state of the rows, for a second way from here on."""
        shared = {name: copy(value) for name, value in self.shared.items()}
        return replace(self, answers=dict(self.answers), shared=shared)


class Walk:
    """The calls of blocks that a model's forward makes, and what stands between them.

    Args:
        model: a model of the library, whose parameters may be on the meta device: they are given with each run. Buffers
            of what is no block must be real.
        sample: keyword arguments of its forward, a short row of token ids for example.
        dtype: of hidden states.

    Raises:
        BadInput: no blocks are to be found.
    """

    def __init__(self, model: nn.Module, sample: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self._device = next(v.device for v in sample.values() if isinstance(v, Tensor))
        self._sample = dict(sample)
        self.calls: Sequence[Call] = _found_calls(model, sample, dtype, self._device)
        self.modules = [model.get_submodule(call.name) for call in self.calls]
        blocks = tuple(f"{name}." for name in self.names)
        # Under all their names: a head that is tied to the embedding may be given a value of its own.
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        every += [n for n, t in model.state_dict().items() if t.is_floating_point() and n not in every]  # buffers
        self.outer = [name for name in every if not name.startswith(blocks)]
        self._dtype = dtype
        self._buffers = {call.name: _computed(model.get_submodule(call.name)) for call in self.calls}
        self._known = dict[tuple[int, ...], list[Arguments]]()
        self.static = self._is_static(sample)
        self._constants = constants_of(model, 0.0, dtype, self._device, self.outer)
        self._behind: dict[str, Any] = {}  # inputs that save work where only what follows the blocks is wanted
        self.state_shape, self.entering, self.leaving = self._ends(sample)
        self.ends_alone = True  # whether logits follow from what the last block gives; `difference` finds out

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the forward for token ids (B, T), in an encoder and a decoder alike."""
        return {name: ids if isinstance(value, Tensor) else value for name, value in self._sample.items()}

    def in_double(self) -> Walk:
        """A copy that runs in double precision."""
        other = copy(self)
        other._dtype, other._known = torch.float64, {}
        other._constants = constants_of(self.model, 0.0, torch.float64, self._device, self.outer)
        other._behind = {name: value.double() for name, value in self._behind.items()}
        return other

    @property
    def names(self) -> list[str]:
        """Names of the blocks, each once, in the order of their first calls."""
        return list(dict.fromkeys(call.name for call in self.calls))

    def start(self, batch: RowBatch, outer: Mapping[str, Tensor]) -> Tensor:
        """The hidden state (B, T, d) before the first block; `outer` are parameters of what is no block, those of
        `entering` at least."""
        with self._seeing(batch):
            return hidden_of(self._run({**self._constants, **outer}, batch.inputs, 0, {}))

    def before(self, index: int, batch: RowBatch, outer: Mapping[str, Tensor]) -> Arguments:
        """List what call `index` is given where the blocks before it hand on what they are given; `outer` are
        parameters of what is no block."""
        return cast(Arguments, self._run({**self._constants, **outer}, batch.inputs, index, {}))

    def finish(self, batch: RowBatch, outer: Mapping[str, Tensor], hidden: Tensor) -> Any:
        """Run what follows the last block: the model's output for a hidden state; `outer` are parameters of what is no
        block, those of `leaving` at least."""
        last = len(self.calls) - 1
        template = with_hidden(self.calls[last].template, hidden)
        inputs = {**batch.inputs, **self._behind}
        return self._run({**self._constants, **outer}, inputs, last + 1, {**batch.answers, last: template})

    def run(self, index: int, params: Mapping[str, Tensor], hidden: Tensor, batch: RowBatch) -> Tensor:
        """Call `index` with a block's `params` on the hidden states (B, T, d) that the call before it gave."""
        args, kwargs = self._arguments(index, hidden, batch)
        written = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        kwargs = kwargs | {name: batch.shared.setdefault(name, value) for name, value in written.items()}
        # strict: a parameter forgotten on the meta device would otherwise give a wrong tensor, not an error.
        module = self.modules[index]
        given = {**self._buffers[self.calls[index].name], **params}
        answer = functional_call(module, given, args, kwargs, strict=True)
        result = hidden_of(answer)
        # What comes after is told what came before; the hidden state itself is the caller's to keep.
        if batch.followed or not self.static:
            batch.answers = {i: a for i, a in batch.answers.items() if i == index - 1 or self.calls[i].joint}
            batch.answers[index] = answer if self.calls[index].joint else with_hidden(answer, result.new_empty(1, 0, 0))
        return result

    def _arguments(self, index: int, hidden: Tensor, batch: RowBatch) -> Arguments:
        if batch.followed or not self.static:
            answers = {i: answer for i, answer in batch.answers.items() if self.calls[i].joint}
            if index:
                answers[index - 1] = with_hidden(batch.answers[index - 1], hidden)
            with self._seeing(batch):
                given = cast(Arguments, self._run(batch.outer, batch.inputs, index, answers))
            return given if index else cast(Arguments, with_hidden(given, hidden))
        if "attention_mask" in batch.inputs:  # of rows that are padded, which are told of their padding
            return cast(Arguments, with_hidden(self._run(self._constants, batch.inputs, index, {}), hidden))
        shape = tuple(hidden.shape[:2])
        if shape not in self._known:
            while len(self._known) >= SHAPES:
                del self._known[next(iter(self._known))]
            ids = torch.zeros(shape, dtype=torch.int64, device=self._device)
            self._known[shape] = self._all_arguments({**batch.inputs, "input_ids": ids}, 0.0)
        return cast(Arguments, with_hidden(self._known[shape][index], hidden))

    @contextmanager
    def _seeing(self, batch: RowBatch) -> Iterator[None]:
        """Within the `with` block modules that only images go through answer what they answered before."""
        calls = dict[str, int]()

        def forward_of(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls[name] = calls.get(name, 0) + 1
                if (name, calls[name]) not in batch.seen:
                    batch.seen[name, calls[name]] = real(*args, **kwargs)
                # In a container of its own, as the library's code writes into those it is given.
                return pytree.tree_map(lambda leaf: leaf, batch.seen[name, calls[name]])

            return forward

        modules = self._of_images if batch.followed else {}
        for name, module in modules.items():
            module.forward = forward_of(name, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    @cached_property
    def _of_images(self) -> dict[str, nn.Module]:
        """The outermost modules whose parameters text does not go through, by name."""
        text, blocks = {*self.entering, *self.leaving}, tuple(f"{name}." for name in self.names)
        found = dict[str, nn.Module]()
        for name, module in self.model.named_modules():
            own = [f"{name}.{own}" for own, _ in module.named_parameters()]
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if name and own and not inside and not any(one in text or one.startswith(blocks) for one in own):
                found[name] = module
        return found

    @torch.no_grad()
    def difference(self, sample: Mapping[str, Any]) -> tuple[str, float]:
        """Hold the walk against the library's own forward, with parameters that are drawn and take no memory.

        Blocks of each kind are run, the first two and the last, the others stand aside in both.

        Args:
            sample: keyword arguments of the forward.

        Returns:
            Where the hidden states differ most, a block's name or "logits", and by how much of their own size.
        """
        kinds = dict[Any, list[int]]()
        for i, module in enumerate(self.modules):
            kinds.setdefault(_kind(module), []).append(i)
        chosen = {i for found in kinds.values() for i in (*found[:2], found[-1])}
        drawn = drawn_lines(self.model, self._dtype, self._device, 0)
        seen = list[tuple[str, Tensor]]()

        def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index not in chosen:
                return with_hidden(self.calls[index].template, hidden_of((args, kwargs)))
            answer = type(self.modules[index]).forward(self.modules[index], *args, **kwargs)
            seen.append((self.calls[index].name, hidden_of(answer)))
            return answer

        with _stubbed([(module, stub) for module in self.modules]), ThinProducts():
            whole = functional_call(self.model, drawn, (), dict(sample), strict=False, tie_weights=False)
        seen.append(("the end", answer_of(whole)))
        outer = {name: drawn[name] for name in self.outer}
        batch, found = RowBatch(dict(sample), outer), list[Tensor]()
        with ThinProducts():
            hidden = self.start(batch, outer)
        for i, call in enumerate(self.calls):
            if i in chosen:
                start = len(call.name) + 1
                params = {name[start:]: p for name, p in drawn.items() if name.startswith(f"{call.name}.")}
                with ThinProducts():
                    hidden = self.run(i, params, hidden, batch)
                found.append(hidden)
            else:
                hidden = hidden_of(self._arguments(i, hidden, batch))
                batch.answers[i] = with_hidden(call.template, hidden)
        with ThinProducts():
            found.append(answer_of(self.finish(batch, outer, hidden)))
            self.ends_alone = torch.equal(answer_of(self.finish(RowBatch(dict(sample)), outer, hidden)), found[-1])
        apart = [(name, _apart(a, b)) for (name, a), b in zip(seen, found, strict=True)]
        return max(apart, key=lambda pair: pair[1])

    def _is_static(self, sample: Mapping[str, Any]) -> bool:
        """Whether blocks are called alike whatever the tokens are and the parameters around them, but for the hidden
        state, so that it is enough to see it once for each shape of batches."""
        if any(call.joint for call in self.calls) or "input_ids" not in sample:
            return False
        others = (sample["input_ids"] + 1) % (int(sample["input_ids"].max()) + 1)
        seen = [self._all_arguments({**sample, "input_ids": ids}, value)
                for ids, value in ((sample["input_ids"], 0.0), (others, 1.0))]  # fmt: skip
        return all(_alike(a, b) for a, b in zip(*seen, strict=True))

    @torch.no_grad()
    def _ends(self, sample: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str], list[str]]:
        """Shape of a token's hidden state; names of the parameters on the way to the first block and from the last one:
        those that make a difference there.

        Raises:
            BadInput: hidden states are not (rows, tokens, ...), or logits are not each token's own.
        """
        ids, generator = sample["input_ids"], torch.Generator().manual_seed(0)
        outer, other = (drawn_lines(self.model, self._dtype, self._device, seed, self.outer) for seed in (0, 1))
        batch = RowBatch(sample, outer)
        with ThinProducts():
            first = self.start(batch, outer)
            if first.shape[:2] != ids.shape:
                raise BadInput("this model's hidden states are not (rows, tokens, width), as they must be here")
            given = torch.randn(first.shape, generator=generator, dtype=self._dtype).to(self._device)
            whole = answer_of(self.finish(batch, outer, given))
            some = RowBatch(self.inputs(ids[:1, :2] * 0))
            alone = answer_of(self.finish(some, outer, given[:1, 1:3]))
            if alone.shape[1:] != (2, whole.shape[-1]) or _apart(whole[:1, 1:3], alone) > 1e-4:
                raise BadInput("this model's logits are not each token's own, as they must be here")
            self._spare_masks(batch, outer, given, whole)
            entering, leaving = list[str](), list[str]()
            for name in self.outer:
                changed = {**outer, name: other[name]}
                if _apart(first, self.start(batch, changed)):
                    entering.append(name)
                if _apart(whole, answer_of(self.finish(batch, changed, given))):
                    leaving.append(name)
        return tuple(first.shape[2:]), entering, leaving

    def _spare_masks(self, batch: RowBatch, outer: Mapping[str, Tensor], hidden: Tensor, logits: Tensor) -> None:
        """Behind the blocks masks are of no use: give one, as the library makes none then, and on an accelerator waits
        for nothing; not where it has another use for it."""
        self._behind = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=self._device)}
        try:
            same = torch.equal(answer_of(self.finish(batch, outer, hidden)), logits)
        except Exception:  # whatever the library's code makes of a mask that it did not make
            same = False
        if not (same and self.static):
            self._behind = {}

    def _all_arguments(self, inputs: Mapping[str, Any], value: float) -> list[Arguments]:
        """What every call is given where all parameters around the blocks have one value, which takes no memory, and
        where blocks add it to what they answer beside the hidden state."""
        met = list[Arguments]()

        def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            met.append((args, kwargs))
            if len(met) == len(self.calls):
                raise _Stop
            return with_hidden(_moved(self.calls[index].template, value), hidden_of((args, kwargs)))

        with _stubbed([(module, stub) for module in self.modules]), torch.no_grad(), ThinProducts():
            try:
                constants = constants_of(self.model, value, self._dtype, self._device, self.outer)
                functional_call(self.model, constants, (), dict(inputs), strict=False, tie_weights=False)
            except _Stop:
                return met
        raise AssertionError("the forward made fewer calls than it was seen to make")

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
                return functional_call(self.model, dict(outer), (), dict(inputs), strict=False, tie_weights=False)
            except _Stop:
                return met[0]


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are computed from the config, not stored."""
    stored = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name not in stored}


def _apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|; infinite where one has no number and the other has."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny))


def _moved(answer: Any, value: float) -> Any:
    """An answer with `value` added to floating tensors but the hidden state."""
    hidden = hidden_of(answer)
    return pytree.tree_map(
        lambda x: x + value if isinstance(x, Tensor) and x.is_floating_point() and x is not hidden else x, answer
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether arguments of two calls are equal but for the hidden state."""
    hidden = hidden_of(a), hidden_of(b)
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(
        (x is hidden[0] and y is hidden[1])
        or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and torch.equal(x, y))
        or (not isinstance(x, Tensor | MutableMapping) and x == y)
        for x, y in pairs
    )


def answer_of(output: Any) -> Tensor:
    """Logits of a model's output; of a model that has none the last hidden state."""
    answer: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answer


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
    """Have stub(index of the call, args, kwargs) answer for each module; attributes that the model's loop reads
    stay."""
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
    products: dict[Any, tuple[Product, ...]] = field(default_factory=dict)  # by kind of module
    attention: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # by kind of module
    elsewhere: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # by kind of module


def _found_calls(model: nn.Module, sample: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[Call]:
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
    kinds = {name: _kind(children[name]) for name in names}
    for name in {kind: name for name, kind in kinds.items()}.values():
        seen.elsewhere[kinds[name]] += _read_to_initialize(model, children[name])
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


def _kind(module: nn.Module) -> Any:
    """Equal for modules that multiply alike."""
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


@contextmanager
def _watched(children: Mapping[str, nn.Module], seen: _Seen) -> Iterator[None]:
    """Note calls of `children`; of each kind the first runs, the others answer alike."""

    def forward_of(name: str, module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
        kind = _kind(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_hidden(leaf)), None)
            if given is not None and kind in seen.templates:
                answer = with_hidden(seen.templates[kind], given)
                seen.calls.append((name, answer, True))
                return answer
            products = list[Product]()
            others = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_hidden(leaf) and leaf is not given]
            with (
                watching_products(module, products, others),
                watching_attention() as layers,
                watching_weights() as read,
            ):
                answer = real(*args, **kwargs)
            found = next((leaf for leaf in pytree.tree_leaves(answer) if _is_hidden(leaf)), None)
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
