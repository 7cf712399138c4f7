"""How near a model's embeddings of texts are to another model's, and whether they find the same texts alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from calib.data.corpus import Corpus
from calib.model.pooling import pooled
from calib.runtime.distributed import all_reduce_max_, all_reduce_sum_, local_indices
from calib.runtime.progress import stage

States = Callable[[int, slice], Tensor]  # row of the corpus, positions in it -> last hidden states (positions, d)


@dataclass(frozen=True)
class Similarity:
    """Over `rows` texts: the mean cosine of a model's embedding with the reference's, its standard error and the least
    one; Spearman's rank correlation of the cosines of all pairs of texts, as the two models have them (None of fewer
    than three texts)."""

    rows: int
    tokens: int
    cosine: float
    cosine_error: float | None
    least_cosine: float
    rank_correlation: float | None
    pooling: str

    def asdict(self) -> dict[str, float | int | str | None]:
        """The figures by name."""
        return asdict(self)


@torch.no_grad()
def similarity(corpus: Corpus, pooling: str, model: States, reference: States) -> Similarity:
    """Compare two models' embeddings of a corpus' rows, each process those that are its own.

    Args:
        corpus: the texts.
        pooling: what makes one vector of a text's states; see `calib.model.pooling`.
        model: gives the states of one.
        reference: gives the other's.
    """
    found = [embeddings(corpus, pooling, states) for states in (model, reference)]
    a, b = (torch.nn.functional.normalize(one, dim=-1) for one in found)
    cosines = (a * b).sum(-1)
    rows = len(cosines)
    return Similarity(
        rows, corpus.tokens, float(cosines.mean()), float(cosines.std() / math.sqrt(rows)) if rows > 1 else None,
        float(cosines.min()), rank_correlation(a, b), pooling,
    )  # fmt: skip


def embeddings(corpus: Corpus, pooling: str, states: States) -> Tensor:
    """Embed all rows of a corpus -> (N, d) in float64."""
    own, made = local_indices(len(corpus.ids)), dict[int, Tensor]()
    with stage("embed", len(own), "rows") as done:
        for row in own:
            made[row] = pooled(states(row, slice(0, int(corpus.mask[row].sum()))).double().cpu(), pooling)
            done("")
    width = len(made[own[0]]) if own else 0
    widest = torch.tensor([float(width)])
    all_reduce_max_(widest)
    whole = torch.zeros(len(corpus.ids), int(widest), dtype=torch.float64)
    for row, vector in made.items():
        whole[row] = vector
    all_reduce_sum_([whole])
    return whole


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of the products of all pairs of rows of a (N, d) and the same of b (N, d)."""
    if len(a) < 3:
        return None
    upper = torch.triu_indices(len(a), len(a), 1)
    first, second = (partial(_ranks)((x @ x.T)[upper[0], upper[1]]) for x in (a, b))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, of equal values their mean."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]
