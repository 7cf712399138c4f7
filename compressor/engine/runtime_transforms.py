"""What a quantized block does at run time beyond its weights: rounded activations, keys and values, and rotations
that no weight can absorb.

The same edits serve the walk over a checkpoint (for the length of a call) and a loaded model (for good).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calib.model.architectures import Architecture
from calib.model.attention_hooks import Edit, edit_attention, editing_attention
from calib.model.hooks import Patch, install_patches, patch_inputs
from calib.quant.grid import fit_activations, on_grid
from calib.quant.scheme import Grid
from compressor.engine.rotations import apply_hadamard


@dataclass(frozen=True)
class RuntimeTransforms:
    """Run-time transforms of one block: rounding of activations, keys and values, and rotations.  With everything None
    or False the block is an ordinary one."""

    activations: Grid | None = None  # inputs of every linear, per token
    kv: Grid | None = None  # keys and values, per token and head
    hadamard_down: bool = False
    key_rotation: Tensor | None = None  # (G, h, h) on queries and keys, after the rotary embedding

    def to(self, device: torch.device) -> RuntimeTransforms:
        """Move all tensors to a device."""
        return self if self.key_rotation is None else replace(self, key_rotation=self.key_rotation.to(device))

    def edits(self, architecture: Architecture) -> tuple[dict[str, Patch], dict[str, Patch]]:
        """(changes to the inputs, changes to the outputs) of named modules of the block."""

        def rounded(x: Tensor) -> Tensor:
            return (
                x if self.activations is None else on_grid(x, *fit_activations(x, self.activations), self.activations)
            )

        inputs: dict[str, Patch] = {}
        outputs: dict[str, Patch] = {}
        if self.activations is not None:
            inputs = dict.fromkeys((architecture.o, *architecture.downs), rounded)
            # The readers of a norm share its output: rounding it once, there, is rounding the input of each.
            if architecture.attention_norm:
                outputs[architecture.attention_norm] = rounded
            else:
                inputs |= dict.fromkeys((architecture.q, architecture.k, architecture.v), rounded)
            if architecture.experts:  # but the router, which reads there too, is left alone
                inputs |= dict.fromkeys(architecture.gates, rounded)
            elif architecture.mlp_norm:
                outputs[architecture.mlp_norm] = rounded
            else:
                inputs |= dict.fromkeys((*architecture.gates, *architecture.ups), rounded)
        if self.hadamard_down:
            inputs |= dict.fromkeys(architecture.downs, lambda x: rounded(apply_hadamard(x)))
        return inputs, outputs

    def edit_attention(self) -> Edit | None:
        """The edit of queries, keys and values; None where they stay as they are."""
        if self.kv is None and self.key_rotation is None:
            return None

        def rounded(x: Tensor) -> Tensor:
            return x if self.kv is None else on_grid(x, *fit_activations(x, self.kv), self.kv)

        def edit(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if self.key_rotation is not None:
                r = self.key_rotation.to(key.dtype)
                key = key @ r
                query = (query.unflatten(1, (len(r), -1)) @ r[:, None]).flatten(1, 2)
            return query, rounded(key), rounded(value)

        return edit


@contextmanager
def runtime_transforms(block: nn.Module, online: RuntimeTransforms, architecture: Architecture) -> Iterator[None]:
    """Inside the `with`, `block` rounds and rotates as `online` says."""
    with (
        patch_inputs(block, architecture, *online.edits(architecture)),
        editing_attention(block.get_submodule(architecture.attention), online.edit_attention()),
    ):
        yield


def install(block: nn.Module, online: RuntimeTransforms, architecture: Architecture) -> None:
    """Have a block round and rotate from now on; the model must run under the attention function
    `calib.model.attention_hooks.NAME`."""
    install_patches(block, architecture, *online.edits(architecture))
    if (edit := online.edit_attention()) is not None:
        edit_attention(block.get_submodule(architecture.attention), edit)
