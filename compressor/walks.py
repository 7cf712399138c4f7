"""The two walks of a quantization: the float model as it is, then each block transformed, rounded and handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.corpus import Corpus
from calib.divergence import Top, top_k
from calib.evaluate import Quality, compare
from calib.progress import stage
from calib.stats import Moments
from calib.stream import Stream, micro_batches, scratch
from compressor.fold import absorb_gains, fold_block, fold_embedding, fold_head
from compressor.formats import compressed_tensors
from compressor.learn import Transforms
from compressor.online import Online
from compressor.qsur import qsur_of
from compressor.rounding import MICRO_BATCH, advance, input_moments, round_block, sites
from compressor.scheme import Scheme

RANGE_POINTS = 33  # quantiles kept of the channels' ranges: enough for a chart, the same few for any width

Profile = dict[str, dict[str, Any]]  # linear -> QSUR and channel ranges of its weights and inputs


@dataclass(frozen=True)
class Before:
    """What the float model says: the teacher's top-k on calibration rows, hidden states on held-out rows, profiles."""

    top: Top | None
    held_out: Tensor  # (M, T, d), after the last block
    head: Tensor  # (V, d), the final norm's gain included
    profiles: list[Profile]


@dataclass(frozen=True)
class After:
    """What rounding did: relative output error of every linear, profiles, quality on held-out rows."""

    errors: list[dict[str, float]]
    profiles: list[Profile]
    quality: Quality


@torch.no_grad()
def float_walk(stream: Stream, corpus: Corpus, samples: int, k: int, budget: int, folder: Path) -> Before:
    """Run the model as stored.  The first `samples` rows calibrate, the rest are held out; k = 0 keeps no top-k."""
    mask = corpus.mask[:samples]
    hidden = _hidden(stream, corpus, stream.read_embedding(), budget, folder)
    profiles = []
    with stage("float model", stream.sizes.layers, "blocks") as done:
        for i in range(stream.sizes.layers):
            params = stream.read_block(i)
            moments = input_moments(stream, i, params, hidden[:samples], mask, Online())
            profiles.append(_profile(stream, params, moments))
            advance(stream, i, params, hidden, Online())
            done("")
    head = stream.read_head() * stream.read_final_gain()
    tops = []
    if k:
        for rows in micro_batches(samples, 1):
            tops.append(top_k(logits(stream, hidden[rows].to(stream.device), head), k))
    top = Top(*(torch.cat(parts) for parts in zip(*((t.index, t.log_p, t.log_tail) for t in tops), strict=True))) if k else None
    return Before(top, hidden[samples:].clone(), head, profiles)


@torch.no_grad()
def rounding_walk(
    stream: Stream,
    corpus: Corpus,
    before: Before,
    transforms: Transforms | None,
    scheme: Scheme,
    store: Callable[[Mapping[str, Tensor]], None],
    *,
    samples: int,
    rounding: str,
    damp: float,
    budget: int,
    folder: Path,
) -> After:
    """Transform, round and `store` every tensor of the model, block after block, and measure the result.

    Without transforms the weights stay as they are, norm gains and tied embeddings included. Everything is rounded to
    the dtype it is stored in before it is used, so what is measured here is what will be loaded.
    """
    a = stream.anatomy
    embed_dtype = stream.weights.entries[f"{a.embed}.weight"].dtype
    embedding, head, gain = stream.read_embedding(), stream.read_head(), stream.read_final_gain()
    if transforms:
        residual = transforms.residual.to(stream.device)
        embedding = fold_embedding(embedding.double(), residual)
        head = fold_head(head.double(), gain.double(), residual)
        gain = torch.ones_like(gain)
    own_head = transforms or not stream.config.tie_word_embeddings
    top_level = {f"{a.embed}.weight": embedding.to(embed_dtype), f"{a.final_norm}.weight": gain.to(embed_dtype)}
    if own_head:
        top_level[f"{a.head}.weight"] = head.to(embed_dtype)
    store(top_level)
    embedding, head = embedding.to(embed_dtype).to(stream.dtype), head.to(embed_dtype).to(stream.dtype)

    mask = corpus.mask[:samples]
    hidden = _hidden(stream, corpus, embedding, budget, folder)
    errors, profiles = [], []
    with stage(f"round ({rounding})", stream.sizes.layers, "blocks") as done:
        for i in range(stream.sizes.layers):
            prefix = f"{a.blocks}.{i}"
            online = transforms.online[i] if transforms else Online(scheme.activations, scheme.kv)
            params = _transformed(stream, i, transforms)
            dtypes = {name: stream.weights.entries[f"{prefix}.{name}"].dtype for name in params}
            moments = input_moments(stream, i, params, hidden[:samples], mask, online)
            profiles.append(_profile(stream, params, moments))
            stored_scale = dtypes[f"{a.q}.weight"]
            rounded, error = round_block(
                params, moments, a, scheme.weights, rounding=rounding, damp=damp, stored=stored_scale, where=prefix
            )
            errors.append(error)
            for name, tensor in params.items():
                linear = name.removesuffix(".weight")
                if linear in rounded:
                    params[name] = rounded[linear].weight()
                    store(compressed_tensors.tensors(f"{prefix}.{linear}", rounded[linear], scheme, dtypes[name]))
                else:
                    kept = tensor.to(dtypes[name])
                    params[name] = kept.to(stream.dtype)
                    store({f"{prefix}.{name}": kept})
            advance(stream, i, params, hidden, online)
            done(f"output error {max(error.values()):.2e}")
    gained = head * gain
    quality = compare(
        corpus[samples:],
        lambda rows: logits(stream, hidden[samples:][rows].to(stream.device), gained),
        lambda rows: logits(stream, before.held_out[rows].to(stream.device), before.head),
    )
    return After(errors, profiles, quality)


def logits(stream: Stream, hidden: Tensor, head: Tensor) -> Tensor:
    """(.., T, d) -> (.., T, V); `head` includes the final norm's gain."""
    return stream.final_norm(hidden, torch.ones_like(head[0])) @ head.mT


def _hidden(stream: Stream, corpus: Corpus, embedding: Tensor, budget: int, folder: Path) -> Tensor:
    hidden = scratch((*corpus.ids.shape, embedding.shape[1]), stream.dtype, budget, folder)
    for rows in micro_batches(len(hidden), MICRO_BATCH):
        hidden[rows] = embedding[corpus.ids[rows].to(embedding.device)].to(hidden.device)
    return hidden


def _transformed(stream: Stream, index: int, transforms: Transforms | None) -> dict[str, Tensor]:
    """Block `index`'s parameters, transformed in float64."""
    params = stream.read_block(index)
    if transforms is None:
        return params
    exact = absorb_gains({name: p.double() for name, p in params.items()}, stream.anatomy)
    exact = fold_block(
        exact,
        transforms.blocks[index].to(torch.float64),
        transforms.residual.to(stream.device),
        stream.anatomy,
        stream.sizes,
        hadamard_down=transforms.online[index].hadamard_down,
    )
    return {name: p.to(stream.dtype) for name, p in exact.items()}


def _profile(stream: Stream, params: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> Profile:
    profile: Profile = {}
    for site, sharing in sites(stream.anatomy).items():
        inputs = _summary(moments[site])
        for name in sharing:
            weight = params[f"{name}.weight"]
            profile[name] = {
                "activations": inputs,
                "weights": _summary(Moments.zero(weight.shape[1], weight.device).add(weight)),
            }
    return profile


def _summary(moments: Moments) -> dict[str, Any]:
    ranges = moments.absmax.quantile(torch.linspace(0, 1, RANGE_POINTS, dtype=torch.float64, device=moments.absmax.device))
    return {**qsur_of(moments), "channel_range": [float(f"{x:.4g}") for x in ranges.tolist()]}
