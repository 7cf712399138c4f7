"""Run any model of the library block by block, by its own forward.

The library's `forward` is run with every block replaced by a stub. What it hands to the stub of a block is what the
block is called with: masks, positions, rotary tables, whatever the architecture needs; what it does with the answer of
the last one is the final norm, the head, caps and scales. So nothing of an architecture is written down here, and what
stands around the blocks runs as the library wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from calib import BadInput
from calib.blockwise.arguments import (
    answer_of,
    hidden_of,
    moved_by,
    relative_difference,
    same_arguments,
    with_hidden,
    written_in,
)
from calib.blockwise.calls import Call, find_calls, product_kind
from calib.blockwise.thin import ThinProducts, constants_of, drawn_lines

SHAPES = 4  # of batches, for which what blocks are called with is kept
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by position and by name


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
        self.calls: Sequence[Call] = find_calls(model, sample, dtype, self._device)
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
        kwargs = kwargs | {name: batch.shared.setdefault(name, value) for name, value in written_in(kwargs).items()}
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

        Blocks of each kind are run, the first two and the last, and all that hand something on; the others stand aside
        in both.

        Args:
            sample: keyword arguments of the forward.

        Returns:
            Where the hidden states differ most, a block's name or "logits", and by how much of their own size.
        """
        kinds = dict[Any, list[int]]()
        for i, module in enumerate(self.modules):
            kinds.setdefault(product_kind(module), []).append(i)
        chosen = {i for found in kinds.values() for i in (*found[:2], found[-1])}
        drawn = drawn_lines(self.model, self._dtype, self._device, 0)
        seen = list[tuple[str, Tensor]]()

        def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if written_in(kwargs):
                chosen.add(index)
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
        apart = [(name, relative_difference(a, b)) for (name, a), b in zip(seen, found, strict=True)]
        return max(apart, key=lambda pair: pair[1])

    def _is_static(self, sample: Mapping[str, Any]) -> bool:
        """Whether blocks are called alike whatever the tokens are and the parameters around them, but for the hidden
        state, so that it is enough to see it once for each shape of batches."""
        if any(call.joint for call in self.calls) or "input_ids" not in sample:
            return False
        others = (sample["input_ids"] + 1) % (int(sample["input_ids"].max()) + 1)
        seen = [self._all_arguments({**sample, "input_ids": ids}, value)
                for ids, value in ((sample["input_ids"], 0.0), (others, 1.0))]  # fmt: skip
        return all(same_arguments(a, b) for a, b in zip(*seen, strict=True))

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
            if alone.shape[1:] != (2, whole.shape[-1]) or relative_difference(whole[:1, 1:3], alone) > 1e-4:
                raise BadInput("this model's logits are not each token's own, as they must be here")
            self._spare_masks(batch, outer, given, whole)
            entering, leaving = list[str](), list[str]()
            for name in self.outer:
                changed = {**outer, name: other[name]}
                if relative_difference(first, self.start(batch, changed)):
                    entering.append(name)
                if relative_difference(whole, answer_of(self.finish(batch, changed, given))):
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
            return with_hidden(moved_by(self.calls[index].template, value), hidden_of((args, kwargs)))

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
