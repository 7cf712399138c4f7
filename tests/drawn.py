"""Logits and tokens, drawn anew for each seed."""

from __future__ import annotations

import torch
from torch import Tensor


def pair(seed: int, rows: int = 4, vocab: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A teacher's and a student's logits, (rows, vocab) each."""
    g = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(rows, vocab, generator=g, dtype=dtype) for _ in range(2))
    return p, q


def targets(seed: int, rows: int = 4, vocab: int = 9) -> Tensor:
    return torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))


def shuffled(seed: int, vocab: int = 9) -> Tensor:
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
