from __future__ import annotations

import math
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.data.corpus import Corpus
from calib.losses.divergences import dense, forward_kl
from calib.stats.classification import classification_metrics
from calib.stats.perplexity import compare
from calib.stats.tell_apart import ODDS, tell_apart_rate, tokens_to_tell

seeds = st.integers(0, 2**32 - 1)


def pair(seed: int, contexts: int, vocab: int, apart: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    p, more = (torch.randn(contexts, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return 3 * p, 3 * p + apart * more


@given(seeds, st.integers(2, 6), st.floats(0, 10))
def test_no_rule_names_the_writer_more_often(seed: int, vocab: int, apart: float) -> None:
    """Over all 2^V rules "p wrote these tokens, q the others"."""
    p, q = (z.softmax(-1)[0] for z in pair(seed, 1, vocab, apart))
    rules = torch.tensor(list(product([False, True], repeat=vocab)))
    best = torch.where(rules, p, q).sum(-1).max() / 2
    torch.testing.assert_close(tell_apart_rate(*pair(seed, 1, vocab, apart))[0], best, rtol=0, atol=1e-12)


@given(seeds, st.integers(2, 50), st.floats(0, 10), st.integers(1, 20))
def test_the_rate_lies_between_guessing_and_pinskers_bound(seed: int, vocab: int, apart: float, contexts: int) -> None:
    p, q = pair(seed, contexts, vocab, apart)
    rate, kl = tell_apart_rate(p, q).mean().item(), dense(forward_kl, p, q).mean().item()
    assert 0.5 <= rate <= min(1.0, 0.5 + math.sqrt(max(kl, 0) / 2) / 2) + 1e-9
    shift = torch.linspace(-3, 5, contexts, dtype=torch.float64)[:, None]
    assert torch.equal(tell_apart_rate(p, p), torch.full((contexts,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(tell_apart_rate(p, q), tell_apart_rate(q, p + shift))


def test_distributions_that_share_nothing_are_told_apart_for_certain() -> None:
    p, q = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert tell_apart_rate(p, q).tolist() == [1.0]
    assert tell_apart_rate(p.bfloat16(), q.bfloat16()).tolist() == [1.0]


def test_an_observer_is_sure_after_as_many_tokens_as_are_foretold() -> None:
    """Wald's identity: the mean number of tokens until the log-odds reach log 20 is that over KL, and at most one
    log-ratio over KL more."""
    p, q = (z.log_softmax(-1)[0] for z in pair(3, 1, 5, 0.2))
    kl, ratio = float((p.exp() * (p - q)).sum()), p - q
    tokens = torch.multinomial(p.exp(), 4_000 * 2_000, True, generator=torch.Generator().manual_seed(0))
    odds = ratio[tokens].reshape(4_000, 2_000).cumsum(1)
    reached = odds >= math.log(ODDS)
    assert reached.any(1).all()
    until = reached.double().argmax(1).double() + 1
    error, foretold = float(until.std() / math.sqrt(len(until))), tokens_to_tell(kl)
    assert foretold is not None
    assert foretold - 1 - 3 * error <= until.mean() <= foretold + float(ratio.max()) / kl + 3 * error
    assert tokens_to_tell(0.0) is tokens_to_tell(-1e-9) is tokens_to_tell(math.nan) is None
    assert tokens_to_tell(100.0) == 1


def test_figures_have_the_mean_over_real_tokens() -> None:
    """Of a text with padding, with its standard error by rows; and of a classifier over its rows."""
    g = torch.Generator().manual_seed(0)
    ids, p, q = torch.randint(7, (3, 6), generator=g), *(torch.randn(3, 6, 7, generator=g) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    corpus = Corpus(ids, mask, "here")
    found = compare(corpus, 7, lambda row, some: q[row, some], lambda row, some: p[row, some])
    rates = 0.5 + (p.softmax(-1) - q.softmax(-1)).abs().sum(-1).double() / 4
    assert found.tell_apart is not None and found.kl is not None and found.tell_apart_error is not None
    assert abs(found.tell_apart - float(rates[:, :-1][mask[:, 1:]].mean())) < 1e-6
    assert found.tokens_to_tell == tokens_to_tell(found.kl) and 0 < found.tell_apart_error < 0.1
    same = compare(corpus, 7, lambda row, some: p[row, some], lambda row, some: p[row, some])
    assert (same.tell_apart, same.tell_apart_error) == (0.5, 0.0)
    alone = compare(corpus, 7, lambda row, some: p[row, some])
    assert alone.tell_apart is None and alone.tokens_to_tell is None
    labels = torch.tensor([0, 1, 2])
    assert abs(classification_metrics(q[:, 0], labels, p[:, 0]).tell_apart - float(rates[:, 0].mean())) < 1e-6
