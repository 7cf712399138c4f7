"""See and change queries, keys and values after the rotary embedding, without writing attention again.

`transformers` lets an attention function be registered by name. Ours looks whether somebody is editing this attention
module, lets them, and calls the library's own scaled-dot-product attention. The mask is registered under the same
name: without it the library passes no mask at all, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "parewell"

# (query (B, H, T, h), key (B, G, T, h), value (B, G, T, h)) -> the same three, edited
Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_edits: WeakKeyDictionary[nn.Module, Edit] = WeakKeyDictionary()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    if module in _edits:
        query, key, value = _edits[module](query, key, value)
    return sdpa_attention_forward(module, query, key, value, mask, **how)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def edit_attention(module: nn.Module, edit: Edit) -> None:
    """From now on `edit` sees what enters `module`, an attention layer of a model that runs under NAME."""
    _edits[module] = edit


@contextmanager
def editing_attention(module: nn.Module, edit: Edit | None) -> Iterator[None]:
    """The same for the length of a `with`; nothing happens where `edit` is None."""
    if edit is not None:
        _edits[module] = edit
    try:
        yield
    finally:
        _edits.pop(module, None)
