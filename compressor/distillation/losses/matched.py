"""Losses against a teacher with another vocabulary: on the tokens that both have, and on those that only one has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.losses.top_k import TopK
from calib.runtime.precision import upcast


@dataclass(frozen=True)
class MatchedTokens(TopK):
    """A teacher's distribution on the tokens that a student has too, by the student's ids; and the probabilities
    (..., m) of its other tokens, highest first."""

    others: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> MatchedTokens:
        return MatchedTokens(self.index[rows], self.log_p[rows], self.log_tail[rows], self.others[rows])


def sorted_distance(matched: MatchedTokens, q_logits: Tensor) -> Tensor:
    """Sum of |p - q| over the tokens that only one vocabulary has, the most likely with the most likely: (..., V) ->
    (...).  ULD's distance (arXiv:2402.12030, Eq. 4), on what is not matched."""
    q = upcast(q_logits).softmax(-1)
    own = q.scatter(-1, matched.index, 0.0).sort(-1, descending=True).values
    own = own[..., : q.shape[-1] - matched.index.shape[-1]]
    width = max(own.shape[-1], matched.others.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (matched.others, own))
    return (p - q).abs().sum(-1)
