"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib.corpus import Corpus
from calib.divergence import cross_entropy, forward_kl
from calib.progress import stage

Logits = Callable[[slice], Tensor]  # rows of the corpus -> (rows, T, V)


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions: perplexity, bits per byte of the text (None for bare token ids), and, against the
    reference, its perplexity, mean KL(reference || model) in nats and the share of equal most likely tokens."""

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
def compare(corpus: Corpus, model: Logits, reference: Logits | None = None) -> Quality:
    """Every real token but the first of each row is predicted from those before it in the row."""
    nats = reference_nats = kl = agree = 0.0
    tokens = 0
    with stage("evaluate", len(corpus.ids), "rows") as done:
        for row in range(len(corpus.ids)):
            real = corpus.mask[row, 1:]
            target = corpus.ids[row, 1:][real]
            q = model(slice(row, row + 1))[0, :-1].float().cpu()[real]
            nats += float(cross_entropy(target, q).double().sum())
            tokens += len(target)
            if reference is not None:
                p = reference(slice(row, row + 1))[0, :-1].float().cpu()[real]
                reference_nats += float(cross_entropy(target, p).double().sum())
                kl += float(forward_kl(p, q).double().sum())
                agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            done("")

    def per_byte(nats: float) -> float | None:
        return nats / tokens / math.log(2) / corpus.bytes_per_token if corpus.bytes_per_token else None

    quality = Quality(tokens, math.exp(nats / tokens), per_byte(nats))
    if reference is None:
        return quality
    return Quality(
        tokens,
        quality.perplexity,
        quality.bits_per_byte,
        math.exp(reference_nats / tokens),
        per_byte(reference_nats),
        kl / tokens,
        agree / tokens,
    )
