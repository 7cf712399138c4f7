from __future__ import annotations

import math

import pytest
import torch

from calib.data.corpus import Corpus
from calib.stats.perplexity import compare


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_padded_rows_count_their_real_tokens_and_no_others(
    at_once: int, answers_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain sums over each row's own length, of answers alone where that is asked for; the first token of a row
    is given, not predicted.  Bits are shared by the bytes of the tokens that are scored."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (3, 6), generator=g)
    lengths = [6, 2, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    p, q = (torch.randn(3, 6, 7, generator=g) for _ in range(2))
    monkeypatch.setattr("calib.losses.chunked_head.CHUNK_BYTES", at_once * 7 * 4)
    monkeypatch.setattr("calib.losses.chunked_head.FEWEST_POSITIONS", 1)
    answers, token_bytes = torch.rand(3, 6, generator=g) < 0.5, torch.randint(9, (3, 6), generator=g)
    counted = mask & answers if answers_only else mask
    figures = compare(
        Corpus(ids, mask, "here", token_bytes, answers), 7, lambda row, some: q[row, some],
        lambda row, some: p[row, some], answers_only=answers_only,
    )  # fmt: skip
    nats = kl = agree = 0.0
    tokens = text_bytes = 0
    for row, length in enumerate(lengths):
        for t in range(1, length):
            if not counted[row, t]:
                continue
            tokens, text_bytes = tokens + 1, text_bytes + int(token_bytes[row, t])
            log_p, log_q = p[row, t - 1].log_softmax(0), q[row, t - 1].log_softmax(0)
            nats -= log_q[ids[row, t]].item()
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            agree += float(log_p.argmax() == log_q.argmax())
    assert figures.tokens == tokens > 0
    assert figures.perplexity == pytest.approx(math.exp(nats / tokens))
    assert figures.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes)
    assert figures.kl == pytest.approx(kl / tokens, rel=1e-4) and figures.top1_agreement == agree / tokens
