"""What each block's state tells of the token read and of the next one: a language model's information plane."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.runtime.progress import stage
from calib.stats.information import cauchy_schwarz_information, gaussian_gram, median_distance
from calib.stats.perplexity import scored_tokens
from compressor.engine.blockwise_runs import embed_rows
from compressor.engine.input_statistics import advance
from compressor.engine.load import QuantizedCheckpoint

POSITIONS = 400  # Gram matrices are of so many rows; arXiv:2404.17951 estimates with batches of such sizes


@torch.no_grad()
def information_plane(
    checkpoint: QuantizedCheckpoint, corpus: Corpus, budget: int, *, answers_only: bool = False
) -> dict[str, list[float]]:
    """Cauchy-Schwarz mutual information of each block's state with the token read and with the one to come, in nats.

    At the same 400 positions of the corpus for every model, or as many as there are. Tokens are compared by their
    states before the first block, all variables by Gaussian kernels as wide as the median distance of what differs
    (CS-QMI, arXiv:2404.17951, `calib.stats.information`). Independent variables are above 0 by a bias of order 1 / n.

    Args:
        checkpoint: a causal language model, quantized or not.
        corpus: rows of text.
        budget: bytes of hidden states that are held in RAM.
        answers_only: only where the next token is one of an answer.

    Returns:
        `read` and `next`, each by block.

    Raises:
        BadInput: fewer than two positions have a token after them.
    """
    stream, outer = checkpoint.stream, checkpoint.stream.read_outer()
    where = positions_compared(corpus, answers_only)
    with tempfile.TemporaryDirectory(prefix="parewell-") as scratch:
        context = RunContext(Journal(Path(scratch)), budget)
        states = embed_rows(stream, corpus, outer, context)
        read, following = (_gram(_states_at(states, where, ahead)) for ahead in (0, 1))
        found: dict[str, list[float]] = {"read": [], "next": []}
        with stage("information", stream.layers, "blocks") as done:
            for i, params in stream.reading(range(stream.layers)):
                advance(stream, i, params, states, checkpoint.online[i])
                gram = _gram(_states_at(states, where, 0))
                for name, other in (("read", read), ("next", following)):
                    found[name].append(cauchy_schwarz_information(gram, other))
                done("")
    return found


def positions_compared(corpus: Corpus, answers_only: bool) -> Tensor:
    """Find rows and positions (n, 2) whose next token is scored, at most 400, spread evenly over all of them.

    Raises:
        BadInput: there are fewer than two.
    """
    every = scored_tokens(corpus, answers_only)[:, 1:].nonzero()
    if len(every) < 2:
        raise BadInput(f"{corpus.source}: has {len(every)} positions with a token after them; give longer rows")
    return every[torch.linspace(0, len(every) - 1, min(POSITIONS, len(every))).round().long()]


def _states_at(states: RowStates, where: Tensor, ahead: int) -> Tensor:
    """States (n, d) at positions, or `ahead` of them."""
    return torch.stack([states[row : row + 1][0, at + ahead].flatten().cpu() for row, at in where.tolist()])


def _gram(x: Tensor) -> Tensor:
    return gaussian_gram(x, median_distance(x))
