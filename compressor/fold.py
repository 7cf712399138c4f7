"""Transforms that leave a model's function alone, folded into its weights (OSTQuant, OpenReview rAcgDBdKnP, section 4).

One code path: learning folds in float32 with a graph, the merge in float64 without, so what is trained is what ships.
Row convention: x (tokens, in), y = x W^T + b. With d hidden, H query heads, G key/value heads, h head dim, f FFN width:

    gains         readers W := W diag(gain), norm weight := 1; the head takes the final norm's gain
    residual R    embedding, readers and head W := W R; writers W := R^T W, b := R^T b
    norm scales   norm weight := 1/s, readers' columns times s
    value scale   v rows and bias divided by s; o columns times s, s repeated for the query heads of a group
    value R_j     per KV head j: v rows W := R_j^T W, b := R_j^T b; o columns of j's query heads W := W R_j
    key scale     k rows times s, q rows divided by s, s the same for channels i and i + h/2: the rotary embedding turns
    key angle     that pair as one plane, so a common factor and a common turn are all that commutes with it
    up scale      up rows divided by s, down columns times s
    Hadamard      down W := W H, against H on its input at run time

Where queries and keys are normalised after their projections (Qwen3) the key scale goes into the gains of those norms,
one for all heads, and there is no turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from calib.anatomy import Anatomy, Sizes
from compressor.rotate import apply_hadamard


@dataclass(frozen=True)
class BlockTransform:
    """One block's transforms; scales are positive factors, not logarithms."""

    attention_scale: Tensor  # (d,)
    mlp_scale: Tensor  # (d,)
    value_scale: Tensor  # (G * h,)
    up_scale: Tensor  # (f,)
    key_scale: Tensor  # (G, h/2), or (1, h/2) where queries and keys are normalised
    key_angle: Tensor  # (G, h/2), radians; not used where queries and keys are normalised
    value_rotation: Tensor  # (G, h, h)

    @staticmethod
    def identity(sizes: Sizes, anatomy: Anatomy, dtype: torch.dtype = torch.float64) -> BlockTransform:
        g, h = sizes.kv_heads, sizes.head_dim
        return BlockTransform(
            attention_scale=torch.ones(sizes.hidden, dtype=dtype),
            mlp_scale=torch.ones(sizes.hidden, dtype=dtype),
            value_scale=torch.ones(g * h, dtype=dtype),
            up_scale=torch.ones(sizes.ffn, dtype=dtype),
            key_scale=torch.ones(1 if anatomy.k_norm else g, h // 2, dtype=dtype),
            key_angle=torch.zeros(g, h // 2, dtype=dtype),
            value_rotation=torch.eye(h, dtype=dtype).expand(g, h, h).clone(),
        )

    def to(self, where: torch.dtype | torch.device) -> BlockTransform:
        return replace(self, **{f.name: getattr(self, f.name).to(where) for f in fields(self)})


def absorb_gains(params: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    """Move the gains of a block's two norms into the linears that read from them.  Gains may be negative or zero."""
    params = dict(params)
    for norm in (anatomy.attention_norm, anatomy.mlp_norm):
        gain = params[f"{norm}.weight"]
        for reader in anatomy.readers_of(norm):
            params[f"{reader}.weight"] = params[f"{reader}.weight"] * gain
        params[f"{norm}.weight"] = torch.ones_like(gain)
    return params


def fold_block(
    params: Mapping[str, Tensor],
    t: BlockTransform,
    residual: Tensor,
    anatomy: Anatomy,
    sizes: Sizes,
    *,
    hadamard_down: bool,
) -> dict[str, Tensor]:
    """A block's parameters, gains absorbed already, in the transformed basis.  `residual` is (d, d)."""
    a, g, h = anatomy, sizes.kv_heads, sizes.head_dim
    params = dict(params)

    def rows(name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, a map on (out, columns), to a linear's weight and bias."""
        params[f"{name}.weight"] = change(params[f"{name}.weight"])
        if f"{name}.bias" in params:
            params[f"{name}.bias"] = change(params[f"{name}.bias"][:, None])[:, 0]

    def columns(name: str, change: Callable[[Tensor], Tensor]) -> None:
        params[f"{name}.weight"] = change(params[f"{name}.weight"])

    # Inside attention: queries and keys, then values and output.
    if a.q_norm and a.k_norm:
        both_halves = t.key_scale[0].repeat(2)
        params[f"{a.k_norm}.weight"] = params[f"{a.k_norm}.weight"] * both_halves
        params[f"{a.q_norm}.weight"] = params[f"{a.q_norm}.weight"] / both_halves
    else:
        rows(a.k, lambda w: turn_pairs(w, t.key_scale, t.key_angle))
        per_query_head = [x.repeat_interleave(sizes.group, 0) for x in (1 / t.key_scale, t.key_angle)]
        rows(a.q, lambda w: turn_pairs(w, *per_query_head))
    rows(a.v, lambda w: (t.value_rotation.mT @ (w / t.value_scale[:, None]).unflatten(0, (g, h))).flatten(0, 1))

    def to_output(w: Tensor) -> Tensor:
        by_group = (w.unflatten(1, (g, sizes.group, h)) * t.value_scale.view(g, 1, h)).transpose(0, 1)
        rotated = by_group.flatten(1, 2) @ t.value_rotation  # (G, d * H/G, h) @ (G, h, h)
        return rotated.unflatten(1, (-1, sizes.group)).transpose(0, 1).flatten(1)

    columns(a.o, to_output)

    # Inside the feed-forward.
    rows(a.up, lambda w: w / t.up_scale[:, None])
    columns(a.down, lambda w: w * t.up_scale)
    if hadamard_down:
        columns(a.down, apply_hadamard)

    # The residual stream.
    for norm, scale in ((a.attention_norm, t.attention_scale), (a.mlp_norm, t.mlp_scale)):
        params[f"{norm}.weight"] = params[f"{norm}.weight"] / scale
        for reader in a.readers_of(norm):
            columns(reader, partial(_read, residual=residual, scale=scale))
    for writer in (a.o, a.down):
        rows(writer, lambda w: residual.mT @ w)
    return params


def _read(weight: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    return (weight @ residual) * scale


def turn_pairs(w: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """Scale and turn each rotary plane (channels i and i + h/2 of a head).

    w (heads * h, columns), scale and angle (heads, h/2).
    """
    first, second = w.unflatten(0, (len(scale), 2, -1)).unbind(1)
    cos, sin = (scale * angle.cos())[..., None], (scale * angle.sin())[..., None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], 1).flatten(0, 2)


def fold_embedding(embedding: Tensor, residual: Tensor) -> Tensor:
    """(V, d).  Rows are not centred: RMS norms, unlike layer norms, see the mean."""
    return embedding @ residual


def fold_head(head: Tensor, final_gain: Tensor, residual: Tensor) -> Tensor:
    """(V, d), for a final norm whose weight is set to one."""
    return (head * final_gain) @ residual
