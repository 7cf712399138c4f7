"""Text, rows of any layout or token files -> rows of token ids (N, T), a mask, and a fingerprint.

Packed (the default): documents one after the other, each led by what the tokenizer puts first, cut into rows of T with
no padding. By document: one row each, cut at T and padded on the right. Where the tokenizer puts something first, such
as a BOS token, every row begins with it, exactly once, also in the middle of a document: models that were trained with
it predict badly without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib import BadInput, embedded, first_line
from calib.data.prompts import Document, PromptFormat, prompt_format
from calib.data.records import Row, is_prose, kind_of, read_rows, take_drawn, take_first

BYTES_PER_TOKEN = 16  # of a file, that are read where some rows of it are drawn: more than most texts have
LEAST_READ = 2**22  # bytes: a file below this is looked at whole
DOCUMENTS_TOGETHER = 2**18  # characters that are tokenized together
MAX_TEXT = 2**20  # characters that are tokenized as one text; longer ones are cut at line ends


@dataclass(frozen=True)
class Corpus:
    """ids (N, T) int64; mask (N, T), true where a token is real; token_bytes (N, T) int32, how many bytes of the text
    each token stands for, None where that is not known.

    answers (N, T) is true where a token is no part of a prompt; None where there are no prompts. spans (N, T) int64
    numbers the span that a token is of, -1 where it is of none; None where no spans are given. `about` says for reports
    how rows were made: the prompt format, what every row begins with, what was cut off.
    """

    ids: Tensor
    mask: Tensor
    source: str
    token_bytes: Tensor | None = None
    answers: Tensor | None = None
    spans: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Count the tokens that are not padding."""
        return int(self.mask.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, mask, answers and spans, in hexadecimal."""
        digest = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        digest.update(self.ids.numpy().tobytes())
        digest.update(self.mask.numpy().tobytes())
        for more in (self.answers, self.spans):
            if more is not None:
                digest.update(more.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, rows: slice | Tensor) -> Corpus:
        some = (x if x is None else x[rows] for x in (self.token_bytes, self.answers, self.spans))
        token_bytes, answers, spans = some
        return replace(
            self, ids=self.ids[rows], mask=self.mask[rows], token_bytes=token_bytes, answers=answers, spans=spans
        )


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
        after = [_special(trail)] if trail and not document.complete else []
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
) -> Corpus:
    """Tokenize and cut into rows of `length`; no further than to `rows` rows, where that is given.

    `apart`: no row goes from one document on into the next. Raises BadInput where there is not one row.
    """
    corpus, tokens = _rows_of(
        documents, tokenizer, length=length, source=source, by_document=by_document, apart=apart, rows=rows
    )
    if not len(corpus.ids):
        raise BadInput(f"{source}: too short, {tokens} tokens do not fill a row of {length}; give more text")
    return corpus


def _rows_of(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, source: str,
    by_document: bool, apart: bool, rows: int | None,
) -> tuple[Corpus, int]:  # fmt: skip
    """Perhaps without a row; and how many tokens there were."""
    lead, _ = surrounding(tokenizer)
    if len(lead) >= length:
        raise BadInput(f"length is {length}; the tokenizer puts {len(lead)} tokens before every text; take longer rows")
    made, waiting, tokens, cut = list[_Encoded](), list[_Encoded](), 0, [0, 0]
    for one in encode_documents(documents, tokenizer, source):
        tokens += len(one)
        if by_document:
            if len(one) > 1:  # a single token would predict nothing
                cut = [cut[0] + 1, cut[1] + len(one) - length] if len(one) > length else cut
                made.append(one[:length])
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
    """A safetensors file with `input_ids` (N, T) and, optionally, `attention_mask` padded on the right and `spans`."""
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
    return Corpus(
        ids[:, :length].long(), mask[:, :length], str(path), spans=None if spans is None else spans[:, :length]
    )


def load_corpus(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab: int,
    length: int,
    by_document: bool = False,
    prompts: str = "auto",
    rows: int | None = None,
    seed: int | None = None,
) -> Corpus:
    """The rows that a file, a folder of `datasets` or a data set on the hub gives.

    `rows`: about as many are read as that takes, or all that there are: from the beginning, or, with a `seed`, drawn
    over the whole file in one pass. A few more may come; which of them to take is the caller's choice. `prompts` is the
    prompt format (calib.data.prompts). Raises BadInput, naming the place, for what is not understood.
    """
    if kind_of(path) == ".safetensors":
        if by_document:
            raise BadInput(f"{path}: token ids come in rows already; leave out --by-document")
        return check_ids(from_tokens(path, length=length), vocab)
    if tokenizer is None:
        raise BadInput(
            f"{path}: text, but the model folder has no tokenizer; add one, or give token ids (.safetensors)"
        )
    form, tries = prompt_format(prompts, tokenizer), 0
    seed = None if rows is None else seed
    while True:
        documents, everything, apart = _documents(path, form, length, by_document, rows, seed, 2**tries)
        corpus, tokens = _rows_of(
            documents, tokenizer, length=length, source=str(path), by_document=by_document, apart=apart,
            rows=None if seed is not None and is_prose(path) else rows,
        )  # fmt: skip
        if everything or (rows is not None and len(corpus.ids) >= rows):
            break
        tries += 1
    if not len(corpus.ids):
        raise BadInput(f"{path}: too short, {tokens} tokens do not fill a row of {length}; give more text")
    if any(d.answers is not None for d in documents):
        corpus = replace(corpus, about={**corpus.about, "prompt_format": form.name})
    if alone := sum(d.prompt_only for d in documents):
        if alone < len(documents):
            raise BadInput(f"{path}: has prompts with answers and prompts alone; give them in two files")
        corpus = replace(corpus, about={**corpus.about, "prompts_only": True})
    return check_ids(corpus, vocab)


def _documents(
    path: Path, form: PromptFormat, length: int, by_document: bool, rows: int | None, seed: int | None, times: int
) -> tuple[list[Document], bool, bool]:
    """Documents to make rows of; whether the file has no more; and whether they lie apart in a running text."""

    def enough(count: int, size: int) -> bool:
        if rows is None:
            return False
        if by_document:
            return count >= times * (2 * rows + 64)
        return size >= times * max(LEAST_READ if seed is not None else 0, rows * length * BYTES_PER_TOKEN)

    prose = is_prose(path)
    found = read_rows(path, piece=BYTES_PER_TOKEN * length)
    some, everything = take_first(found, enough) if seed is None else take_drawn(found, enough, seed)
    if rows is not None and not by_document and not (prose and everything):
        some, all_of_it = take_first(some, lambda _, size: size >= times * rows * length * BYTES_PER_TOKEN)
        everything = everything and all_of_it
    if not prose:
        documents = [form.document(row, f"{path}, {row.place}") for row in some]
        if not any(d.text.strip() for d in documents):
            raise BadInput(f"{path}: is empty; give some text")
        return documents, everything, False
    runs = list[list[Row]]()
    for row in sorted(some, key=lambda row: row.number):  # pieces that are neighbors are one text again
        if runs and row.number == runs[-1][-1].number + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    texts = ["".join(row.fields["text"] for row in run) for run in runs]
    if not any(text.strip() for text in texts):
        raise BadInput(f"{path}: is empty; give some text")
    return [Document(text) for text in texts], everything, not everything and seed is not None


def embedded_corpus(
    part: Literal["train", "held-out"],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab: int,
    length: int,
    by_document: bool = False,
) -> Corpus:
    """The text that every Python carries, for the model in `folder`."""
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer for the embedded text; give token ids with --data")
    source, documents = f"embedded text ({part})", [Document(t) for t in embedded.python_topics(part)]
    return check_ids(from_documents(documents, tokenizer, length=length, source=source, by_document=by_document), vocab)


def check_ids(corpus: Corpus, vocab: int) -> Corpus:
    """Raises BadInput where a token id has no embedding."""
    beyond = ((corpus.ids < 0) | (corpus.ids >= vocab)).nonzero()
    if len(beyond):
        row, column = beyond[0].tolist()
        raise BadInput(
            f"{corpus.source}: token id {int(corpus.ids[row, column])} (row {row}, position {column}) is beyond the "
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

    def wider(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, more)

    answers, token_bytes = (None if x is None else wider(x) for x in (corpus.answers, corpus.token_bytes))
    spans = None if corpus.spans is None else wider(corpus.spans + 1) - 1
    return replace(
        corpus, ids=wider(corpus.ids), mask=wider(corpus.mask), token_bytes=token_bytes, answers=answers, spans=spans
    )


def describe(corpus: Corpus) -> dict[str, Any]:
    """Summarize a corpus for a recipe: source, rows, tokens, fingerprint."""
    return {
        "source": Path(corpus.source).name,
        "rows": len(corpus.ids),
        "tokens": corpus.tokens,
        "sha256": corpus.fingerprint,
        **corpus.about,
    }
