"""Run a causal language model one block at a time.

The model is a folder of weights and a config, not an object in memory: the library's own class is built on the meta
device, and a block runs as the library wrote it, with parameters handed in for the length of the call. Whoever walks
decides what those parameters are: as stored, transformed, rounded.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from calib import BadInput
from calib.model import attention_hooks, moe_hooks
from calib.model.architectures import Architecture, architecture_of, sizes_of
from calib.model.block_store import BlockStore
from calib.model.weights import Weights
from calib.runtime.device import DeviceMemory, is_accelerator
from calib.runtime.memory import is_out_of_memory, trim_heap

Params = Mapping[str, Tensor]

WORKING = 8  # blocks' worth of memory that a block, its graph and its gradients take together
TOKENS_AT_ONCE = 2048  # that pass through a block together


class BlockwiseModel:
    """A model's blocks on the meta device, and the few tensors that are no block's.

    `device` and `dtype` are where and in what precision things run; weights keep the checkpoint's own dtype on disk.
    `products` is a shorter dtype for the matrix products within a block alone (autocast); None: like everything else.
    Parameters of a block go by the names of its architecture: one for each linear, norm weights as the factors they
    multiply by. `read` gives stored tensors by name where they must be made first, from codes for example.
    `device_limit`: bytes of an accelerator that may be taken; blocks stay on it where there is room.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
        read: Callable[[Iterable[str]], dict[str, Tensor]] | None = None,
        device_limit: int | None = None,
    ) -> None:
        self.config, self.weights, self.device = config, weights, device
        self.dtype, self.products = dtype, products
        self._read = read or partial(weights.read, pinned=is_accelerator(device))
        self.architecture: Architecture = architecture_of(config)
        self.sizes = sizes_of(config)
        if self.sizes.layers > len(weights.entries):  # seen before as many are built
            raise BadInput(
                f"{weights.folder}: config.json asks for {self.sizes.layers} blocks, and there are "
                f"{len(weights.entries)} tensors; the two do not belong together"
            )
        self.skeleton = meta_model(config)
        weights.adopt(
            (name for name, _ in self.skeleton.named_parameters()), self.architecture.embed.partition(".")[0] + "."
        )
        if config.tie_word_embeddings and not _own_head(weights, self.architecture):
            weights.entries.pop(f"{self.architecture.head}.weight", None)  # the shared tensor, stored twice
        elif config.tie_word_embeddings:
            config.tie_word_embeddings = False  # as the library does: what is stored counts, whatever the config says
            self.skeleton = meta_model(config)
        self.blocks: Sequence[nn.Module] = list(self.skeleton.get_submodule(self.architecture.blocks).children())
        # Rotary frequencies are computed, not stored, so this one module must be built on a real device.
        self._rotary = type(self.skeleton.get_submodule(self.architecture.rotary))(config).to(device)
        self._rotary_by_layer = "layer_type" in inspect.signature(self._rotary.forward).parameters
        scale = getattr(self.skeleton.get_submodule(self.architecture.embed), "scalar_embed_scale", 1.0)
        self._embedding_scale = float(torch.tensor(scale))  # the library keeps it in single precision
        self._logit_cap = getattr(config, "final_logit_softcapping", None)
        # Beside a block, its graph and its gradients there are embedding and head, and what is made of them.
        ends = 4 * self.sizes.vocab * self.sizes.hidden * dtype.itemsize
        self.room = DeviceMemory(device, WORKING * self.block_bytes + ends, device_limit)
        self._stored = BlockStore(self.room)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's parameters in the precision they run in."""
        prefix = f"{self.architecture.blocks}.0."
        shapes = [shape for name, shape in self.expected.items() if name.startswith(prefix)]
        return sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize

    def _bytes_of_blocks(self) -> int:
        """As they are read; what is made of codes counts as if it ran as it is."""
        entries = self.weights.entries
        return sum(
            entries[name].bytes if name in entries else torch.Size(shape).numel() * self.dtype.itemsize
            for name, shape in self.expected.items()
            if name.startswith(f"{self.architecture.blocks}.")
        )

    def shortened(self, layers: int) -> BlockwiseModel:
        """A copy with fewer blocks, to measure what one costs."""
        other = copy(self)
        other.sizes = replace(self.sizes, layers=min(layers, self.sizes.layers))
        return other

    # What is read.

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint must hold."""
        a, shapes = self.architecture, {name: tuple(p.shape) for name, p in self.skeleton.named_parameters()}
        for i in range(self.sizes.layers):
            prefix = f"{a.blocks}.{i}."
            if a.router:
                shapes[prefix + a.router[0]] = shapes.pop(prefix + a.router[1])
            if a.experts:
                del shapes[f"{prefix}{a.experts}.gate_up_proj"], shapes[f"{prefix}{a.experts}.down_proj"]
                outputs = self.sizes.outputs(a)
                for name, width in self.sizes.inputs(a):
                    shapes[f"{prefix}{name}.weight"] = (outputs[name], width)
        return shapes

    def stored_names(self, index: int) -> list[str]:
        """The tensors of a block, names relative to it, as the checkpoint has them."""
        prefix = f"{self.architecture.blocks}.{index}."
        return [name.removeprefix(prefix) for name in self.expected if name.startswith(prefix)]

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the names of `expected`, made where the checkpoint has something else in their place."""
        return self._read(names)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Read the parameters of a block, by name, onto the device."""
        return self._separated(self._stored.block(index, self._read_raw, self._bytes_of_blocks))

    def reading(self, indices: Iterable[int], *, ahead: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(index, parameters) of one block after the other.

        `ahead`: the next is read while the caller works on this one. Nothing here keeps what the caller lets go of,
        but what an accelerator has room for.
        """
        for index, raw in self._stored.reading(indices, self._read_raw, self._bytes_of_blocks, ahead=ahead):
            yield index, self._separated(raw)
            del raw
            trim_heap()

    def _read_raw(self, index: int) -> dict[str, Tensor]:
        """In the checkpoint's own dtype, on the CPU."""
        prefix = f"{self.architecture.blocks}.{index}."
        raw = self._read(prefix + name for name in self.stored_names(index))
        return {name.removeprefix(prefix): t for name, t in raw.items()}

    def _separated(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """From stored tensors to one for each linear, and norm weights as factors."""
        a = self.architecture
        params = {name: self._placed(tensor) for name, tensor in raw.items()}
        outputs = self.sizes.outputs(a)
        for whole, parts in a.fused.items():
            for suffix in ("weight", "bias"):
                if f"{whole}.{suffix}" in params:
                    cut = params.pop(f"{whole}.{suffix}").split([outputs[part] for part in parts])
                    params |= {f"{part}.{suffix}": piece for part, piece in zip(parts, cut, strict=True)}
        if a.gain_offset:
            params |= {f"{norm}.weight": params[f"{norm}.weight"] + a.gain_offset for norm in a.norms}
        return params

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True).to(self.dtype)

    def stored_linear(self, index: int, linear: str) -> str:
        """The name on disk of what holds a block's linear."""
        whole = next((w for w, parts in self.architecture.fused.items() if linear in parts), linear)
        return f"{self.architecture.blocks}.{index}.{whole}"

    def stored_dtype(self, index: int, name: str) -> torch.dtype:
        """The dtype that parameter `name` of a block is stored in."""
        linear, _, suffix = name.rpartition(".")
        return self.weights.entries[f"{self.stored_linear(index, linear)}.{suffix}"].dtype

    def read_embedding(self) -> Tensor:
        """Read the embedding table (V, d)."""
        return self._read_one(self.architecture.embed)

    def read_head(self) -> Tensor:
        """(V, d); the embedding where the two are tied."""
        return self.read_embedding() if self.config.tie_word_embeddings else self._read_one(self.architecture.head)

    def read_final_gain(self) -> Tensor:
        """Read the final norm's gain (d,), the factor that it multiplies by."""
        return self._read_one(self.architecture.final_norm) + self.architecture.gain_offset

    def _read_one(self, module: str) -> Tensor:
        name = f"{module}.weight"
        return self._placed(self._read([name])[name])

    # What is run.

    def embed(self, embedding: Tensor, ids: Tensor) -> Tensor:
        """Hidden states (..., d) before the first block, for ids (...); on the device of `embedding` (V, d)."""
        rows = embedding[ids.to(embedding.device)]
        return rows if self._embedding_scale == 1.0 else rows * self._embedding_scale

    def run(self, index: int, params: Params, hidden: Tensor) -> Tensor:
        """Block `index` with `params` on hidden states (B, T, d) -> (B, T, d).

        Rows are padded on the right, if at all: under a causal mask what comes later cannot reach what came before.
        """
        position = torch.arange(hidden.shape[1], device=hidden.device)[None]
        block = self.blocks[index]
        layer_type = self._layer_type(index)
        make_mask = create_sliding_window_causal_mask if layer_type == "sliding_attention" else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=position,
        )
        by_layer = (layer_type,) if self._rotary_by_layer else ()
        kwargs = {
            "attention_mask": mask,
            "position_ids": position,
            "position_embeddings": self._rotary(hidden, position, *by_layer),
        }
        with torch.autocast(self.device.type, self.products, enabled=self.products is not None):
            # strict: a parameter forgotten on the meta device would otherwise give a wrong tensor, not an error.
            return functional_call(block, assembled(params, self.architecture), (hidden,), kwargs, strict=True)

    def _layer_type(self, index: int) -> str:
        if getattr(self.config, "layer_types", None):
            return str(self.config.layer_types[index])
        library = sys.modules[type(self.blocks[index]).__module__]  # it knows whether its models have windows at all
        slides = hasattr(library, "create_sliding_window_causal_mask")
        return "sliding_attention" if slides and self.config.sliding_window is not None else "full_attention"

    def final_norm(self, hidden: Tensor, gain: Tensor) -> Tensor:
        """Normalize hidden states (..., d) and multiply them by the gain (d,)."""
        norm = self.skeleton.get_submodule(self.architecture.final_norm)
        return functional_call(norm, {"weight": gain - self.architecture.gain_offset}, (hidden,), strict=True)

    def logits(self, normed: Tensor, head: Tensor) -> Tensor:
        """(..., d), (V, d) -> (..., V)."""
        return self.capped(normed @ head.mT)

    def capped(self, product: Tensor) -> Tensor:
        """Logits from the product of hidden states and head: soft-capped where the model does that."""
        return product if self._logit_cap is None else self._logit_cap * (product / self._logit_cap).tanh()


def _own_head(weights: Weights, architecture: Architecture) -> bool:
    """Whether a head is stored that is not the embedding."""
    names = [f"{module}.weight" for module in (architecture.embed, architecture.head)]
    if any(name not in weights.entries for name in names):
        return False
    embedding, head = (weights.read([name])[name] for name in names)
    return embedding.shape != head.shape or not torch.equal(embedding.to(head.dtype), head)


def assembled(params: Params, architecture: Architecture) -> dict[str, Tensor]:
    """Turn one tensor per linear into the parameters that the library's block has."""
    params = dict(params)
    if architecture.gain_offset:
        params |= {f"{norm}.weight": params[f"{norm}.weight"] - architecture.gain_offset for norm in architecture.norms}
    for whole, parts in architecture.fused.items():
        for suffix in ("weight", "bias"):
            if f"{parts[0]}.{suffix}" in params:
                params[f"{whole}.{suffix}"] = torch.cat([params.pop(f"{part}.{suffix}") for part in parts])
    if architecture.router:
        params[architecture.router[1]] = params.pop(architecture.router[0])
    if architecture.experts:

        def take(names: Iterable[str]) -> list[Tensor]:
            return [params.pop(f"{name}.weight") for name in names]

        gates_and_ups = zip(take(architecture.gates), take(architecture.ups), strict=True)
        params[f"{architecture.experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in gates_and_ups])
        params[f"{architecture.experts}.down_proj"] = torch.stack(take(architecture.downs))
    return params


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The library's own model for `config`, without storage, open to `calib.model.attention_hooks` and
    `calib.model.moe_hooks`."""
    try:
        with torch.device("meta"):
            return open_blockwise(config)
    except Exception as error:  # the library checks little, and fails wherever what it was not told of shows
        if is_out_of_memory(error):
            raise
        raise BadInput(f"config.json: the library cannot build this model ({error!r}); mend the config") from error


def open_blockwise(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The library's own model, without trained weights, ready to be seen into and edited while it runs."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_hooks.name_for(config), dtype=dtype)
    if hasattr(config, "num_experts_per_tok"):  # as an argument, not every transformers takes ours
        model.config._experts_implementation = moe_hooks.NAME
    return model.eval().requires_grad_(False)


def micro_batches(rows: int, tokens: int, at_once: int | None = None) -> Iterator[slice]:
    """Slices of `rows` rows of `tokens` tokens, as many rows at once as `at_once` allows, but at least one."""
    size = max(1, (at_once or TOKENS_AT_ONCE) // tokens)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
