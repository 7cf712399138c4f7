"""Rows of text as models read them that are no causal language models.

A masked language model is asked for tokens that are hidden from it, 15 in a hundred as BERT is trained
(arXiv:1810.04805), all of them behind the mask token. An encoder-decoder reads a prompt and is asked for its answer; of
text without prompts it reads one piece and is asked for the next. An embedding model reads one text a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from calib import BadInput
from calib.data.corpus import Corpus
from calib.data.image_rows import encoder_in, has_images, load_image_rows
from calib.data.prompts import Document
from calib.data.token_rows import Rows, encoded_by, from_tokens, packed_rows, surrounding
from calib.model.task import Task

LENGTH = 512
SHORT = 128  # of texts as they are embedded
HIDDEN = 0.15  # share of tokens that a masked language model is asked for


@dataclass(frozen=True)
class TaskRows:
    """How a model of a task is to be given text.

    Args:
        task: what it is for.
        special: ids that the tokenizer puts around texts, and none of them is hidden.
        mask_token: what stands in the place of a hidden token.
        decoder_start: what a decoder's rows begin with.
        trail: ids that end every row of a model that sees it whole.
        folder: of the model, whose processor rows with images need.
        image_token: what stands for a piece of an image; None: the model sees none.
        pieces: an encoder-decoder is also given text without prompts, a piece of it and the next.
    """

    task: Task = Task.CAUSAL_LM
    special: tuple[int, ...] = ()
    mask_token: int = 0
    decoder_start: int = 0
    trail: tuple[int, ...] = ()
    folder: Path = Path()
    image_token: int | None = None
    pieces: bool = True

    @staticmethod
    def of(
        task: Task, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, folder: Path = Path()
    ) -> TaskRows:
        """Raises BadInput where config and tokenizer do not say what the task needs."""
        found = TaskRows(task, folder=folder)
        if task is Task.IMAGE_TEXT_TO_TEXT:
            token = getattr(config, "image_token_id", None)
            return replace(found, image_token=getattr(config, "image_token_index", None) if token is None else token)
        if tokenizer is not None and task.sees_later_tokens:
            found = replace(found, special=tuple(tokenizer.all_special_ids), trail=tuple(surrounding(tokenizer)[1]))
        if task is Task.MASKED_LM:
            token = None if tokenizer is None else tokenizer.mask_token_id
            if token is None:
                raise BadInput(
                    "tokenizer: names no mask_token, which hides what a masked language model is asked for; name it in "
                    "tokenizer_config.json"
                )
            found = replace(found, mask_token=token)
        if task is Task.SEQ_TO_SEQ_LM:
            token = getattr(config, "decoder_start_token_id", None)
            if not isinstance(token, int):
                raise BadInput("config.json: has no decoder_start_token_id, which a decoder's rows begin with; add it")
            found = replace(found, decoder_start=token)
        return found

    @property
    def by_document(self) -> bool:
        """Whether each text is a row of its own, whatever is asked for."""
        return self.task.embeds

    @property
    def length(self) -> int:
        """Tokens of a row, where nobody says otherwise and the model has as many positions."""
        return SHORT if self.task.embeds else LENGTH

    @property
    def rows(self) -> Rows:
        """The function that makes rows of documents."""
        return self._pairs if self.task is Task.SEQ_TO_SEQ_LM else packed_rows

    def of_tokens(self, path: Path, length: int) -> Corpus:
        """The rows of a file of token ids.  Raises BadInput."""
        corpus = from_tokens(path, length=length)
        if self.task is not Task.SEQ_TO_SEQ_LM:
            return corpus
        if corpus.labels is None:
            raise BadInput(f"{path}: needs 'labels' (rows, tokens) beside 'input_ids', for the decoder")
        return self._decoded(corpus, corpus.labels)

    def of_images(self, path: Path, length: int, rows: int | None, seed: int | None) -> Corpus | None:
        """The rows of a file that has some with images; None where it has none, or the model sees none.  Raises
        BadInput."""
        if self.image_token is None or not has_images(path):
            return None
        return load_image_rows(path, encoder_in(self.folder), self.image_token, length=length, rows=rows, seed=seed)

    def made(self, corpus: Corpus) -> Corpus:
        """Rows as the model is given them."""
        if not self.task.sees_later_tokens or self.task is Task.SEQ_TO_SEQ_LM:
            return corpus
        corpus = replace(_closed(corpus, self.trail), padding_seen=True)
        if self.task is not Task.MASKED_LM:
            return corpus
        return replace(corpus, hidden=_hidden(corpus, self.special), mask_token=self.mask_token, answers=None)

    def _decoded(self, corpus: Corpus, labels: Tensor) -> Corpus:
        """With rows for the decoder: `labels`, -100 where there is none, each after the one before."""
        start = torch.full((len(labels), 1), self.decoder_start)
        real = labels >= 0
        ids = torch.cat([start, labels.where(real, 0)], 1)
        mask = torch.cat([torch.ones_like(start, dtype=torch.bool), real], 1)
        width = max(ids.shape[1], corpus.ids.shape[1])  # one for both, as hidden states have one shape

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

        return replace(
            corpus, ids=wide(ids), mask=wide(mask), sources=wide(corpus.ids), source_mask=wide(corpus.mask),
            labels=None, token_bytes=None, answers=None, spans=None,
        )  # fmt: skip

    def _pairs(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, source: str,
        by_document: bool, apart: bool, rows: int | None,
    ) -> tuple[Corpus, int]:  # fmt: skip
        """Rows of an encoder and a decoder, of at most `length` tokens each; and how many tokens there were."""
        made, tokens, cut = list[tuple[list[int], list[int]]](), 0, [0, 0]
        for asked, reply in _asked_and_answered(documents, tokenizer, source, length, pieces=self.pieces):
            tokens += len(asked) + len(reply)
            over = max(0, len(asked) - length), max(0, len(reply) - length + 1)
            cut = [cut[0] + any(over), cut[1] + sum(over)]
            made.append((asked[: length - 1] + asked[-1:] if over[0] else asked, reply[: length - 1]))
            if rows is not None and len(made) >= rows:
                break
        about: dict[str, Any] = {"starts_with": tokenizer.decode([self.decoder_start])}
        if cut[0]:
            about |= {"cut_rows": cut[0], "cut_tokens": cut[1]}
        sources, labels = (torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[part]) for row in made] or [torch.zeros(0, dtype=torch.int64)],
            batch_first=True, padding_value=-100) for part in (0, 1))  # fmt: skip
        real = sources >= 0
        corpus = Corpus(sources.where(real, 0)[: len(made)], real[: len(made)], source, about=about)
        return self._decoded(corpus, labels[: len(made)]), tokens


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden from a masked language model that learns, as BERT's were (arXiv:1810.04805): of those that
    are hidden 80 in a hundred are read as the mask token, 10 as any token, 10 as they are.

    Args:
        special: ids that are never hidden.
        mask_token: what stands in the place of most hidden tokens.
        vocab: how many ids there are to draw others from.
        share: of the tokens of a row that may be hidden, those that are; at least one.
    """

    special: tuple[int, ...]
    mask_token: int
    vocab: int
    share: float = HIDDEN

    def drawn(self, corpus: Corpus, rows: Sequence[int], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Hide tokens of some rows: the same ones of a row for one seed, in whatever company it is.

        Returns:
            True (b, T - 1) where the token at the next position is hidden, and what a model is given, by name; the
            first token of a row is never hidden.
        """
        ids, hidden = corpus.ids[rows].clone(), torch.zeros(len(rows), corpus.ids.shape[1], dtype=torch.bool)
        may = corpus.mask[rows] & ~torch.isin(ids, torch.tensor(self.special, dtype=torch.int64))
        may[:, 0] = False
        for place, row in enumerate(rows):
            generator = torch.Generator().manual_seed(seed + 104_729 * row)
            (places,) = torch.where(may[place])
            count = max(1, round(self.share * len(places))) if len(places) else 0
            chosen = places[torch.randperm(len(places), generator=generator)[:count]]
            kind = torch.rand(count, generator=generator)
            others = torch.randint(self.vocab, (count,), generator=generator)
            read = torch.where(kind < 0.8, self.mask_token, torch.where(kind < 0.9, others, ids[place, chosen]))
            ids[place, chosen], hidden[place, chosen] = read, True
        return hidden[:, 1:], {"input_ids": ids, "attention_mask": corpus.mask[rows]}


def _asked_and_answered(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, source: str, length: int, *, pieces: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """What the encoder reads and what the decoder is asked for: of each prompt with an answer, or of each piece of text
    and the next."""

    def coded(text: str, **options: Any) -> list[int]:
        return list(encoded_by(tokenizer, [text], source=source, **options)["input_ids"][0])

    lead, trail = surrounding(tokenizer)
    for number, document in enumerate(documents, 1):
        if document.answers is not None:
            if len(document.answers) != 1:
                raise BadInput(
                    f"{source}: the {number}. row that was read has {len(document.answers)} answers; an "
                    "encoder-decoder is given one prompt and one answer a row, neither of them empty"
                )
            start, end = document.answers[0]
            reply = encoded_by(tokenizer, source=source, text_target=[document.text[start:end].strip()])
            yield coded(document.text[:start].strip()), list(reply["input_ids"][0])
            continue
        if not pieces:
            raise BadInput(
                f"{source}: the {number}. row that was read is text alone; an encoder-decoder learns from prompts and "
                'their answers, such as {"prompt": ..., "response": ...}'
            )
        body, room = coded(document.text, add_special_tokens=False), length - max(1, len(lead) + len(trail))
        room = min(room, len(body) // 2)  # a shorter text is cut in half
        for first in range(0, len(body) - 2 * room + 1, 2 * room) if room else ():
            second = first + room
            yield [*lead, *body[first:second], *trail], [*body[second : second + room]]


def _closed(corpus: Corpus, trail: Sequence[int]) -> Corpus:
    """Rows that end as the tokenizer ends a text: where one was cut, its last tokens make room."""
    if not trail:
        return corpus
    ids, end = corpus.ids.clone(), torch.tensor(trail)
    for row, used in zip(ids, corpus.mask.sum(1).tolist(), strict=True):
        row[used - len(trail) : used] = end
    return replace(corpus, ids=ids)


def _hidden(corpus: Corpus, special: Sequence[int]) -> Tensor:
    """Which tokens are hidden: the same ones of the same row, wherever it is read."""
    may = corpus.mask & ~torch.isin(corpus.ids, torch.tensor(special, dtype=torch.int64))
    hidden = torch.zeros_like(may)
    for row, there in enumerate(may):
        (places,) = torch.where(there)
        generator = torch.Generator().manual_seed(int(corpus.ids[row].sum()))
        count = max(1, round(HIDDEN * len(places))) if len(places) else 0
        hidden[row, places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return hidden
