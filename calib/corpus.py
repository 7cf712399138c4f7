"""Text, JSON lines or token files -> rows of token ids (N, T), a mask, and a fingerprint.

Packed (the default): documents one after the other, each led by what the tokenizer puts first, cut into rows of T with
no padding. By document: one row each, cut at T and padded on the right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib import BadInput, embedded, first_line

FIELDS = "text, prompt + response, question + answer, or messages"


@dataclass(frozen=True)
class Document:
    """A text, the character at which its answer begins (0: it is no answer to anything), and spans of characters."""

    text: str
    answer: int = 0
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """ids (N, T) int64; mask (N, T), true where a token is real; bytes per token that is not special, if known.

    answers (N, T) is true where a token is no part of a prompt; None where there are no prompts. spans (N, T) int64
    numbers the span that a token is of, -1 where it is of none; None where no spans are given.
    """

    ids: Tensor
    mask: Tensor
    source: str
    bytes_per_token: float | None
    answers: Tensor | None = None
    spans: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        digest.update(self.ids.numpy().tobytes())
        digest.update(self.mask.numpy().tobytes())
        for more in (self.answers, self.spans):
            if more is not None:
                digest.update(more.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, rows: slice | Tensor) -> Corpus:
        answers, spans = (x if x is None else x[rows] for x in (self.answers, self.spans))
        return replace(self, ids=self.ids[rows], mask=self.mask[rows], answers=answers, spans=spans)


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Document]:
    """A text file is one document; a JSON-lines file has one per line.  The tokenizer is for its chat template."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); give a text, .jsonl or .safetensors file"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    if path.suffix != ".jsonl":
        documents = [Document(text)]
    else:
        documents = [
            _record(line, f"{path}, line {number}", tokenizer)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    if not any(d.text.strip() for d in documents):
        raise BadInput(f"{path}: is empty; give some text")
    return documents


def _record(line: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error}); mend or remove the line") from error

    if any("\ud800" <= character <= "\udfff" for character in json.dumps(record, ensure_ascii=False)):
        raise BadInput(f"{where}: has half a surrogate pair, which is no text; mend or remove the line")

    def strings(*names: str) -> bool:
        return isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names)

    if strings("text"):
        return Document(record["text"], spans=_spans(record, record["text"], where))
    if strings("prompt", "response"):
        text = record["prompt"] + record["response"]
        return Document(text, len(record["prompt"]), _spans(record, text, where))
    if strings("question", "answer"):
        return question(record["question"], record["answer"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if tokenizer is None or tokenizer.chat_template is None:
            raise BadInput(f"{where}: has messages, but this model's tokenizer has no chat template; give text instead")
        try:
            return _conversation(record["messages"], tokenizer)
        except Exception as error:  # a template is the model's own program and may raise anything
            raise BadInput(f"{where}: the chat template refuses these messages ({error})") from error
    raise BadInput(f"{where}: has none of the fields {FIELDS} (as strings)")


def question(asked: str, answer: str) -> Document:
    """As all questions are put here."""
    prompt = f"Question: {asked}\nAnswer:"
    return Document(f"{prompt} {answer}", len(prompt))


def _spans(record: dict[str, Any], text: str, where: str) -> tuple[tuple[int, int], ...]:
    """`spans`, if there are any, as [start, end] in characters of the whole text."""
    spans, last = list[tuple[int, int]](), 0
    given = record.get("spans", [])
    for span in given if isinstance(given, list) else [given]:
        pair = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not pair or not last <= span[0] < span[1] <= len(text):
            raise BadInput(
                f"{where}: span {span} must be [start, end] in characters of the text, after the span before it"
            )
        spans.append((span[0], last := span[1]))
    return tuple(spans)


def _conversation(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> Document:
    """The answer is the last message, where an assistant says it."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not messages or messages[-1].get("role") != "assistant":
        return Document(text)
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    return Document(text, len(prompt) if text.startswith(prompt) else 0)


def encoded_by(tokenizer: PreTrainedTokenizerBase, *texts: list[str], source: str, **how: Any) -> Any:
    """What a tokenizer makes of texts.  Raises BadInput where it fails, for want of an unknown token say."""
    try:
        return tokenizer(*texts, verbose=False, **how)
    except Exception as error:  # its rules are the model's own, and it may raise anything
        raise BadInput(
            f"{source}: the model's tokenizer fails on it ({first_line(error)}); mend one of them"
        ) from error


def from_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    source: str,
    by_document: bool = False,
) -> Corpus:
    """Tokenize and cut into rows of `length`.  Raises BadInput where there is not one row."""
    coded = encoded_by(tokenizer, [d.text for d in documents], source=source, return_offsets_mapping=True)
    encoded = [list(ids) for ids in coded["input_ids"]]
    # A token belongs to the answer where it ends beyond the prompt; special tokens end at 0.
    answering = [
        [end > d.answer or d.answer == 0 for _, end in offsets]
        for d, offsets in zip(documents, coded["offset_mapping"], strict=True)
    ]
    spanned = _numbered([d.spans for d in documents], coded["offset_mapping"])
    tokens = sum(map(len, encoded))
    special = set(tokenizer.all_special_ids)  # they stand for no byte, and the first of a row is never predicted
    spoken = sum(i not in special for ids in encoded for i in ids)
    bytes_per_token = sum(len(d.text.encode()) for d in documents) / max(spoken, 1)
    if by_document:
        columns = zip(encoded, answering, spanned, strict=True)
        kept = [[some[:length] for some in column] for column in columns if len(column[0]) > 1]
        ids = torch.zeros(len(kept), max((len(some) for some, _, _ in kept), default=0), dtype=torch.int64)
        mask, answers = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        spans = torch.full_like(ids, -1)
        for row, (some, answer, span) in enumerate(kept):  # a single token would predict nothing
            ids[row, : len(some)] = torch.tensor(some)
            mask[row, : len(some)] = True
            answers[row, : len(some)] = torch.tensor(answer)
            spans[row, : len(some)] = torch.tensor(span)
    else:
        ids, answers, spans = (
            torch.tensor([value for some in parts for value in some], dtype=dtype)
            for parts, dtype in ((encoded, torch.int64), (answering, torch.bool), (spanned, torch.int64))
        )
        whole = len(ids) // length * length
        ids, answers, spans = (x[:whole].reshape(-1, length) for x in (ids, answers, spans))
        mask = torch.ones_like(ids, dtype=torch.bool)
    if not len(ids):
        raise BadInput(f"{source}: too short, {tokens} tokens do not fill a row of {length}; give more text")
    prompted = any(d.answer for d in documents)
    given = any(d.spans for d in documents)
    return Corpus(ids, mask, source, bytes_per_token, answers if prompted else None, spans if given else None)


def _numbered(
    spans: Sequence[Sequence[tuple[int, int]]], offsets: Sequence[Sequence[tuple[int, int]]]
) -> list[list[int]]:
    """Of each token of each document the number of the first span that it reaches into, counted over all; or -1."""
    numbered, count = list[list[int]](), 0
    for some, tokens in zip(spans, offsets, strict=True):
        numbered.append(
            [
                next((count + i for i, (a, b) in enumerate(some) if start < b and end > a and end > start), -1)
                for start, end in tokens
            ]
        )
        count += len(some)
    return numbered


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
        ids[:, :length].long(), mask[:, :length], str(path), None, spans=None if spans is None else spans[:, :length]
    )


def load_corpus(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab: int,
    length: int,
    by_document: bool = False,
) -> Corpus:
    """Every row that the file at `path` gives, in order."""
    if path.suffix == ".safetensors":
        if by_document:
            raise BadInput(f"{path}: token ids come in rows already; leave out --by-document")
        corpus = from_tokens(path, length=length)
    elif tokenizer is None:
        raise BadInput(
            f"{path}: text, but the model folder has no tokenizer; add one, or give token ids (.safetensors)"
        )
    else:
        documents = read_documents(path, tokenizer)
        corpus = from_documents(documents, tokenizer, length=length, source=str(path), by_document=by_document)
    return checked(corpus, vocab)


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
    return checked(from_documents(documents, tokenizer, length=length, source=source, by_document=by_document), vocab)


def checked(corpus: Corpus, vocab: int) -> Corpus:
    """Raises BadInput where a token id has no embedding."""
    beyond = ((corpus.ids < 0) | (corpus.ids >= vocab)).nonzero()
    if len(beyond):
        row, column = beyond[0].tolist()
        raise BadInput(
            f"{corpus.source}: token id {int(corpus.ids[row, column])} (row {row}, position {column}) is beyond the "
            f"model's vocabulary of {vocab}; use the model's own tokenizer"
        )
    return corpus


def sample(corpus: Corpus, rows: int, seed: int) -> Corpus:
    """`rows` rows without replacement, in random order.  Raises BadInput where there are too few."""
    if rows > len(corpus.ids):
        raise BadInput(
            f"{corpus.source}: gives {len(corpus.ids)} rows of up to {corpus.ids.shape[1]} tokens, {rows} were asked "
            "for (calibration and held-out together); give more text or ask for fewer"
        )
    order = torch.randperm(len(corpus.ids), generator=torch.Generator().manual_seed(seed))
    return corpus[order[:rows]]


def order(rows: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """Which rows each step takes: one random order of all after the other."""
    generator, ordered = torch.Generator().manual_seed(seed), list[int]()
    while len(ordered) < steps * batch:
        ordered.extend(torch.randperm(rows, generator=generator).tolist())
    return [ordered[step * batch : (step + 1) * batch] for step in range(steps)]


def first(corpus: Corpus, rows: int) -> Corpus:
    """The first `rows` rows.  Raises BadInput where there are fewer."""
    if rows > len(corpus.ids):
        raise BadInput(f"{corpus.source}: gives {len(corpus.ids)} rows, {rows} were asked for; ask for fewer")
    return corpus[:rows]


def padded(corpus: Corpus, length: int) -> Corpus:
    """The same rows with padding up to `length` tokens."""
    more = (0, length - corpus.ids.shape[1])

    def wider(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, more)

    answers = None if corpus.answers is None else wider(corpus.answers)
    spans = None if corpus.spans is None else wider(corpus.spans + 1) - 1
    return replace(corpus, ids=wider(corpus.ids), mask=wider(corpus.mask), answers=answers, spans=spans)


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a recipe records of a corpus."""
    return {
        "source": Path(corpus.source).name,
        "rows": len(corpus.ids),
        "tokens": corpus.tokens,
        "sha256": corpus.fingerprint,
    }
