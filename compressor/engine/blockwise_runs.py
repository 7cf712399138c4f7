"""Running a whole model block by block on the rows of a corpus, from embedding to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.model.activation_store import ActivationStore
from calib.model.blockwise import BlockwiseModel, Params, micro_batches
from calib.runtime.distributed import local_indices
from calib.runtime.progress import stage
from calib.stats.perplexity import Logits
from compressor.engine.input_statistics import advance
from compressor.engine.runtime_transforms import RuntimeTransforms

Reading = Callable[[Iterable[int]], Iterator[tuple[int, Params]]]


@dataclass(frozen=True)
class EmbeddingAndHead:
    """The parts of a model that are no block's, rounded to the dtype they are stored in.  head is None where tied."""

    embedding: Tensor  # (V, d)
    final_gain: Tensor  # (d,), the factor
    head: Tensor | None  # (V, d)


def read_embedding_and_head(stream: BlockwiseModel) -> EmbeddingAndHead:
    """Read the embedding, the final norm's gain, and the head where it is not tied."""
    head = None if stream.config.tie_word_embeddings else stream.read_head()
    return EmbeddingAndHead(stream.read_embedding(), stream.read_final_gain(), head)


@torch.no_grad()
def run_blocks(
    stream: BlockwiseModel,
    corpus: Corpus,
    ends: EmbeddingAndHead,
    reading: Reading,
    online: Sequence[RuntimeTransforms],
    context: RunContext,
    label: str = "run",
) -> ActivationStore:
    """A model given by its blocks' parameters on this process's rows of `corpus` -> hidden states at the end."""
    states = embed_rows(stream, corpus, ends.embedding.to(stream.dtype), context)
    with stage(label, stream.sizes.layers, "blocks") as done:
        for i, params in reading(range(stream.sizes.layers)):
            advance(stream, i, params, states, online[i])
            done("")
    return states


def logits_of(stream: BlockwiseModel, corpus: Corpus, ends: EmbeddingAndHead, final: ActivationStore) -> Logits:
    """Logits for `compare`, from hidden states after the last block of this process's rows of `corpus`."""
    return logits_at(stream, output_head(ends), ends.final_gain, final, local_indices(len(corpus.ids)))


def output_head(ends: EmbeddingAndHead) -> Tensor:
    """The head's weight (V, d), which is the embedding's where the two are tied."""
    return ends.embedding if ends.head is None else ends.head


def logits_at(
    stream: BlockwiseModel, head: Tensor, final_gain: Tensor, states: ActivationStore | Tensor, own: list[int]
) -> Logits:
    """Logits for `compare` from hidden states (rows, T, d) after the last block; `own` are the numbers of these
    rows."""
    place = {row: i for i, row in enumerate(own)}
    head = head.to(stream.dtype)

    def logits(row: int, positions: slice) -> Tensor:
        hidden = states[place[row] : place[row] + 1][0, positions].to(stream.device)
        return stream.logits(stream.final_norm(hidden, final_gain), head)

    return logits


def embed_rows(stream: BlockwiseModel, corpus: Corpus, embedding: Tensor, context: RunContext) -> ActivationStore:
    """This process's rows of `corpus`, before the first block."""
    ids = corpus.ids[local_indices(len(corpus.ids))]
    states = context.store((*ids.shape, embedding.shape[1]), stream.dtype, stream.room)
    for rows in micro_batches(*ids.shape):
        states[rows] = stream.embed(embedding, ids[rows])
    return states
