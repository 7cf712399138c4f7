"""Text or token files -> rows of token ids (N, T) and a mask.

Packed (the default): documents one after the other, each led by what the tokenizer puts first, cut into rows of T with
no padding. By document: one row each, cut at T and padded on the right. Where the tokenizer puts something first, such
as a BOS token, every row begins with it, exactly once, also in the middle of a document: models that were trained with
it predict badly without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from calib import BadInput, first_line
from calib.data.corpus import Corpus
from calib.data.prompts import Document
from calib.data.records import Row

DOCUMENTS_TOGETHER = 2**18  # characters that are tokenized together
MAX_TEXT = 2**20  # characters that are tokenized as one text; longer ones are cut at line ends


def encoded_by(tokenizer: PreTrainedTokenizerBase, *texts: list[str], source: str, **options: Any) -> Any:
    """Run a tokenizer, whose failures (for want of an unknown token, say) become BadInput that names the source."""
    try:
        return tokenizer(*texts, verbose=False, **options)
    except Exception as error:  # its rules are the model's own, and it may raise anything
        raise BadInput(
            f"{source}: the model's tokenizer fails on it ({first_line(error)}); mend one of them"
        ) from error


def surrounding(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before every text, and those that it puts after."""
    coded = encoded_by(tokenizer, ["a"], source="tokenizer", return_special_tokens_mask=True)
    ids, special = list(coded["input_ids"][0]), list(coded["special_tokens_mask"][0])
    before = next((i for i, mark in enumerate(special) if not mark), len(ids))
    after = next((i for i, mark in enumerate(reversed(special)) if not mark), 0)
    return ids[:before], ids[len(ids) - after :] if after else []


class Rows(Protocol):
    """Makes rows of documents, perhaps none; and says how many tokens there were."""

    def __call__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, source: str,
        by_document: bool, apart: bool, rows: int | None,
    ) -> tuple[Corpus, int]:  # fmt: skip
        """See `packed_rows`."""


@dataclass(frozen=True)
class _Encoded:
    """One document's tokens: ids, whether each is of an answer, the span it is of or -1, bytes of text (all (t,))."""

    ids: np.ndarray[Any, Any]
    answers: np.ndarray[Any, Any]
    spans: np.ndarray[Any, Any]
    bytes: np.ndarray[Any, Any]

    def __getitem__(self, some: slice) -> _Encoded:
        return _Encoded(self.ids[some], self.answers[some], self.spans[some], self.bytes[some])

    def __len__(self) -> int:
        return len(self.ids)


def _joined(parts: Sequence[_Encoded]) -> _Encoded:
    return _Encoded(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "answers", "spans", "bytes"))
    )


def _special(ids: Sequence[int]) -> _Encoded:
    count = len(ids)
    return _Encoded(np.array(ids, np.int64), np.zeros(count, bool), np.full(count, -1), np.zeros(count, np.int32))


def encode_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, source: str
) -> Iterator[_Encoded]:
    """Each document's tokens, with what the tokenizer puts around a text exactly once."""
    lead, trail = surrounding(tokenizer)
    special, first_span = np.array(sorted(tokenizer.all_special_ids), np.int64), 0
    for document, pieces in _by_document(documents, tokenizer, source):
        body = _joined(pieces) if len(pieces) != 1 else pieces[0]
        body.bytes[np.isin(body.ids, special)] = 0  # they stand for no byte of the text
        body.spans[body.spans >= 0] += first_span
        first_span += len(document.spans)
        begun = not lead or body.ids[: len(lead)].tolist() == lead
        before = [] if begun else [_special(lead)]
        after = [_special(trail)] if trail and not (document.complete or document.prompt_only) else []
        if document.answers is None:
            for part in (*before, *after):
                part.answers[:] = True
        elif after and document.answers and document.answers[-1][1] == len(document.text):
            after[0].answers[:] = True  # the end of an answer is part of it
        yield _joined([*before, body, *after]) if before or after else body


def _by_document(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, source: str
) -> Iterator[tuple[Document, list[_Encoded]]]:
    waiting, size = list[tuple[Document, int, str]](), 0  # document, where its piece begins, the piece
    pieces = list[_Encoded]()

    def flush() -> Iterator[tuple[Document, list[_Encoded]]]:
        nonlocal pieces, size
        texts = [text for _, _, text in waiting]
        offsets = tokenizer.is_fast
        if not offsets and any(d.answers is not None or d.spans for d, _, _ in waiting):
            raise BadInput(f"{source}: this tokenizer does not tell which characters a token stands for, so answers "
                           "cannot be told from prompts; give the model's tokenizer.json")  # fmt: skip
        coded = encoded_by(tokenizer, texts, source=source, add_special_tokens=False, return_offsets_mapping=offsets)
        for i, (document, start, text) in enumerate(waiting):
            ids = np.array(coded["input_ids"][i], np.int64)
            places = np.array(coded["offset_mapping"][i] if offsets else [(0, 0)] * len(ids), np.int64).reshape(-1, 2)
            pieces.append(_Encoded(ids, *_marked(document, start, text, places)))
            if start + len(text) == len(document.text):
                yield document, pieces
                pieces = []
        waiting.clear()
        size = 0

    for document in documents:
        for start, text in _cut(document.text):
            waiting.append((document, start, text))
            size += len(text)
            if size >= DOCUMENTS_TOGETHER:
                yield from flush()
    if waiting:
        yield from flush()


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """(start, piece): the whole text, or, where it is very long, pieces of it that end where lines do."""
    start = 0
    while len(text) - start > MAX_TEXT:
        end = text.rfind("\n", start + 1, start + MAX_TEXT) + 1 or text.rfind(" ", start + 1, start + MAX_TEXT) + 1
        end = end or start + MAX_TEXT
        yield start, text[start:end]
        start = end
    yield start, text[start:]


def _marked(
    document: Document, start: int, text: str, places: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of each token of a piece of a document, by the characters (t, 2) it stands for in the piece: whether it is of an
    answer, the number of the first span that it reaches into, or -1, and how many bytes no token before it covers."""
    begins, ends = places[:, 0] + start, places[:, 1] + start
    answers = np.full(len(places), document.answers is None)
    for first, last in document.answers or ():
        answers |= (ends > first) & (begins < last) & (ends > begins)
    spans = np.full(len(places), -1)
    for number, (first, last) in reversed(list(enumerate(document.spans))):
        spans[(begins < last) & (ends > first) & (ends > begins)] = number
    reached = np.maximum.accumulate(np.concatenate([[0], places[:, 1]])).astype(np.int64)
    if text.isascii():
        covered = reached
    else:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        covered = np.concatenate([[0], widths.cumsum()])[reached]
    return answers, spans, np.diff(covered).astype(np.int32)


def from_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    source: str,
    by_document: bool = False,
    apart: bool = False,
    rows: int | None = None,
    make: Rows | None = None,
) -> Corpus:
    """Tokenize and cut into rows of `length`; no further than to `rows` rows, where that is given.

    `apart`: no row goes from one document on into the next. `make` makes other rows than `packed_rows`.
    Raises BadInput where there is not one row.
    """
    corpus, tokens = (make or packed_rows)(
        documents, tokenizer, length=length, source=source, by_document=by_document, apart=apart, rows=rows
    )
    if not len(corpus.ids):
        raise BadInput(f"{source}: too short, {tokens} tokens do not fill a row of {length}; give more text")
    return corpus


def packed_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, source: str,
    by_document: bool, apart: bool, rows: int | None,
) -> tuple[Corpus, int]:  # fmt: skip
    """Like `from_documents`, but perhaps without a row; and how many tokens there were."""
    lead, _ = surrounding(tokenizer)
    if len(lead) >= length:
        raise BadInput(f"length is {length}; the tokenizer puts {len(lead)} tokens before every text; take longer rows")
    made, waiting, tokens, cut = list[_Encoded](), list[_Encoded](), 0, [0, 0]
    records = list[Row | None]()
    for document, one in zip(documents, encode_documents(documents, tokenizer, source), strict=False):
        tokens += len(one)
        if by_document:
            if len(one) > 1:  # a single token would predict nothing
                cut = [cut[0] + 1, cut[1] + len(one) - length] if len(one) > length else cut
                made.append(one[:length])
                records.append(document.row)
        else:
            waiting.append(one)
            if apart or sum(map(len, waiting)) >= length:
                more, rest = _packed(_joined(waiting), length, lead)
                made += more
                waiting = [] if apart else [rest]
        if rows is not None and len(made) >= rows:
            break
    width = length if made and not by_document else max((len(row) for row in made), default=0)
    ids = torch.zeros(len(made), width, dtype=torch.int64)
    mask, answers = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    spans, token_bytes = torch.full_like(ids, -1), torch.zeros_like(ids, dtype=torch.int32)
    for row, one in enumerate(made):
        for whole, part in ((ids, one.ids), (answers, one.answers), (spans, one.spans), (token_bytes, one.bytes)):
            whole[row, : len(one)] = torch.from_numpy(part)
        mask[row, : len(one)] = True
    about: dict[str, Any] = {"starts_with": tokenizer.decode(lead) if lead else None}
    if cut[0]:
        about |= {"cut_rows": cut[0], "cut_tokens": cut[1]}
    corpus = Corpus(
        ids, mask, source, token_bytes if tokenizer.is_fast else None,
        answers if any(d.answers is not None for d in documents) else None,
        spans if any(d.spans for d in documents) else None, about,
        records=tuple(row for row in records if row is not None),
    )  # fmt: skip
    return corpus, tokens


def _packed(stream: _Encoded, length: int, lead: Sequence[int]) -> tuple[list[_Encoded], _Encoded]:
    """Whole rows, each beginning with `lead`, and what is left over."""
    made, position, first = list[_Encoded](), 0, _special(lead)
    while True:
        begun = not lead or stream.ids[position : position + len(lead)].tolist() == list(lead)
        taken = length if begun else length - len(lead)
        if position + taken > len(stream):
            return made, stream[position:]
        row = stream[position : position + taken]
        made.append(row if begun else _joined([first, row]))
        position += taken


def from_tokens(path: Path, *, length: int) -> Corpus:
    """A safetensors file with `input_ids` (N, T) and, optionally, `attention_mask` padded on the right, `spans`, and
    for a decoder `labels` (N, T')."""
    try:
        path.open("rb").close()  # the library calls a file that must not be read a missing one
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file ({error})") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32, torch.uint16) or not ids.numel():
        raise BadInput(f"{path}: needs integer 'input_ids' of shape (rows, tokens)")
    mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
    if mask.shape != ids.shape or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise BadInput(f"{path}: 'attention_mask' must have the shape of 'input_ids' and padding on the right only")
    if not mask[:, :length].sum(1).ge(2).all():
        raise BadInput(f"{path}: every row needs at least two real tokens, one to predict and one to predict it from")
    spans = tensors.get("spans")
    if spans is not None and (spans.shape != ids.shape or spans.dtype != torch.int64):
        raise BadInput(f"{path}: 'spans' must have the shape of 'input_ids', in int64: a span's number, or -1")
    labels = tensors.get("labels")
    if labels is not None and (labels.ndim != 2 or len(labels) != len(ids) or labels.dtype != torch.int64):
        raise BadInput(f"{path}: 'labels' must have as many rows as 'input_ids', in int64: token ids, or -100")
    if labels is not None and ((labels < 0) & (labels != -100)).any():
        raise BadInput(f"{path}: 'labels' has {int(labels[labels != -100].min())}; give token ids, or -100 for none")
    return Corpus(
        ids[:, :length].long(), mask[:, :length], str(path), spans=None if spans is None else spans[:, :length],
        labels=None if labels is None else labels[:, : length - 1],
    )  # fmt: skip
