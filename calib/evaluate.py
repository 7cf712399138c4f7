"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib.chunked import chunks
from calib.corpus import Corpus
from calib.divergence import cross_entropy, dense, forward_kl
from calib.parallel import add_up, mine
from calib.progress import stage

COPIES = 4  # of a chunk's logits: both models', and what is made of them
Logits = Callable[[int, slice], Tensor]  # row of the corpus, positions in it -> (positions, V)


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
def compare(corpus: Corpus, vocab: int, model: Logits, reference: Logits | None = None) -> Quality:
    """Every real token but the first of each row is predicted from those before it in the row.

    Each process asks for the rows that are its own. Logits exist for some positions at a time.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, nats, nats of the reference, KL, equal top tokens
    own = mine(len(corpus.ids))
    with stage("evaluate", len(own), "rows") as done:
        for row in own:
            for positions in chunks(corpus.ids.shape[1] - 1, COPIES * vocab):
                after = slice(positions.start + 1, positions.stop + 1)
                real = corpus.mask[row, after]
                target = corpus.ids[row, after][real]
                q = model(row, positions).cpu()[real]
                sums[0] += len(target)
                sums[1] += cross_entropy(target, q).double().sum()
                if reference is not None:
                    p = reference(row, positions).cpu()[real]
                    sums[2] += cross_entropy(target, p).double().sum()
                    sums[3] += dense(forward_kl, p, q).double().sum()
                    sums[4] += (p.argmax(-1) == q.argmax(-1)).sum()
            done("")
    add_up([sums])
    tokens = int(sums[0])
    nats, reference_nats, kl, agree = sums[1:].tolist()

    def per_byte(nats: float) -> float | None:
        return nats / tokens / math.log(2) / corpus.bytes_per_token if corpus.bytes_per_token else None

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
