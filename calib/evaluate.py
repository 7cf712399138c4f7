"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib import BadInput
from calib.chunked import chunks
from calib.corpus import Corpus
from calib.divergence import cross_entropy, dense, forward_kl
from calib.parallel import add_up, mine
from calib.progress import stage

COPIES = 4  # of a chunk's logits: both models', and what is made of them
Logits = Callable[[int, slice], Tensor]  # row of the corpus, positions in it -> (positions, V)


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions: perplexity, bits per byte of the text that those tokens stand for (None for bare token
    ids), and, against the reference, its perplexity, mean KL(reference || model) in nats and the share of
    equal most likely tokens."""

    tokens: int
    perplexity: float
    bits_per_byte: float | None
    reference_perplexity: float | None = None
    reference_bits_per_byte: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def asdict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def compare(
    corpus: Corpus, vocab: int, model: Logits, reference: Logits | None = None, *, answers_only: bool = False
) -> Quality:
    """Every real token but the first of each row is predicted from those before it in the row; of answers alone where
    `answers_only`, which the corpus must know then.

    Each process asks for the rows that are its own. Logits exist for some positions at a time.
    """
    sums = torch.zeros(6, dtype=torch.float64)  # tokens, nats, nats of the reference, KL, equal top tokens, bytes
    scored = corpus.mask if not answers_only or corpus.answers is None else corpus.mask & corpus.answers
    own = mine(len(corpus.ids))
    with stage("evaluate", len(own), "rows") as done:
        for row in own:
            for positions in chunks(corpus.ids.shape[1] - 1, COPIES * vocab):
                after = slice(positions.start + 1, positions.stop + 1)
                real = scored[row, after]
                if not real.any():
                    continue
                target = corpus.ids[row, after][real]
                q = model(row, positions).cpu()[real]
                sums[0] += len(target)
                sums[1] += cross_entropy(target, q).double().sum()
                if corpus.token_bytes is not None:
                    sums[5] += corpus.token_bytes[row, after][real].sum()
                if reference is not None:
                    p = reference(row, positions).cpu()[real]
                    sums[2] += cross_entropy(target, p).double().sum()
                    sums[3] += dense(forward_kl, p, q).double().sum()
                    sums[4] += (p.argmax(-1) == q.argmax(-1)).sum()
            done("")
    add_up([sums])
    tokens = int(sums[0])
    if not tokens:
        raise BadInput(f"{corpus.source}: no token of it is scored; give longer rows, or rows that have answers")
    nats, reference_nats, kl, agree, text_bytes = sums[1:].tolist()

    def per_byte(nats: float) -> float | None:
        return nats / math.log(2) / text_bytes if text_bytes else None

    quality = Quality(tokens, _perplexity(nats / tokens), per_byte(nats))
    if reference is None:
        return quality
    return Quality(
        tokens,
        quality.perplexity,
        quality.bits_per_byte,
        _perplexity(reference_nats / tokens),
        per_byte(reference_nats),
        kl / tokens,
        agree / tokens,
    )


def _perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
