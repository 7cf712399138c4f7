"""Rows of token ids (N, T) with a mask, and which of them to take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.records import Row


@dataclass(frozen=True)
class Corpus:
    """ids (N, T) int64; mask (N, T), true where a token is real; token_bytes (N, T) int32, how many bytes of the text
    each token stands for, None where that is not known.

    answers (N, T) is true where a token is no part of a prompt; None where there are no prompts. spans (N, T) int64
    numbers the span that a token is of, -1 where it is of none; None where no spans are given. `about` says for reports
    how rows were made: the prompt format, what every row begins with, what was cut off.

    hidden (N, T), of rows for a masked language model: true where it reads `mask_token` in the place of a token that it
    is asked for. sources (N, T) and source_mask, of rows for an encoder-decoder: what its encoder reads; ids are the
    decoder's then. `padding_seen`: blocks see a whole row at once, so they must be told what of it is padding.
    `labels`: what stands in a file for a decoder, until rows are made of it. pictured (N, T) is true where a token
    stands for a piece of an image, which is nothing to predict; `beside` has what a model is given of the images of
    each row. `records`: the rows of the file that rows of the corpus were made of, one for each; empty where several
    came together.
    """

    ids: Tensor
    mask: Tensor
    source: str
    token_bytes: Tensor | None = None
    answers: Tensor | None = None
    spans: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    hidden: Tensor | None = None
    mask_token: int = 0
    sources: Tensor | None = None
    source_mask: Tensor | None = None
    padding_seen: bool = False
    labels: Tensor | None = None
    pictured: Tensor | None = None
    beside: tuple[Mapping[str, Tensor], ...] = ()
    records: tuple[Row, ...] = ()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments (N, T) of a model's forward, by name."""
        if self.sources is not None and self.source_mask is not None:
            return {"input_ids": self.sources, "attention_mask": self.source_mask, "decoder_input_ids": self.ids}
        ids = self.ids if self.hidden is None else self.ids.masked_fill(self.hidden, self.mask_token)
        return {"input_ids": ids, "attention_mask": self.mask} if self.padding_seen else {"input_ids": ids}

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """The token (N, T) that a model is to tell at each position, and where it is asked to: the next one, or the one
        that is hidden there."""
        if self.hidden is not None:
            return self.ids, self.hidden
        counted = (self.mask if self.pictured is None else self.mask & ~self.pictured).roll(-1, 1)
        counted[:, -1] = False
        return self.ids.roll(-1, 1), counted

    @property
    def tokens(self) -> int:
        """Count the tokens that are not padding."""
        return int(self.mask.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, mask and all that is told of them, in hexadecimal."""
        digest = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        digest.update(self.ids.numpy().tobytes())
        digest.update(self.mask.numpy().tobytes())
        for more in (self.answers, self.spans, self.hidden, self.sources, self.source_mask):
            if more is not None:
                digest.update(more.numpy().tobytes())
        for beside in self.beside:
            for name, value in sorted(beside.items()):
                digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Corpus:
        numbers = torch.arange(len(self.ids))[rows].tolist() if self.beside or self.records else []
        beside, records = (tuple(each[i] for i in numbers) if each else () for each in (self.beside, self.records))
        return replace(self._each(lambda tensor: tensor[rows]), beside=beside, records=records)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Corpus:
        """With every tensor changed."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def check_ids(corpus: Corpus, vocab: int) -> Corpus:
    """Raises BadInput where a token id has no embedding."""
    for ids in (corpus.ids, corpus.sources):
        if ids is None or not len(beyond := ((ids < 0) | (ids >= vocab)).nonzero()):
            continue
        row, column = beyond[0].tolist()
        raise BadInput(
            f"{corpus.source}: token id {int(ids[row, column])} (row {row}, position {column}) is beyond the "
            f"model's vocabulary of {vocab}; use the model's own tokenizer"
        )
    return corpus


def sample_rows(corpus: Corpus, rows: int, seed: int) -> Corpus:
    """`rows` rows without replacement, in random order.  Raises BadInput where there are too few."""
    if rows > len(corpus.ids):
        raise BadInput(
            f"{corpus.source}: gives {len(corpus.ids)} rows of up to {corpus.ids.shape[1]} tokens, {rows} were asked "
            "for (calibration and held-out together); give more text or ask for fewer"
        )
    order = torch.randperm(len(corpus.ids), generator=torch.Generator().manual_seed(seed))
    return corpus[order[:rows]]


def batch_order(rows: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """Row numbers of each step's batch: one random order of all rows after another."""
    generator, ordered = torch.Generator().manual_seed(seed), list[int]()
    while len(ordered) < steps * batch:
        ordered.extend(torch.randperm(rows, generator=generator).tolist())
    return [ordered[step * batch : (step + 1) * batch] for step in range(steps)]


def first_rows(corpus: Corpus, rows: int) -> Corpus:
    """The first `rows` rows.  Raises BadInput where there are fewer."""
    if rows > len(corpus.ids):
        raise BadInput(f"{corpus.source}: gives {len(corpus.ids)} rows, {rows} were asked for; ask for fewer")
    return corpus[:rows]


def pad_to(corpus: Corpus, length: int) -> Corpus:
    """Pad the rows of a corpus to `length` tokens."""
    more = (0, length - corpus.ids.shape[1])
    wider = corpus._each(lambda tensor: torch.nn.functional.pad(tensor, more))
    if corpus.beside:
        old = corpus.ids.shape[1:]
        beside = tuple(
            {name: torch.nn.functional.pad(x, more) if x.shape[1:] == old else x for name, x in one.items()}
            for one in corpus.beside
        )
        wider = replace(wider, beside=beside)
    if corpus.spans is not None:
        wider = replace(wider, spans=torch.nn.functional.pad(corpus.spans, more, value=-1))
    return wider


def describe(corpus: Corpus) -> dict[str, Any]:
    """Summarize a corpus for a recipe: source, rows, tokens, fingerprint."""
    return {
        "source": Path(corpus.source).name,
        "rows": len(corpus.ids),
        "tokens": corpus.tokens,
        "sha256": corpus.fingerprint,
        **corpus.about,
    }
