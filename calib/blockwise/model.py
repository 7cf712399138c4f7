"""Run a model one block at a time.

The model is a folder of weights and a config, not an object in memory: the library's own class is built on the meta
device, and a block runs as the library wrote it, with parameters handed in for the length of the call. Whoever walks
decides what those parameters are: as stored, transformed, rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from calib import BadInput, first_line
from calib.blockwise.arguments import answer_of
from calib.blockwise.block_store import BlockStore
from calib.blockwise.linears import Linear, linears_of, without
from calib.blockwise.skeleton import sample_of, skeleton
from calib.blockwise.stored_names import StoredNames
from calib.blockwise.walk import RowBatch, Walk
from calib.model.task import Task, task_of_checkpoint
from calib.model.weights import Entry, Weights
from calib.runtime.device import DeviceMemory, is_accelerator
from calib.runtime.memory import is_out_of_memory, trim_heap

Params = Mapping[str, Tensor]

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # stored by old versions, computed from the config by all
REPRODUCED = 1e-4  # relative difference that single precision leaves, with room
WORKING = 8  # blocks' worth of memory that a block, its graph and its gradients take together
TOKENS_AT_ONCE = 2048  # that pass through a block together


@dataclass(frozen=True)
class Composed:
    """Tensors of a checkpoint that are made of several: weights of their codes and scales, for example.

    Args:
        rows: their names, as they would be called if they were stored, and how many rows each has.
        parts: names of the stored tensors that they are made of.
        read: makes them, by name.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    read: Callable[[Iterable[str]], dict[str, Tensor]] = lambda names: {}


class BlockwiseModel:
    """A model's blocks on the meta device, and the few tensors that are no block's.

    Parameters go by the names that the library's class gives them: a block's from the block, all others in full.

    Args:
        config: of a model that the library knows; its `architectures` say for which task.
        weights: its checkpoint.
        device: that things run on.
        dtype: that they run in; weights keep the checkpoint's own on disk.
        products: a shorter dtype for the matrix products within a block alone (autocast); None: like everything else.
        composed: what stands in the checkpoint in parts.
        device_limit: bytes of an accelerator that may be taken; blocks stay on it where there is room.

    Raises:
        BadInput: the library cannot build the model, or it is not run block by block, or config and tensors do not
            belong together.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
        composed: Composed | None = None,
        device_limit: int | None = None,
    ) -> None:
        self.config, self.weights, self.device = config, weights, device
        self.task = task_of_checkpoint(config.model_type, config.architectures) or Task.CAUSAL_LM
        self.dtype, self.products = dtype, products
        self.composed = composed or Composed()
        self._first: int | None = None  # how many of the blocks count; None: all
        self.ignored: frozenset[str] = frozenset()  # names of linears that are not to be quantized
        layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if isinstance(layers, int) and layers > len(weights.entries):  # seen before as many are built
            raise BadInput(
                f"{weights.folder}: config.json asks for {layers} blocks, and there are {len(weights.entries)} "
                "tensors; the two do not belong together"
            )
        self.skeleton: Any = skeleton(config, device, dtype)
        self._adopt([*(name for name in weights.entries if name not in self.composed.parts), *self.composed.rows])
        self.check()  # before anything is run in sizes that only the config vouches for
        self.vocab = int(config.get_text_config().vocab_size)
        self.walk = self._walk(sample_of(config, device))
        self.blocks: Sequence[nn.Module] = self.walk.modules
        self.encoder_blocks = self._encoder_blocks() if self.task is Task.SEQ_TO_SEQ_LM else 0
        # Beside a block, its graph and its gradients there are embedding and head, and what is made of them.
        ends = 4 * self.vocab * self.hidden * dtype.itemsize
        self.room = DeviceMemory(device, WORKING * self.block_bytes + ends, device_limit)
        self._stored = BlockStore(self.room)
        self._linears = dict[int, tuple[Linear, ...]]()

    def _walk(self, sample: dict[str, Any]) -> Walk:
        """The way through the blocks, held against the library's own.  Raises BadInput where they differ."""
        try:
            walk = Walk(self.skeleton, sample, self.dtype)
            where, apart = walk.difference(sample)
            if self.task.sees_later_tokens and apart <= REPRODUCED:
                mask = torch.ones_like(sample["input_ids"])
                mask[-1, -2:] = 0
                where, apart = walk.difference({**sample, "attention_mask": mask})
        except BadInput:
            raise
        except Exception as error:  # the library's own code, of any of its types
            if is_out_of_memory(error):
                raise
            raise BadInput(
                f"config.json: this model cannot be run block by block ({first_line(error)}); it cannot be used here"
            ) from error
        if apart > REPRODUCED:
            raise BadInput(
                f"config.json: run block by block this model differs from the library's own forward, by {apart:.1e} of "
                f"the hidden state after {where}; it cannot be used here"
            )
        return walk

    def _adopt(self, stored: list[str]) -> None:
        """Find what the model's parameters are made of; a head that is stored beside the embedding is the model's own
        if it differs, whatever the config says: so the library takes it."""
        self.names = StoredNames(self.skeleton, stored)
        if self._without_unstored(self.names):
            self.names = StoredNames(self.skeleton, stored)
        tied = dict(self.skeleton.all_tied_weights_keys)
        for second, first in tied.items():
            if second in self.names.sources and first in self.names.sources:
                one, other = (self.read_parameters([name])[name] for name in (first, second))
                if one.shape != other.shape or not torch.equal(one.to(other.dtype), other):
                    self.config.tie_word_embeddings = False
                    self.config.get_text_config().tie_word_embeddings = False
                    self.skeleton = skeleton(self.config, self.device, self.dtype)
                    return self._adopt(stored)
                for name in self.names.sources.pop(second).names:  # the shared tensor, stored twice
                    self.weights.entries.pop(name, None)
        self.tied = {second: first for second, first in tied.items() if second not in self.names.sources}
        return None

    def _without_unstored(self, names: StoredNames) -> bool:
        """Leave out what the library does without where it is not stored: buffers, and the pooling layer of an
        embedding model, which its last hidden states do not go through.  -> whether there was something."""
        without = False
        if self.task.embeds and any(name.startswith("pooler.") for name in names.missing):
            self.skeleton.pooler, without = None, True
        unneeded = self.skeleton._keys_to_ignore_on_load_missing or ()
        for name in names.missing:
            place, _, own = name.rpartition(".")
            module = self.skeleton.get_submodule(place) if not name.startswith("pooler.") else None
            if module is not None and own in module._buffers and any(re.search(one, name) for one in unneeded):
                module._non_persistent_buffers_set.add(own)
                without = True
        return without

    @property
    def layers(self) -> int:
        """How often a block is called."""
        return len(self.walk.calls) if self._first is None else self._first

    @property
    def hidden(self) -> int:
        """Numbers in a token's hidden state between blocks."""
        return torch.Size(self.walk.state_shape).numel()

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one table."""
        return bool(self.tied)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block's parameters in the precision they run in."""
        return max(sum(p.numel() for p in block.parameters()) for block in self.blocks) * self.dtype.itemsize

    def _bytes_of_blocks(self) -> int:
        """As they are read; what is made of codes counts as if it ran as it is."""
        entries, total = self.weights.entries, 0
        for index in range(self.layers):
            for name in self.parameters(index):
                source = self.names.sources[name]
                held = [entries[n].bytes for n in source.names if n not in self.composed.rows]
                shape = self._shapes[name]
                total += sum(held) if len(held) == len(source.names) else shape.numel() * self.dtype.itemsize
        return total

    def shortened(self, layers: int) -> BlockwiseModel:
        """A copy with fewer blocks, to measure what one costs."""
        other = copy(self)
        other._first = min(layers, self.layers)
        return other

    def without(self, ignored: Iterable[str]) -> BlockwiseModel:
        """A copy in which linears of these names on disk are none that are to be quantized."""
        other = copy(self)
        other.ignored, other._linears = frozenset(ignored), {}
        return other

    # What is read.

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Of parameters and stored buffers, by name."""
        return {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}

    @cached_property
    def _floating(self) -> dict[str, bool]:
        return {name: tensor.is_floating_point() for name, tensor in self.skeleton.state_dict().items()}

    @cached_property
    def _by_block(self) -> dict[str, list[str]]:
        """Names of parameters and stored buffers by name of the block, in full."""
        return {
            call.name: [f"{call.name}.{name}" for name in block.state_dict()]
            for call, block in zip(self.walk.calls, self.blocks, strict=True)
        }

    def parameters(self, index: int) -> list[str]:
        """Names, in full, of what block `index` has."""
        return self._by_block[self.walk.calls[index].name]

    def block_name(self, index: int) -> str:
        """The name of block `index` in the library's model."""
        return self.walk.calls[index].name

    @cached_property
    def outer(self) -> list[str]:
        """Names of what is no block's, those that are another's under a second name among them."""
        inside = {name for names in self._by_block.values() for name in names}
        return [name for name in self._shapes if name not in inside]

    def linears(self, index: int) -> tuple[Linear, ...]:
        """The linears of a block that are to be quantized, in the order in which data meets them."""
        if index not in self._linears:
            call = self.walk.calls[index]
            pieces = partial(self.names.pieces, rows=self._rows)
            found = linears_of(self.blocks[index], call.name, call.products, call.elsewhere, pieces)
            self._linears[index] = without(found, self.ignored)
        return self._linears[index]

    def check_end(self) -> None:
        """Raises BadInput where logits do not follow from what the last block gives, as they must where models are
        measured."""
        if not self.walk.ends_alone:
            raise BadInput(
                f"config.json: what {self.config.model_type} adds up around its blocks goes into its logits as well, "
                "and cannot be measured here; take a model of another type"
            )

    def _encoder_blocks(self) -> int:
        """How many blocks come before the decoder's.  Raises BadInput where it cannot be told."""
        ends = [i + 1 for i, call in enumerate(self.walk.calls) if call.joint]
        if len(ends) != 1:
            raise BadInput("config.json: this model is not an encoder's blocks and then a decoder's; it cannot be used")
        return ends[0]

    def reads_sources(self, index: int, linear: Linear | None = None) -> bool:
        """Whether block `index`, or a linear of it, reads what stands for the encoder's tokens, not the decoder's."""
        crosses = linear is not None and linear.crosses
        return index < self.encoder_blocks or (crosses and self.encoder_blocks > 0)

    def attention(self, index: int) -> tuple[str, ...]:
        """Attention layers of a block, named from it, that `calib.blockwise.attention_hooks` can edit."""
        return self.walk.calls[index].attention

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Read the parameters of a block, by name, onto the device."""
        return self._made(index, self._stored.block(index, self._read_raw, self._bytes_of_blocks))

    def reading(self, indices: Iterable[int], *, ahead: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(index, parameters) of one block after the other.

        `ahead`: the next is read while the caller works on this one. Nothing here keeps what the caller lets go of,
        but what an accelerator has room for.
        """
        for index, raw in self._stored.reading(indices, self._read_raw, self._bytes_of_blocks, ahead=ahead):
            yield index, self._made(index, raw)
            del raw
            trim_heap()

    def _read_raw(self, index: int) -> dict[str, Tensor]:
        """Stored tensors of a block, in the checkpoint's own dtype, on the CPU."""
        sources = dict.fromkeys(self.names.sources[name] for name in self.parameters(index))
        return self._read([name for source in sources for name in source.names])

    def _made(self, index: int, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placed = {name: self._placed(tensor) for name, tensor in raw.items()}
        made = self.names.read(self.parameters(index), lambda names: {name: placed[name] for name in names})
        start = len(self.block_name(index)) + 1
        return {name[start:]: made[name] for name in self.parameters(index)}

    def _placed(self, tensor: Tensor) -> Tensor:
        placed = tensor.to(self.device, non_blocking=True)
        return placed.to(self.dtype) if placed.is_floating_point() else placed

    def read_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read parameters by their names in full, on the CPU, in the dtypes they are stored in."""
        return self.names.read(names, self._read)

    def read_outer(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read what is no block's, by name: all, or some. One tensor under two names is read once."""
        asked = self.outer if names is None else list(names)
        own = {name: self.tied.get(name, name) for name in asked}
        read = {name: self._placed(t) for name, t in self.read_parameters(set(own.values())).items()}
        return {name: read[first] for name, first in own.items()}

    def read_start(self, *, images: bool = False) -> dict[str, Tensor]:
        """Read what the way to the first block goes through: the embedding, mostly; with `images` all of theirs."""
        return self.read_outer(self.walk.entering if self.walk.static and not images else None)

    def read_end(self) -> dict[str, Tensor]:
        """Read what the way from the last block goes through: the final norm and the head."""
        return self.read_outer(self.walk.leaving if self.walk.static else None)

    def _rows(self, name: str) -> int:
        """Of a stored tensor."""
        return self.composed.rows[name] if name in self.composed.rows else self.weights.entry(name).shape[0]

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Stored tensors, made where they are composed."""
        made = [name for name in names if name in self.composed.rows]
        plain = [name for name in names if name not in self.composed.rows]
        read = self.weights.read(plain, pinned=is_accelerator(self.device))
        for name, tensor in (self.composed.read(made) if made else {}).items():
            read[name] = tensor.mT if name in self._transposed else tensor
        return read

    @cached_property
    def _transposed(self) -> set[str]:
        """Weights that the library's class keeps as (in, out), by their names on disk."""
        return {f"{one.name}.weight" for i in range(self.layers) for one in self.linears(i) if one.transposed}

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the model is made of, composed ones whole."""
        shapes = dict[str, tuple[int, ...]]()
        if self.composed.rows:
            shapes = {f"{one.name}.weight": one.shape for i in range(self.layers) for one in self.linears(i)}
            outer = {name: self.names.sources[name].names for name in self.outer if name in self.names.sources}
            shapes |= {of[0]: tuple(self._shapes[name]) for name, of in outer.items() if len(of) == 1}
        names = dict.fromkeys(name for source in self.names.sources.values() for name in source.names)
        return {n: shapes[n] if n in self.composed.rows else self.weights.entries[n].shape for n in names}

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the names of `expected`."""
        return self._read(list(names))

    def verify(self) -> str:
        """`check`, then look at every value once.  -> a fingerprint of all tensors.  Raises BadInput."""
        self.check()
        buffers = {name for name, _ in self.skeleton.named_buffers()}
        unbounded = {n for name, source in self.names.sources.items() if name in buffers for n in source.names}
        return self.weights.verify(self.expected, unbounded)

    def check(self) -> None:
        """Compare what is stored with what the model needs, names and shapes, without reading values.

        Raises:
            BadInput: a tensor is missing, has no place in the model, or has another shape.
        """
        folder = self.weights.folder
        if self.names.missing:
            name = min(self.names.missing)
            raise BadInput(f"{folder}: tensor '{name}' is missing; the checkpoint is incomplete")
        for name in self.names.unknown:
            if not name.endswith(DERIVED) and name not in self._unused:
                raise BadInput(
                    f"{self.weights.entry(name).file}: tensor '{name}' has no place in the model that config.json "
                    "describes; the two do not belong together"
                )
        entries = self.weights.entries

        def shapes(names: Iterable[str]) -> dict[str, Tensor]:
            return {name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta") for name in names}

        for name, source in self.names.sources.items():
            if not self.composed.rows.keys().isdisjoint(source.names):  # checked by who makes them
                continue
            found, entry = self.names.read([name], shapes)[name], entries[source.names[0]]
            if found.shape != self._shapes[name]:
                made = "" if source.converter is None else f" and makes '{name}' of shape {list(found.shape)}"
                raise BadInput(
                    f"{entry.file}: tensor '{source.names[0]}' has shape {list(entry.shape)}{made}, config.json asks "
                    f"for {list(self._shapes[name])}; the two do not belong together"
                )
            if self._floating[name] and not entry.dtype.is_floating_point:
                raise BadInput(
                    f"{entry.file}: tensor '{source.names[0]}' has dtype {entry.dtype}; weights must be floating point"
                )

    @cached_property
    def _unused(self) -> set[str]:
        """Names of tensors that a masked language model was trained with and does not use: those of its second task."""
        if self.task is not Task.MASKED_LM:
            return set()
        model = skeleton(self.config, torch.device("cpu"), auto="AutoModelForPreTraining")
        return {name for source in StoredNames(model, self.weights.entries).sources.values() for name in source.names}

    def left_alone(self) -> list[str]:
        """Names of the modules that multiply and are none of `linears`: the head, routers, what is no block's."""
        quantized = {f"{self.block_name(i)}.{one.module}" for i in range(self.layers) for one in self.linears(i)}
        every = self.skeleton.named_modules()
        return [name for name, module in every if isinstance(module, nn.Linear) and name not in quantized]

    @property
    def head(self) -> tuple[str, nn.Linear]:
        """The head: the name of its weight, and its module in the skeleton."""
        module: nn.Linear = self.skeleton.get_output_embeddings()
        return f"{self._name_of(module)}.weight", module

    @property
    def embedding(self) -> tuple[str, nn.Embedding]:
        """The embedding of tokens: the name of its weight, and its module in the skeleton."""
        module: nn.Embedding = self.skeleton.get_input_embeddings()
        return f"{self._name_of(module)}.weight", module

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.skeleton.named_modules() if other is module)

    def entry(self, name: str) -> Entry:
        """The header of the tensor that a parameter, by its full name, is stored in; of several tensors the first."""
        return self.weights.entry(self.names.sources[self.tied.get(name, name)].names[0])

    def prepared(self, outer: Params, names: Iterable[str]) -> dict[str, Tensor]:
        """Cast the parameters called `names` of what is no block's to the precision that things run in; all of them
        where blocks are told of more than the hidden state."""
        needed = names if self.walk.static else self.walk.outer
        once = {id(tensor): self._placed(tensor) for tensor in {id(outer[n]): outer[n] for n in needed}.values()}
        return {name: once[id(outer[name])] for name in needed}

    def as_stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A parameter, by its name in full, as tensors under their names on disk."""
        if name not in self.names.sources:  # another's second name, which has a value of its own now
            return {name: value}
        return {piece.name: piece.of(value) for piece in self.names.pieces(name, self._rows)}

    # What is run.

    def batch(
        self,
        rows: Tensor | Mapping[str, Tensor],
        outer: Mapping[str, Tensor] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> RowBatch:
        """Rows that are to pass through the blocks together, by their token ids (B, T), or by arguments of the forward.

        Rows are padded on the right, if at all: under a causal mask what comes later cannot reach what came before. To
        others, and to an encoder, `attention_mask` (B, T) says what is padding. `beside`: images of one row, with all
        parameters that are no block's in `outer`.
        """
        held = {} if outer is None or (self.walk.static and not beside) else outer
        if isinstance(rows, Tensor):
            return RowBatch(self.walk.inputs(rows.to(self.device)), held)
        inputs = {name: value.to(self.device) for name, value in rows.items()}
        if (mask := inputs.get("attention_mask")) is not None and mask.all():
            del inputs["attention_mask"]
        images = {name: self._placed(value) for name, value in (beside or {}).items()}
        return RowBatch(self.walk.inputs(inputs["input_ids"]) | inputs | images, held, followed=bool(images))

    def batches(
        self,
        rows: Tensor | Mapping[str, Tensor],
        outer: Mapping[str, Tensor] | None = None,
        at_once: int | None = None,
        beside: Sequence[Mapping[str, Tensor]] = (),
    ) -> list[tuple[slice, RowBatch]]:
        """Split rows, as `batch` takes them, into those that pass through a block together; see `micro_batches`. Rows
        that have something `beside` pass alone."""
        given = {"input_ids": rows} if isinstance(rows, Tensor) else rows
        count, length = given["input_ids"].shape
        if beside:
            return [
                (slice(i, i + 1), self.batch({n: value[i : i + 1] for n, value in given.items()}, outer, one))
                for i, one in enumerate(beside)
            ]
        return [
            (some, self.batch({name: value[some] for name, value in given.items()}, outer))
            for some in micro_batches(count, length, at_once)
        ]

    def start(self, batch: RowBatch, outer: Mapping[str, Tensor]) -> Tensor:
        """Hidden states (B, T, d) before the first block."""
        return self.walk.start(batch, outer)

    def run(self, index: int, params: Params, hidden: Tensor, batch: RowBatch) -> Tensor:
        """Block `index` with `params` on hidden states (B, T, d) -> (B, T, d)."""
        with torch.autocast(self.device.type, self.products, enabled=self.products is not None):
            return self.walk.run(index, params, hidden, batch)

    def logits(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """Logits (t, V) of hidden states (t, d) after the last block; of an embedding model its last hidden states."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        return answer_of(self.walk.finish(self.batch(ids), outer, hidden[None]))[0]


def micro_batches(rows: int, tokens: int, at_once: int | None = None) -> Iterator[slice]:
    """Slices of `rows` rows of `tokens` tokens, as many rows at once as `at_once` allows, but at least one."""
    size = max(1, (at_once or TOKENS_AT_ONCE) // tokens)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
