"""The two walks of a quantization: the float model as it is, then each block transformed, rounded and handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from compressor.grid import Grid
from compressor.learn import Transforms
from compressor.online import Online
from compressor.qsur import qsur_of
from compressor.rounding import MICRO_BATCH, RoundedBlock, advance, input_moments, round_block, sites

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
class Ends:
    """The parts of a model that are no block's, in the dtype they are stored in.  head is None where it is tied."""

    embedding: Tensor
    final_gain: Tensor
    head: Tensor | None

    def logits_head(self, dtype: torch.dtype) -> Tensor:
        """(V, d), the final norm's gain included."""
        head = self.embedding if self.head is None else self.head
        return head.to(dtype) * self.final_gain.to(dtype)


@dataclass(frozen=True)
class After:
    """What rounding did: relative output error and profile of every linear, by block; final held-out states."""

    errors: list[dict[str, float]]
    profiles: list[Profile]
    held_out: Tensor  # (M, T, d), after the last block


@torch.no_grad()
def float_walk(stream: Stream, calibration: Corpus, held_out: Corpus, k: int, budget: int, folder: Path) -> Before:
    """Run the model as stored on rows of one length; k = 0 keeps no top-k."""
    samples, mask = len(calibration.ids), calibration.mask
    hidden = _hidden(stream, torch.cat([calibration.ids, held_out.ids]), stream.read_embedding(), budget, folder)
    profiles = []
    with stage("float model", stream.sizes.layers, "blocks") as done:
        for i in range(stream.sizes.layers):
            params = stream.read_block(i)
            moments = input_moments(stream, i, params, hidden[:samples], mask, Online(), keep=hidden[:samples])
            profiles.append(_profile(stream, params, moments))
            advance(stream, i, params, hidden[samples:], Online())
            done("")
    head = stream.read_head() * stream.read_final_gain()
    top = None
    if k:
        rows = [top_k(logits(stream, hidden[i].to(stream.device), head), k) for i in range(samples)]
        top = Top(*(torch.stack(part) for part in zip(*((t.index, t.log_p, t.log_tail) for t in rows), strict=True)))
    return Before(top, hidden[samples:].clone(), head, profiles)


def transformed_ends(stream: Stream, transforms: Transforms | None) -> Ends:
    """Embedding, final gain and head.  Without transforms they stay as they are, tied if they were."""
    dtype = stream.weights.entries[f"{stream.anatomy.embed}.weight"].dtype
    embedding, gain = stream.read_embedding(), stream.read_final_gain()
    if transforms is None:
        head = None if stream.config.tie_word_embeddings else stream.read_head().to(dtype)
        return Ends(embedding.to(dtype), gain.to(dtype), head)
    residual = transforms.residual.to(stream.device)
    return Ends(
        fold_embedding(embedding.double(), residual).to(dtype),
        torch.ones_like(gain, dtype=dtype),
        fold_head(stream.read_head().double(), gain.double(), residual).to(dtype),
    )


@torch.no_grad()
def rounding_walk(
    stream: Stream,
    calibration: Corpus,
    held_out: Corpus,
    ends: Ends,
    transforms: Transforms | None,
    online: Sequence[Online],
    grid: Grid,
    store: Callable[[int, RoundedBlock], None],
    *,
    rounding: str,
    damp: float,
    budget: int,
    folder: Path,
) -> After:
    """Transform and round block after block, each fed by the rounded ones before it, and `store` them.

    Everything is rounded to the dtype it is stored in before it is used, so that what is measured is what is loaded.
    """
    samples, mask = len(calibration.ids), calibration.mask
    ids = torch.cat([calibration.ids, held_out.ids])
    hidden = _hidden(stream, ids, ends.embedding.to(stream.dtype), budget, folder)
    errors, profiles = [], []
    with stage(f"round ({rounding})", stream.sizes.layers, "blocks") as done:
        for i in range(stream.sizes.layers):
            prefix = f"{stream.anatomy.blocks}.{i}"
            params = _transformed(stream, i, transforms)
            moments = input_moments(stream, i, params, hidden[:samples], mask, online[i])
            profiles.append(_profile(stream, params, moments))
            dtypes = {name: stream.weights.entries[f"{prefix}.{name}"].dtype for name in params}
            linears, error = round_block(
                params,
                moments,
                stream.anatomy,
                grid,
                rounding=rounding,
                damp=damp,
                stored=dtypes[f"{stream.anatomy.q}.weight"],
                where=prefix,
            )
            errors.append(error)
            rest = {n: p.to(dtypes[n]) for n, p in params.items() if n.removesuffix(".weight") not in linears}
            block = RoundedBlock(linears, rest)
            store(i, block)
            advance(stream, i, block.params(stream.dtype), hidden, online[i])
            done(f"output error {max(error.values()):.2e}")
    return After(errors, profiles, hidden[samples:].clone())


@torch.no_grad()
def run_rounded(
    stream: Stream, corpus: Corpus, ends: Ends, blocks: Sequence[RoundedBlock], online: Sequence[Online]
) -> Tensor:
    """The rounded model on all rows of `corpus`, which are few -> hidden states (N, T, d) after the last block."""
    hidden = ends.embedding.to(stream.dtype)[corpus.ids.to(stream.device)]
    for i, (block, run_time) in enumerate(zip(blocks, online, strict=True)):
        advance(stream, i, block.params(stream.dtype), hidden, run_time)
    return hidden


def quality(stream: Stream, corpus: Corpus, ends: Ends, hidden: Tensor, before: Before) -> Quality:
    """The rounded model, by its final hidden states on the held-out rows `corpus`, against the float one."""
    head = ends.logits_head(stream.dtype)
    return compare(
        corpus,
        lambda rows: logits(stream, hidden[rows].to(stream.device), head),
        lambda rows: logits(stream, before.held_out[rows].to(stream.device), before.head),
    )


def logits(stream: Stream, hidden: Tensor, head: Tensor) -> Tensor:
    """(.., T, d) -> (.., T, V); `head` includes the final norm's gain."""
    return stream.final_norm(hidden, torch.ones_like(head[0])) @ head.mT


def _hidden(stream: Stream, ids: Tensor, embedding: Tensor, budget: int, folder: Path) -> Tensor:
    hidden = scratch((*ids.shape, embedding.shape[1]), stream.dtype, budget, folder)
    for rows in micro_batches(len(hidden), MICRO_BATCH):
        hidden[rows] = embedding[ids[rows].to(embedding.device)].to(hidden.device)
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
    ranges = moments.absmax.quantile(
        torch.linspace(0, 1, RANGE_POINTS, dtype=torch.float64, device=moments.absmax.device)
    )
    return {**qsur_of(moments), "channel_range": [float(f"{x:.4g}") for x in ranges.tolist()]}
