"""Rows of any layout, running text or token files -> a corpus for a model of any task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from calib import BadInput, embedded
from calib.data.corpus import Corpus, check_ids
from calib.data.prompts import Document, PromptFormat, prompt_format
from calib.data.records import Row, is_prose, kind_of, read_rows, take_drawn, take_first
from calib.data.task_rows import TaskRows
from calib.data.token_rows import from_documents

BYTES_PER_TOKEN = 16  # of a file, that are read where some rows of it are drawn: more than most texts have
WORDS = 8  # of a paragraph that is embedded as a text of its own
LEAST_READ = 2**22  # bytes: a file below this is looked at whole
CAUSAL = TaskRows()  # rows for causal language models


@dataclass(frozen=True)
class Sample:
    """How many rows are drawn at random, and by which seed."""

    rows: int
    seed: int


def load_corpus(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab: int,
    length: int,
    by_document: bool = False,
    prompts: str = "auto",
    rows: int | Sample | None = None,
    task: TaskRows = CAUSAL,
) -> Corpus:
    """The rows that a file, a folder of `datasets` or a data set on the hub gives, as a model of `task` reads them.

    `rows`: about as many are read as that takes, or all that there are: from the beginning, or, for a `Sample`, drawn
    over the whole file in one pass. A few more may come; which of them to take is the caller's choice. `prompts` is the
    prompt format (calib.data.prompts). Raises BadInput, naming the place, for what is not understood.
    """
    by_document, seed = by_document or task.by_document, rows.seed if isinstance(rows, Sample) else None
    rows = rows.rows if isinstance(rows, Sample) else rows
    if (pictured := task.of_images(path, length, rows, seed)) is not None:
        if prompts != "auto":
            raise BadInput(
                f"{path}: has images, which go through the processor's own template; leave out --prompt-format"
            )
        return check_ids(pictured, vocab)
    if kind_of(path) == ".safetensors":
        if by_document and not task.by_document:
            raise BadInput(f"{path}: token ids come in rows already; leave out --by-document")
        return task.made(check_ids(task.of_tokens(path, length), vocab))
    if tokenizer is None:
        raise BadInput(
            f"{path}: text, but the model folder has no tokenizer; add one, or give token ids (.safetensors)"
        )
    form, tries = prompt_format(prompts, tokenizer), 0
    while True:
        documents, everything, apart = _documents(path, form, length, by_document, rows, seed, 2**tries)
        corpus, tokens = task.rows(
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
    return task.made(check_ids(corpus, vocab))


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
        if by_document:
            documents = [replace(d, row=row) for d, row in zip(documents, some, strict=True)]
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
    task: TaskRows = CAUSAL,
) -> Corpus:
    """The text that every Python carries, for the model in `folder`, as a model of `task` reads it."""
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer for the embedded text; give token ids with --data")
    source, texts = f"embedded text ({part})", embedded.python_topics(part)
    if task.by_document:  # of the length that texts have which are embedded
        texts = [paragraph for text in texts for paragraph in text.split("\n\n") if len(paragraph.split()) >= WORDS]
    documents = [Document(text) for text in texts]
    corpus = from_documents(
        documents, tokenizer, length=length, source=source, by_document=by_document or task.by_document,
        make=task.rows,
    )  # fmt: skip
    return task.made(check_ids(corpus, vocab))
