"""Transforms that leave a model's function alone, folded into its weights (OSTQuant, OpenReview rAcgDBdKnP, section 4).

One code path: learning folds in float32 with a graph, the merge in float64 without, so what is trained is what ships.
Row convention: x (tokens, in), y = x W^T + b. With d hidden, H query heads, G key/value heads, h head dim, f FFN width:

    gains         readers W := W diag(gain), norm weight := 1; the head takes the final norm's gain: where there is an R
    residual R    embedding, readers and head W := W R; writers W := R^T W, b := R^T b
    norm scales   norm weight := 1/s, readers' columns times s
    value scale   v rows and bias divided by s; o columns times s, s repeated for the query heads of a group
    value R_j     per KV head j: v rows W := R_j^T W, b := R_j^T b; o columns of j's query heads W := W R_j
    key scale     k rows times s, q rows divided by s, s the same for channels i and i + h/2: the rotary embedding turns
    key angle     that pair as one plane, so a common factor and a common turn are all that commutes with it
    up scale      up rows divided by s, down columns times s; for every expert its own
    Hadamard      down W := W H, against H on its input at run time

Where queries and keys are normalised after their projections the key scale goes into the gains of those norms, and
there is no turn; where the norm is over each head by itself (Qwen3) one scale serves all heads. Where a norm stands
between a writer and the stream (Gemma, OLMo 2) nothing can pass it, and the residual rotation is left out; where none
stands before the readers (OLMo 2) there are no norm scales.

A rotation passes a norm only if the norm's gain is in the readers. Without one the gains stay in the norms: in the
readers nothing would spread them again, and gains of gemma-3-270m lie between 0 and 123 within one norm, so that 61% of
a gate's 4-bit codes would be 0. (The same as scales that start at 1 / |gain|, but for gains that are 0 or negative, of
which this has nothing to fear.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib.blockwise.architectures import (
    Architecture,
    Sizes,
    architecture_of,
    assembled,
    parts_unknown,
    separated,
    sizes_of,
)
from calib.blockwise.model import micro_batches
from compressor.engine.rotations import apply_hadamard


@dataclass(frozen=True)
class BlockTransform:
    """Transforms of one block; scales are positive factors, not logarithms.  E is 1 where there are no experts."""

    attention_scale: Tensor  # (d,)
    mlp_scale: Tensor  # (d,)
    value_scale: Tensor  # (G * h,)
    up_scale: Tensor  # (E, f)
    key_scale: Tensor  # (G, r/2), or (1, r/2) for all heads, r of a head's h channels being turned by the embedding
    key_angle: Tensor  # (G, r/2), radians
    value_rotation: Tensor  # (G, h, h)

    @staticmethod
    def identity(sizes: Sizes, architecture: Architecture, dtype: torch.dtype = torch.float64) -> BlockTransform:
        """Transforms that change nothing."""
        g, h, half = sizes.kv_heads, sizes.head_dim, sizes.rotary_dim // 2
        one_for_all = architecture.k_norm is not None and architecture.qk_norm_over == "head"
        return BlockTransform(
            attention_scale=torch.ones(sizes.hidden, dtype=dtype),
            mlp_scale=torch.ones(sizes.hidden, dtype=dtype),
            value_scale=torch.ones(g * h, dtype=dtype),
            up_scale=torch.ones(len(architecture.ups), sizes.ffn, dtype=dtype),
            key_scale=torch.ones(1 if one_for_all else g, half, dtype=dtype),
            key_angle=torch.zeros(g, half, dtype=dtype),
            value_rotation=torch.eye(h, dtype=dtype).expand(g, h, h).clone(),
        )

    def to(self, where: torch.dtype | torch.device) -> BlockTransform:
        """Move all tensors to a dtype or a device."""
        return replace(self, **{f.name: getattr(self, f.name).to(where) for f in fields(self)})


def unsupported_transforms(config: PretrainedConfig) -> dict[str, str]:
    """Transform -> why a model of this config does not admit it."""
    if (reason := parts_unknown(config)) is not None:
        return {"transforms": reason}
    architecture, reasons = architecture_of(config), dict[str, str]()
    if architecture.writer_norms:
        reasons["residual_rotation"] = f"a norm ({architecture.writer_norms[0]}) stands between a writer and the stream"
    if architecture.attention_norm is None:
        reasons["attention_scale"] = "no norm before queries, keys and values"
    if architecture.mlp_norm is None:
        reasons["mlp_scale"] = "no norm before the feed-forward"
    if architecture.k_norm:
        reasons["key_angle"] = f"queries and keys are normalised ({architecture.k_norm}) after their projections"
    return reasons


def absorb_gains(params: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Move the gains of a block's pre-norms into what reads from them.  Gains may be negative or zero.

    Of the parameters only some may be given; a reader needs its norm beside it.
    """
    params = dict(params)
    for norm in (architecture.attention_norm, architecture.mlp_norm):
        if norm is not None and f"{norm}.weight" in params:
            gain = params[f"{norm}.weight"]
            for reader in architecture.readers_of(norm):
                if f"{reader}.weight" in params:
                    params[f"{reader}.weight"] = params[f"{reader}.weight"] * gain
            params[f"{norm}.weight"] = torch.ones_like(gain)
    return params


def with_gain(
    params: Mapping[str, Tensor], name: str, architecture: Architecture, *, rotated: bool
) -> dict[str, Tensor]:
    """The parameter `name` alone, for `fold_block` one at a time: where the residual stream is `rotated`, with the gain
    of the norm that it reads from absorbed; otherwise as it is, as gains then stay in the norms."""
    if not rotated:
        return {name: params[name]}
    linear, _, kind = name.rpartition(".")
    norms = [f"{norm}.weight" for norm in (architecture.attention_norm, architecture.mlp_norm) if norm]
    reads = [n for n in norms if kind == "weight" and linear in architecture.readers_of(n.removesuffix(".weight"))]
    return {name: absorb_gains({n: params[n] for n in (name, *reads)}, architecture)[name]}


class _Folded:
    """Parameters of a block, changed one linear after the other; those that are not there are passed over."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)

    def rows(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, a map on (out, columns), to a linear's weight and bias."""
        self.columns(name, change)
        if f"{name}.bias" in self.params:
            self.params[f"{name}.bias"] = change(self.params[f"{name}.bias"][:, None])[:, 0]

    def columns(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, a map on (out, columns), to a weight."""
        if f"{name}.weight" in self.params:
            self.params[f"{name}.weight"] = change(self.params[f"{name}.weight"])


def fold_block(
    params: Mapping[str, Tensor],
    t: BlockTransform,
    residual: Tensor | None,
    architecture: Architecture,
    sizes: Sizes,
    *,
    hadamard_down: bool,
) -> dict[str, Tensor]:
    """Fold a block's transforms into its weights.

    Args:
        params: the block's parameters, or some of them.
        t: its transforms.
        residual: rotation (d, d) of the residual stream, where the architecture admits it; gains of norms must be
            absorbed already then.
        architecture: which linears read and write what.
        sizes: of the model.
        hadamard_down: whether inputs of down projections pass a Hadamard transform as the model runs.

    Returns:
        The parameters in the transformed basis.
    """
    a, folded = architecture, _Folded(params)
    _fold_attention(folded, t, architecture, sizes)
    for up, down, scale in zip(a.ups, a.downs, t.up_scale, strict=True):  # of the feed-forward, or of each expert
        folded.rows(up, lambda w, s=scale: w / s[:, None])  # type: ignore[misc]
        folded.columns(down, lambda w, s=scale: w * s)  # type: ignore[misc]
        if hadamard_down:
            folded.columns(down, apply_hadamard)
    if residual is not None:
        for writer in a.writers:
            folded.rows(writer, lambda w: residual.mT @ w)
    for norm, scale in ((a.attention_norm, t.attention_scale), (a.mlp_norm, t.mlp_scale)):
        if norm is not None:
            folded.columns(norm, lambda w, s=scale: w / s)  # type: ignore[misc]
            for reader in a.readers_of(norm):
                folded.columns(reader, lambda w, s=scale: (w if residual is None else w @ residual) * s)  # type: ignore[misc]
    return folded.params


def _fold_attention(folded: _Folded, t: BlockTransform, a: Architecture, sizes: Sizes) -> None:
    """Queries and keys, then values and output."""
    g, h = sizes.kv_heads, sizes.head_dim
    if a.q_norm and a.k_norm:
        key_gain = _over_head(t.key_scale, h).flatten()
        query_gain = key_gain
        if a.qk_norm_over == "all":
            query_gain = _over_head(t.key_scale.repeat_interleave(sizes.group, 0), h).flatten()
        folded.columns(a.k_norm, lambda w: w * key_gain)
        folded.columns(a.q_norm, lambda w: w / query_gain)
    else:
        folded.rows(a.k, lambda w: turn_pairs(w, t.key_scale, t.key_angle, h))
        query_scale = (1 / t.key_scale).repeat_interleave(sizes.group, 0)
        query_angle = t.key_angle.repeat_interleave(sizes.group, 0)
        folded.rows(a.q, lambda w: turn_pairs(w, query_scale, query_angle, h))
    folded.rows(a.v, lambda w: (t.value_rotation.mT @ (w / t.value_scale[:, None]).unflatten(0, (g, h))).flatten(0, 1))

    def to_output(w: Tensor) -> Tensor:
        by_group = (w.unflatten(1, (g, sizes.group, h)) * t.value_scale.view(g, 1, h)).transpose(0, 1)
        rotated = by_group.flatten(1, 2) @ t.value_rotation  # (G, d * H/G, h) @ (G, h, h)
        return rotated.unflatten(1, (-1, sizes.group)).transpose(0, 1).flatten(1)

    folded.columns(a.o, to_output)


def _over_head(scale: Tensor, h: int) -> Tensor:
    """(heads, r/2) -> (heads, h): channels i and i + r/2 share a scale, those that are not turned keep one."""
    rest = torch.ones(len(scale), h - 2 * scale.shape[1], dtype=scale.dtype, device=scale.device)
    return torch.cat([scale, scale, rest], 1)


def turn_pairs(w: Tensor, scale: Tensor, angle: Tensor, h: int) -> Tensor:
    """Scale and turn each rotary plane: channels i and i + r/2 of each head's leading r.

    w (heads * h, columns), scale and angle (heads, r/2).
    """
    half = scale.shape[1]
    first, second, rest = w.unflatten(0, (-1, h)).split([half, half, h - 2 * half], 1)
    cos, sin = (scale * angle.cos())[..., None], (scale * angle.sin())[..., None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], 1).flatten(0, 1)


@torch.no_grad()
def folded_block(
    params: Mapping[str, Tensor],
    t: BlockTransform,
    residual: Tensor | None,
    config: PretrainedConfig,
    *,
    hadamard_down: bool,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Fold a block's transforms into the parameters of the library's block, one linear after the other in float64.

    Args:
        params: of the block.
        t: its transforms, in float64.
        residual: rotation (d, d) of the residual stream, where the architecture admits it.
        config: of the model.
        hadamard_down: whether inputs of down projections pass a Hadamard transform as the model runs.
        dtype: of what is given back.

    Returns:
        The parameters in the transformed basis.
    """
    a, sizes, parts, exact = architecture_of(config), sizes_of(config), separated(params, config), dict[str, Tensor]()
    norms = {name: p.double() for name, p in parts.items() if name.removesuffix(".weight") in a.norms}
    for name, p in parts.items():
        part = with_gain(norms | {name: p.double()}, name, a, rotated=residual is not None)
        exact[name] = fold_block(part, t, residual, a, sizes, hadamard_down=hadamard_down)[name].to(dtype)
    return assembled(exact, config)


def folded_outer(
    outer: Mapping[str, Tensor], residual: Tensor, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fold a rotation (d, d) of the residual stream into embedding and head, which become `dtype`, and the final norm's
    gain into the head; where the two were one table they are two then."""
    a = architecture_of(config)
    embed, norm, head = (f"{module}.weight" for module in (a.embed, a.final_norm, a.head))
    gain = outer[norm].double() + a.gain_offset

    def by_rows(fold: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
        """In float64 for a few rows at a time: the whole table would be twice as large again."""
        result = torch.empty_like(table, dtype=dtype)
        for some in micro_batches(len(table), 1):
            result[some] = fold(table[some].double()).to(dtype)
        return result

    return {
        **outer,
        embed: by_rows(lambda e: fold_embedding(e, residual), outer[embed]),
        norm: torch.ones_like(outer[norm]) - a.gain_offset,
        head: by_rows(lambda h: fold_head(h, gain, residual), outer[head]),
    }


def fold_embedding(embedding: Tensor, residual: Tensor) -> Tensor:
    """(V, d).  Rows are not centred: RMS norms, unlike layer norms, see the mean."""
    return embedding @ residual


def fold_head(head: Tensor, final_gain: Tensor, residual: Tensor) -> Tensor:
    """(V, d), for a final norm whose weight is set to one."""
    return (head * final_gain) @ residual
