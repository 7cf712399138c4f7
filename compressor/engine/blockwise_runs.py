"""Running a whole model block by block on the rows of a corpus, from embedding to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.runtime.distributed import local_indices
from calib.runtime.progress import stage
from calib.stats.perplexity import Logits
from compressor.engine.input_statistics import advance
from compressor.engine.runtime_transforms import RuntimeTransforms

Reading = Callable[[Iterable[int]], Iterator[tuple[int, Params]]]


@torch.no_grad()
def run_blocks(
    stream: BlockwiseModel,
    corpus: Corpus,
    outer: Params,
    reading: Reading,
    online: Sequence[RuntimeTransforms],
    context: RunContext,
    label: str = "run",
) -> RowStates:
    """A model given by its blocks' parameters on this process's rows of `corpus` -> hidden states at the end."""
    states = embed_rows(stream, corpus, outer, context)
    with stage(label, stream.layers, "blocks") as done:
        for i, params in reading(range(stream.layers)):
            advance(stream, i, params, states, online[i])
            done("")
    return states


def logits_of(stream: BlockwiseModel, corpus: Corpus, outer: Params, final: RowStates) -> Logits:
    """Logits for `compare`, from hidden states after the last block of this process's rows of `corpus`."""
    return logits_at(stream, outer, final, local_indices(len(corpus.ids)))


def logits_at(stream: BlockwiseModel, outer: Params, states: RowStates | Tensor, own: list[int]) -> Logits:
    """Logits for `compare` from hidden states (rows, T, d) after the last block.

    Args:
        stream: the model.
        outer: what is no block's, by name.
        states: the hidden states.
        own: the numbers of these rows.
    """
    place = {row: i for i, row in enumerate(own)}
    end = stream.prepared(outer, stream.walk.leaving)

    @torch.no_grad()
    def logits(row: int, positions: slice) -> Tensor:
        return stream.logits(states[place[row] : place[row] + 1][0, positions].to(stream.device), end)

    return logits


def embed_rows(stream: BlockwiseModel, corpus: Corpus, outer: Params, context: RunContext) -> RowStates:
    """This process's rows of `corpus`, before the first block."""
    return embed(stream, corpus[local_indices(len(corpus.ids))], outer, context)


@torch.no_grad()
def embed(stream: BlockwiseModel, rows: Corpus, outer: Params, context: RunContext) -> RowStates:
    """All rows of a corpus before the first block."""
    start = stream.prepared(outer, stream.walk.outer if rows.beside else stream.walk.entering)
    store = context.store((*rows.ids.shape, *stream.walk.state_shape), stream.dtype, stream.room)
    states = RowStates(store, stream.batches(rows.inputs, start, beside=rows.beside), rows.source_mask)
    for some, batch in states.batches:
        states[some] = stream.start(batch, start)
    return states
