"""What blocks are given and answer: trees of tensors in which the hidden state is one leaf."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def relative_difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|; infinite where one has no number and the other has."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny))


def written_in(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """List the arguments of a block that blocks write into, for later ones to read."""
    return {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}


def moved_by(answer: Any, value: float) -> Any:
    """An answer with `value` added to floating tensors but the hidden state."""
    hidden = hidden_of(answer)
    return pytree.tree_map(
        lambda x: x + value if isinstance(x, Tensor) and x.is_floating_point() and x is not hidden else x, answer
    )


def same_arguments(a: Any, b: Any) -> bool:
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
    return next(leaf for leaf in pytree.tree_leaves(tree) if is_hidden(leaf))


def with_hidden(tree: Any, hidden: Tensor) -> Any:
    """A block's arguments or answer with another hidden state, wherever the old one stands."""
    old = hidden_of(tree)
    return pytree.tree_map(lambda leaf: hidden if leaf is old else leaf, tree)


def is_hidden(leaf: Any) -> bool:
    """Tell whether a leaf of a block's arguments or answer may be a hidden state: a floating tensor of three or four
    axes."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() in (3, 4)
