"""Bidirectional attention in causal language models, and the loss of hidden tokens that it allows (BICO,
arXiv:2311.07468).

A rotary score of a query at i and a key at j depends on i - j. The half that a causal model knows, j <= i, stays as it
is; in the other half the rotation's sign is flipped, so that each score is of the distance |i - j|, which the model
knows. Queries and keys are caught where the library rotates them, and what enters attention is proved to be what was
rotated, so a type whose attention does something else is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from calib import BadInput
from calib.runtime.precision import upcast

BOTH_WAYS = "parewell-both-ways"  # of the attention function
_ROTARY = "apply_rotary_pos_emb"  # by which the library's types rotate


def bidirectional_scores(query: Tensor, key: Tensor, flipped_query: Tensor, flipped_key: Tensor) -> Tensor:
    """Scores <R(|i - j|) q_i, k_j> (arXiv:2311.07468) of queries and keys that are rotated by their positions, and by
    the same with the sign flipped.  (..., T, h) each -> (..., T, T), not scaled."""
    causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return torch.where(causal, query @ key.mT, flipped_query @ flipped_key.mT)


def hidden_tokens(mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw the tokens of each row to hide: `share` of those that are no padding, at least one, never all.

    bool (n, T) -> bool (n, T) on the same device, the same on every device; none of a row with fewer than two tokens.
    """
    counts = mask.sum(1).cpu()
    wanted = (counts * share).round().long().clamp(min=1).minimum(counts - 1).clamp(min=0)
    drawn = torch.rand(mask.shape, generator=generator).masked_fill(~mask.cpu(), 2.0)
    return (drawn.argsort(1).argsort(1) < wanted[:, None]).to(mask.device)


def bidirectional_logits(model: Any, ids: Tensor, visible: Tensor) -> Tensor:
    """Logits of a causal language model whose tokens see each other in both directions.

    Args:
        model: a causal language model of the library's with rotary positions.
        ids: int (n, T), padded on the right.
        visible: bool (n, T), the tokens that are seen; of padding and hidden tokens none.

    Returns:
        Logits (n, T, V), of the token at each position, not of the next.

    Raises:
        BadInput: attention of this type is not open to it.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise BadInput("bidirectional attention: is not run again in a backward pass; leave out gradient checkpointing")
    with _both_ways(model, visible) as run:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    if not run.rotated:
        raise BadInput(
            f"bidirectional attention: is for rotary positions, and {type(model).__name__} is not seen to rotate "
            "queries and keys; use another model"
        )
    return logits


def bico_loss(model: Any, ids: Tensor, mask: Tensor, hidden: Tensor, *, mask_token: int | None = None) -> Tensor:
    """Mean nats of each row's hidden tokens at their own positions, under bidirectional attention (BICO,
    arXiv:2311.07468).

    Args:
        model: a causal language model of the library's with rotary positions.
        ids: int (n, T), padded on the right.
        mask: bool (n, T), False on padding.
        hidden: bool (n, T), as `hidden_tokens` draws them.
        mask_token: stands in their place; default: the padding token, as in the paper, or the end of a text.

    Returns:
        (n,); 0 of a row with nothing hidden.

    Raises:
        BadInput: attention of this type is not open to it.
    """
    given = ids.masked_fill(hidden, _mask_token(model.config) if mask_token is None else mask_token)
    logits = upcast(bidirectional_logits(model, given, mask & ~hidden)[hidden])
    nats = nn.functional.cross_entropy(logits, ids[hidden], reduction="none")
    rows = hidden.nonzero()[:, 0]
    return nats.new_zeros(len(ids)).index_add(0, rows, nats) / hidden.sum(1).clamp(min=1)


def _mask_token(config: Any) -> int:
    ends = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return int(next((token for token in (config.pad_token_id, ends) if token is not None and token >= 0), 0))


@dataclass
class _Rotation:
    """What the library rotated last, by which cosines and sines, and how it is called."""

    rotate: Callable[..., tuple[Tensor, Tensor]]
    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    options: dict[str, Any]

    def flipped(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that enter attention, rotated by the same angles with the sign flipped.  Raises BadInput
        where they are not what was rotated."""
        width, whole = self.query.shape[-1], query.shape[-1]
        for place in (slice(0, width), slice(whole - width, whole)):
            if all(
                a.shape[:3] == b.shape[:3] and torch.equal(a[..., place], b)
                for a, b in ((query, self.query), (key, self.key))
            ):
                size = (self.cos.square() + self.sin.square()).sqrt()
                cos, sin = self.cos / size, self.sin / size
                back = self.rotate(self.query, self.key, cos.square() - sin.square(), -2 * sin * cos, **self.options)
                query, key = query.clone(), key.clone()
                query[..., place], key[..., place] = back
                return query, key
        raise BadInput("bidirectional attention: this type changes queries and keys after it rotates them; use another "
                       "model")  # fmt: skip


@dataclass
class _Run:
    """One pass: which keys are visible (n, T), what was rotated last, and how many attentions had rotations."""

    visible: Tensor
    last: _Rotation | None = None
    rotated: int = 0


_runs = list[_Run]()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The library's attention, in both directions; (n, H, T, h), (n, G, T, h) twice -> (n, T, H, h)."""
    run = _runs[-1]
    if options.get("s_aux") is not None:
        raise BadInput("bidirectional attention: is not for attention with sinks; use another model")
    flipped = (query, key)
    if run.last is not None:
        flipped, run.last, run.rotated = run.last.flipped(query, key), None, run.rotated + 1
    groups = query.shape[1] // key.shape[1]
    key, value, other = (x.repeat_interleave(groups, 1) for x in (key, value, flipped[1]))
    scores = bidirectional_scores(query, key, flipped[0], other) * (
        query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if (cap := options.get("softcap")) is not None:
        scores = cap * (scores / cap).tanh()
    seen = run.visible[:, None, None]
    if (window := options.get("sliding_window")) is not None:
        place = torch.arange(scores.shape[-1], device=scores.device)
        seen = seen & ((place[:, None] - place).abs() < window)
    scores = upcast(scores)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(BOTH_WAYS, _attention)


@contextmanager
def _both_ways(model: Any, visible: Tensor) -> Iterator[_Run]:
    """Let attention of the model look both ways within a `with` block."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    usual, run = whole.config._attn_implementation, _Run(visible)
    places = {type(module).__module__ for module in whole.modules()}
    library = {name: getattr(sys.modules[name], _ROTARY) for name in places if hasattr(sys.modules[name], _ROTARY)}

    def watching(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            found = rotate(q, k, cos, sin, **options)
            run.last = _Rotation(rotate, *found, cos, sin, options)
            return found

        return rotated

    _runs.append(run)
    try:
        whole.set_attn_implementation(BOTH_WAYS)
        for name, rotate in library.items():
            setattr(sys.modules[name], _ROTARY, watching(rotate))
        yield run
    finally:
        for name, rotate in library.items():
            setattr(sys.modules[name], _ROTARY, rotate)
        whole.set_attn_implementation(usual)
        _runs.pop()
