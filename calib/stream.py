"""Run a causal language model one block at a time.

The model is a folder of weights and a config, not an object in memory: the library's own class is built on the meta
device, and a block runs as the library wrote it, with parameters handed in for the length of the call. Whoever walks
decides what those parameters are: as stored, transformed, rounded. Between blocks, hidden states rest in RAM up to a
budget and in a memory-mapped scratch file beyond it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from calib import BadInput, attention
from calib.anatomy import Anatomy, anatomy_of, sizes_of
from calib.weights import Weights

Params = Mapping[str, Tensor]


class Stream:
    """A model's blocks on the meta device, and the few tensors that are no block's.

    `device` and `dtype` are where and in what precision things run; weights keep the checkpoint's own dtype on disk.
    """

    def __init__(
        self, config: PretrainedConfig, weights: Weights, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.weights, self.device, self.dtype = config, weights, device, dtype
        self.anatomy: Anatomy = anatomy_of(config.model_type)
        self.sizes = sizes_of(config)
        self.skeleton = skeleton(config)
        if config.tie_word_embeddings:  # some checkpoints store the shared tensor twice; the library reads the first
            weights.entries.pop(f"{self.anatomy.head}.weight", None)
        self.blocks: Sequence[nn.Module] = list(self.skeleton.get_submodule(self.anatomy.blocks).children())
        # Rotary frequencies are computed, not stored, so this one module must be built on a real device.
        self._rotary = type(self.skeleton.get_submodule(self.anatomy.rotary))(config).to(device)

    def read(self, module: str) -> dict[str, Tensor]:
        """Parameters of the module called `module`, their names relative to it."""
        names = [f"{module}.{name}" for name, _ in self.skeleton.get_submodule(module).named_parameters()]
        read = self.weights.read(names)
        return {name[len(module) + 1 :]: t.to(self.device, self.dtype) for name, t in read.items()}

    def read_block(self, index: int) -> dict[str, Tensor]:
        return self.read(f"{self.anatomy.blocks}.{index}")

    def read_embedding(self) -> Tensor:
        """(V, d)."""
        return self.read(self.anatomy.embed)["weight"]

    def read_head(self) -> Tensor:
        """(V, d); the embedding where the two are tied."""
        if self.config.tie_word_embeddings:
            return self.read_embedding()
        return self.read(self.anatomy.head)["weight"]

    def read_final_gain(self) -> Tensor:
        """(d,)."""
        return self.read(self.anatomy.final_norm)["weight"]

    def run(self, index: int, params: Params, hidden: Tensor) -> Tensor:
        """Block `index` with `params` on hidden states (B, T, d) -> (B, T, d).

        Rows are padded on the right, if at all: under a causal mask what comes later cannot reach what came before.
        """
        position = torch.arange(hidden.shape[1], device=hidden.device)[None]
        block = self.blocks[index]
        sliding = getattr(block.get_submodule(self.anatomy.attention), "sliding_window", None) is not None or (
            self.config.model_type == "mistral" and self.config.sliding_window is not None
        )
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=position,
        )
        kwargs = {
            "attention_mask": mask,
            "position_ids": position,
            "position_embeddings": self._rotary(hidden, position),
        }
        # strict: a parameter forgotten on the meta device would otherwise give a wrong tensor, not an error.
        return functional_call(block, dict(params), (hidden,), kwargs, strict=True)

    def final_norm(self, hidden: Tensor, gain: Tensor) -> Tensor:
        return functional_call(
            self.skeleton.get_submodule(self.anatomy.final_norm), {"weight": gain}, (hidden,), strict=True
        )


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The library's own model for `config`, without storage, its attention open to `calib.attention`."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(f"config.json: the library cannot build this model ({error!r}); mend the config") from error
    return model.eval().requires_grad_(False)


def micro_batches(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def scratch(shape: Sequence[int], dtype: torch.dtype, budget: int, folder: Path) -> Tensor:
    """An empty tensor: in RAM if it takes at most `budget` bytes, else mapped to a nameless file in `folder`."""
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= budget:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".scratch-") as file:  # unlinked once it is mapped
        # All blocks now: a sparse file on a full disk would kill the process when a page is first touched.
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)
