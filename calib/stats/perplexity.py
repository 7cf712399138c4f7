"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.corpus import Corpus
from calib.losses.chunked_head import chunks
from calib.losses.divergences import cross_entropy, dense, forward_kl
from calib.runtime.distributed import all_reduce_sum_, local_indices
from calib.runtime.progress import stage
from calib.stats.tell_apart import tell_apart_rate, tokens_to_tell

LOGIT_COPIES = 4  # of a chunk's logits: both models', and what is made of them
Logits = Callable[[int, slice], Tensor]  # row of the corpus, positions in it -> (positions, V)


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions: perplexity, bits per byte of the text that those tokens stand for (None for bare token
    ids), and, against the reference, its perplexity, mean KL(reference || model) in nats, the share of equal most
    likely tokens, the tell-apart rate (`calib.stats.tell_apart`: how often an optimal observer names the writer of one
    token; 0.5 is guessing) and how many of the reference's tokens it reads until it is 95% sure (None: never).

    Of a masked language model also the share of hidden tokens that are its most likely ones (accuracy), and the
    reference's.

    `information`, where it was asked for, is the information plane of "model" and "reference": in nats, by block, what
    a state tells of the token "read" and of the "next" one (`compressor.engine.information_plane`).

    The standard errors of perplexity, KL and tell-apart rate are of the mean over rows (a ratio of sums: what a row's
    nats deviate from its tokens' share), None of a single row.
    """

    tokens: int
    perplexity: float
    bits_per_byte: float | None
    reference_perplexity: float | None = None
    reference_bits_per_byte: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    tell_apart: float | None = None
    tell_apart_error: float | None = None
    tokens_to_tell: int | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    information: dict[str, dict[str, list[float]]] | None = None

    def asdict(self) -> dict[str, Any]:
        """The figures by name; `information` and accuracies only where there are such."""
        some = ("accuracy", "reference_accuracy", "information")
        return {name: value for name, value in asdict(self).items() if name not in some or value is not None}


@torch.no_grad()
def compare(
    corpus: Corpus, vocab: int, model: Logits, reference: Logits | None = None, *, answers_only: bool = False
) -> Quality:
    """Every real token but the first of each row is predicted from those before it in the row, or every hidden one from
    those around it; of answers alone where `answers_only`, which the corpus must know then.

    Each process asks for the rows that are its own. Logits exist for some positions at a time.
    """
    by_row = _sums_by_row(corpus, scored_tokens(corpus, answers_only), vocab, model, reference)
    sums = by_row.sum(0)
    tokens = int(sums[0])
    if not tokens:
        raise BadInput(f"{corpus.source}: no token of it is scored; give longer rows, or rows that have answers")
    nats, reference_nats, kl, agree, text_bytes, apart, right, reference_right = sums[1:].tolist()
    accurate = corpus.hidden is not None

    def per_byte(nats: float) -> float | None:
        return nats / math.log(2) / text_bytes if text_bytes else None

    error = standard_error(by_row[:, 1], by_row[:, 0])
    perplexity = _perplexity(nats / tokens)
    quality = Quality(
        tokens, perplexity, per_byte(nats), perplexity_error=None if error is None else perplexity * error,
        accuracy=right / tokens if accurate else None,
    )  # fmt: skip
    if reference is None:
        return quality
    return replace(
        quality,
        reference_perplexity=_perplexity(reference_nats / tokens),
        reference_bits_per_byte=per_byte(reference_nats),
        kl=kl / tokens,
        top1_agreement=agree / tokens,
        kl_error=standard_error(by_row[:, 3], by_row[:, 0]),
        tell_apart=apart / tokens,
        tell_apart_error=standard_error(by_row[:, 6], by_row[:, 0]),
        tokens_to_tell=tokens_to_tell(kl / tokens),
        reference_accuracy=reference_right / tokens if accurate else None,
    )


def _sums_by_row(corpus: Corpus, scored: Tensor, vocab: int, model: Logits, reference: Logits | None) -> Tensor:
    """(N, 9), over the tokens of each row that are `scored` (N, T): how many, nats, nats of the reference, KL, equal
    top tokens, bytes, tell-apart rates, right answers, right ones of the reference."""
    ahead = 1 if corpus.hidden is None else 0
    by_row = torch.zeros(len(corpus.ids), 9, dtype=torch.float64)
    own = local_indices(len(corpus.ids))
    with stage("evaluate", len(own), "rows") as done:
        for row in own:
            sums = by_row[row]
            for positions in chunks(corpus.ids.shape[1] - ahead, LOGIT_COPIES * vocab):
                after = slice(positions.start + ahead, positions.stop + ahead)
                real = scored[row, after]
                if not real.any():
                    continue
                target = corpus.ids[row, after][real]
                q = model(row, positions).cpu()[real]
                sums[0] += len(target)
                sums[1] += cross_entropy(target, q).double().sum()
                sums[7] += (q.argmax(-1) == target).sum()
                if corpus.token_bytes is not None:
                    sums[5] += corpus.token_bytes[row, after][real].sum()
                if reference is not None:
                    p = reference(row, positions).cpu()[real]
                    sums[2] += cross_entropy(target, p).double().sum()
                    sums[3] += dense(forward_kl, p, q).double().sum()
                    sums[4] += (p.argmax(-1) == q.argmax(-1)).sum()
                    sums[6] += tell_apart_rate(p, q).double().sum()
                    sums[8] += (p.argmax(-1) == target).sum()
            done("")
    all_reduce_sum_([by_row])
    return by_row


def scored_tokens(corpus: Corpus, answers_only: bool) -> Tensor:
    """Tokens (N, T) that are to be predicted, where something comes before them."""
    if corpus.hidden is not None:
        return corpus.hidden
    scored = corpus.mask if not answers_only or corpus.answers is None else corpus.mask & corpus.answers
    return scored if corpus.pictured is None else scored & ~corpus.pictured


def standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Standard error of sums.sum() / counts.sum(), both (n,) by row, for rows drawn independently; None with fewer than
    two rows.

    The usual linearization of a ratio (Cochran, Sampling Techniques, section 6.3); with equal counts it is the standard
    error of the mean of the rows' means.
    """
    rows = int((counts > 0).sum())
    if rows < 2:
        return None
    apart = sums - counts * (sums.sum() / counts.sum())
    return float((rows / (rows - 1) * apart.square().sum()).sqrt() / counts.sum())


def _perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
