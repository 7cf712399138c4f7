"""See and change queries, keys and values after the rotary embedding, without writing attention again.

`transformers` lets an attention function be registered by name. Ours looks whether somebody is editing this attention
module, lets them, and calls the library's own: scaled-dot-product attention, or, where scores are soft-capped, which
that cannot do, the model's own eager function. Each mask is registered under the same name: without it the library
passes no mask at all, and says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from calib.runtime.precision import in_float32

# In single precision at least: (query (B, H, T, h), key (B, G, T, h), value (B, G, T, h)) -> the same three, edited
Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_edits: WeakKeyDictionary[nn.Module, Edit] = WeakKeyDictionary()


EAGER = "parewell-eager"  # gives the attention distributions too, which take memory by the square of a row's length


def name_for(config: PretrainedConfig) -> str:
    """The name under which a model must run to be open to edits."""
    return "parewell" if getattr(config, "attn_logit_softcapping", None) is None else EAGER


def _eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    result: tuple[Tensor, Tensor | None] = sys.modules[type(module).__module__].eager_attention_forward(
        module, *args, **options
    )
    return result


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    then: Callable[..., tuple[Tensor, Tensor | None]],
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if _watchers:
        _watchers[-1].append(module)
    if module in _edits:
        query, key, value = in_float32(_edits[module])(query, key, value)
    return then(module, query, key, value, attention_mask, **options)


for name, library, mask in (("parewell", sdpa_attention_forward, "sdpa"), (EAGER, _eager, "eager")):
    AttentionInterface.register(name, partial(_attention, then=library))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask])


_watchers = list[list[nn.Module]]()


@contextmanager
def watching_attention() -> Iterator[list[nn.Module]]:
    """A list of the attention layers that run within the `with` block and are open to edits."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


def edit_attention(module: nn.Module, edit: Edit) -> None:
    """Have `edit` see, from now on, what enters `module`, an attention layer of a model that runs under `name_for`
    it."""
    _edits[module] = edit


@contextmanager
def editing_attention(module: nn.Module, edit: Edit | None) -> Iterator[None]:
    """Have `edit` see what enters an attention layer within a `with` block; does nothing where `edit` is None."""
    if edit is not None:
        _edits[module] = edit
    try:
        yield
    finally:
        _edits.pop(module, None)
