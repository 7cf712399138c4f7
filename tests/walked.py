"""A model run block by block, as the tests want it."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel
from calib.blockwise.walk import RowBatch


def rows_like(stream: BlockwiseModel, hidden: Tensor) -> RowBatch:
    """A batch for hidden states (B, T, d) that come from nowhere."""
    return stream.batch(torch.zeros(hidden.shape[:2], dtype=torch.int64))


@torch.no_grad()
def hidden_at_the_end(stream: BlockwiseModel, ids: Tensor) -> Tensor:
    """Hidden states (B, T, d) after the last block."""
    batch = stream.batch(ids, stream.prepared(stream.read_outer(), stream.walk.entering))
    hidden = stream.start(batch, stream.read_start())
    for i in range(stream.layers):
        hidden = stream.run(i, stream.read_block(i), hidden, batch)
    return hidden


def logits_of(stream: BlockwiseModel, ids: Tensor) -> Tensor:
    """Logits (B, T, V), those of each row by themselves."""
    end = stream.read_end()
    with torch.no_grad():
        return torch.stack([stream.logits(row, end) for row in hidden_at_the_end(stream, ids)])
