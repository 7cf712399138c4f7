"""What a quantized block does at run time beyond its weights: rounded activations, keys and values, and rotations
that no weight can absorb.

The same edits serve the walk over a checkpoint (for the length of a call) and a loaded model (for good).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from calib.blockwise.attention_hooks import Edit, edit_attention, editing_attention
from calib.blockwise.hooks import Patch, install_patches, patch_inputs
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel
from calib.probe.parts import FoundParts
from calib.quant.grid import fit_activations, on_grid
from calib.quant.grid_types import Grid
from compressor.engine.rotations import apply_hadamard


@dataclass(frozen=True)
class RuntimeTransforms:
    """Run-time transforms of one block: rounding of activations, keys and values, and rotations.  With everything None
    or False the block is an ordinary one."""

    activations: Grid | None = None  # inputs of every linear, per token
    kv: Grid | None = None  # keys and values, per token and head, or with a scale for all of them or of each head
    hadamard: frozenset[str] = frozenset()  # linears whose inputs pass a Hadamard transform
    key_rotation: Tensor | None = None  # (G, h, h) on queries and keys, after the rotary embedding
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # linears' `outer` (1,) of `fit_activations`
    keys: Mapping[str, Tensor] = field(default_factory=dict)  # attention layers' (2, 1 or G), of keys and of values

    def to(self, device: torch.device) -> RuntimeTransforms:
        """Move all tensors to a device."""
        turned = self.key_rotation if self.key_rotation is None else self.key_rotation.to(device)
        inputs, keys = ({name: x.to(device) for name, x in found.items()} for found in (self.inputs, self.keys))
        return replace(self, key_rotation=turned, inputs=inputs, keys=keys)

    def edits(self, linears: Sequence[Linear]) -> dict[Linear, Patch]:
        """Changes to the inputs of a block's linears."""

        def rounded(x: Tensor, outer: Tensor | None) -> Tensor:
            grid = self.activations
            return x if grid is None else on_grid(x, *fit_activations(x, grid, outer=outer), grid)

        sharing = dict[tuple[str, int | None, str], Linear]()  # those whose input can be changed, one for each
        for linear in linears:
            sharing.setdefault((linear.module, linear.expert, linear.step or ""), linear)
        readers = Counter(linear.site for linear in sharing.values())
        patches = dict[Linear, Patch]()
        by_site = dict[str, Patch]()
        for linear in sharing.values():
            if linear.name in self.hadamard:
                turned = partial(lambda outer, x: rounded(apply_hadamard(x), outer), self.inputs.get(linear.name))
                by_site.setdefault(linear.site, _once(turned, readers[linear.site]))
            elif self.activations is not None:
                found = partial(rounded, outer=self.inputs.get(linear.name))
                by_site.setdefault(linear.site, _once(found, readers[linear.site]))
            if linear.site in by_site:
                patches[linear] = by_site[linear.site]
        return patches

    def edit_attention(self, name: str) -> Edit | None:
        """The edit of queries, keys and values of an attention layer of the block, by its name from it; None where they
        stay as they are."""
        if self.kv is None and self.key_rotation is None:
            return None
        of_keys, of_values = self.keys[name][..., None, None] if name in self.keys else (None, None)

        def rounded(x: Tensor, outer: Tensor | None) -> Tensor:
            return x if self.kv is None else on_grid(x, *fit_activations(x, self.kv, outer=outer), self.kv)

        def edit(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if self.key_rotation is not None:
                r = self.key_rotation.to(key.dtype)
                key = key @ r
                query = (query.unflatten(1, (len(r), -1)) @ r[:, None]).flatten(1, 2)
            return query, rounded(key, of_keys), rounded(value, of_values)

        return edit


def downs(found: FoundParts, linears: Sequence[Linear]) -> frozenset[str]:
    """Names of the linears of a block that read what its feed-forward, or an expert, made: what they give goes to the
    stream, and what they are given comes neither from the stream nor out of attention."""
    mixed = {pair.target for pair in found.pairs if pair.rotates}
    readers = {*found.bare, *(reader for norm in found.norms for reader in norm.readers)}
    width = max((found.matrices[name].into for name in readers if name in found.matrices), default=0)
    return frozenset(
        one.name
        for one in linears
        if one.step == "down" or (one.shape[0] == width and one.parameter not in mixed | readers)
    )


def _once(change: Patch, readers: int) -> Patch:
    """The same change for so many readers of one input, made when the first of them asks."""
    if readers == 1:
        return change
    held = list[tuple[Tensor, Tensor]]()
    left = [0]

    def shared(x: Tensor) -> Tensor:
        if not held or held[0][0] is not x:
            held[:], left[0] = [(x, change(x))], readers
        left[0] -= 1
        result = held[0][1]
        if left[0] == 0:
            held.clear()
        return result

    return shared


@contextmanager
def runtime_transforms(stream: BlockwiseModel, index: int, online: RuntimeTransforms) -> Iterator[None]:
    """Inside the `with`, block `index` rounds and rotates as `online` says."""
    block = stream.blocks[index]
    with ExitStack() as stack:
        stack.enter_context(patch_inputs(block, online.edits(stream.linears(index))))
        for name in stream.attention(index):
            if (edit := online.edit_attention(name)) is not None:
                stack.enter_context(editing_attention(block.get_submodule(name), edit))
        yield


def install(block: nn.Module, online: RuntimeTransforms, linears: Sequence[Linear], attention: Sequence[str]) -> None:
    """Have a block round and rotate from now on; the model must run under the attention function
    `calib.blockwise.attention_hooks.NAME`."""
    install_patches(block, online.edits(linears))
    for name in attention:
        if (edit := online.edit_attention(name)) is not None:
            edit_attention(block.get_submodule(name), edit)
