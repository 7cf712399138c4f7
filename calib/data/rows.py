"""Which rows of which text a job works on, and which it is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from calib import BadInput
from calib.data.corpus import Corpus, first_rows, pad_to, sample_rows
from calib.data.load import CAUSAL, Sample, embedded_corpus, load_corpus
from calib.data.task_rows import TaskRows

LEAST_ROWS, LEAST_HELD_OUT = 8, 2  # that a default may come down to where there is no more text
OFFSET = {  # whose position embeddings begin after the padding token's number
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


class Drawing(Protocol):
    """The options that say so."""

    @property
    def data(self) -> Path | None:
        """The file that rows are drawn from; None: the embedded text."""

    @property
    def samples(self) -> int | None:
        """How many rows are asked for; None: the default, or as many as there are."""

    @property
    def length(self) -> int | None:
        """Tokens of a row; None: the default, or as many as the model has positions."""

    @property
    def by_document(self) -> bool:
        """Whether each document is a row of its own, padded, instead of packed rows."""

    @property
    def prompt_format(self) -> str:
        """How prompts and answers become text; see `calib.data.prompts`."""

    @property
    def held_out(self) -> int | None:
        """How many further rows are held out; None: the default."""

    @property
    def held_out_data(self) -> Path | None:
        """The file that held-out rows are taken from; None: the same as the others."""

    @property
    def seed(self) -> int:
        """The seed of which rows are drawn."""


def positions_of(config: Any) -> int | None:
    """The greatest number of tokens in a row that a model's config admits; None where nothing bounds it."""
    positions = getattr(config, "max_position_embeddings", None)
    if type(positions) is not int or positions < 1:
        return None
    if getattr(config, "model_type", None) in OFFSET:
        positions -= (getattr(config, "pad_token_id", None) or 0) + 1
    return positions


def row_length(asked: int | None, positions: int | None, task: TaskRows = CAUSAL) -> int:
    """Tokens of a row: as `asked`, else the task's or as many as the model has positions.  Raises BadInput for more."""
    if asked is None:
        return min(task.length, positions or task.length)
    if positions is not None and asked > positions:
        raise BadInput(f"length is {asked}; the model has {positions} positions (config.json), give at most that")
    return asked


def draw_rows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab: int,
    options: Drawing,
    *,
    positions: int | None = None,
    samples: int | None = None,
    held_out: int = 16,
    task: TaskRows = CAUSAL,
) -> tuple[Corpus, Corpus]:
    """Calibration or training rows, and held-out rows, of one length.

    Where `options` leave them open, `samples` (None: all there are) and `held_out` are taken, or as many as the data
    has, but not below a floor; what is asked for outright is given or refused. Raises BadInput.
    """
    length = row_length(options.length, positions, task)
    asked, apart = (options.samples or samples), options.held_out or held_out

    def read(path: Path, rows: int | Sample | None) -> Corpus:
        return load_corpus(
            Path(path), tokenizer, vocab=vocab, length=length, by_document=options.by_document,
            prompts=options.prompt_format, rows=rows, task=task,
        )  # fmt: skip

    def embedded_rows(part: Literal["train", "held-out"]) -> Corpus:
        return embedded_corpus(
            part, folder, tokenizer, vocab=vocab, length=length, by_document=options.by_document, task=task
        )

    if options.data is not None and options.held_out_data is None:
        corpus = read(options.data, None if asked is None else Sample(asked + apart, options.seed))
        there = len(corpus.ids)
        if asked is None:
            asked = max(1, there - apart)
        elif there < asked + apart:
            asked, apart = _as_many_as_there_are(corpus, asked, apart, options)
        rows = sample_rows(corpus, asked + apart, options.seed)
        return _noted(rows[:asked], options.samples or samples), rows[asked:]
    drawn = None if asked is None else Sample(asked, options.seed)
    calibration = read(options.data, drawn) if options.data else embedded_rows("train")
    if options.held_out_data:
        measured = read(options.held_out_data, apart)
        measured = first_rows(
            measured, apart if options.held_out else min(apart, max(LEAST_HELD_OUT, len(measured.ids)))
        )
    else:
        measured = embedded_rows("held-out")
        apart = apart if options.held_out else min(apart, max(LEAST_HELD_OUT, len(measured.ids)))
        measured = sample_rows(measured, apart, options.seed)
    if asked is None:
        asked = len(calibration.ids)
    elif options.samples is None:
        asked = min(asked, max(LEAST_ROWS, len(calibration.ids)))
    width = max(calibration.ids.shape[1], measured.ids.shape[1])
    calibration = _noted(sample_rows(calibration, asked, options.seed), options.samples or samples)
    return pad_to(calibration, width), pad_to(measured, width)


def rows_like(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab: int,
    options: Drawing,
    *,
    most: int,
    apart: int,
    positions: int | None = None,
    task: TaskRows = CAUSAL,
) -> Corpus:
    """At most `most` rows of a file beside those that a job works on, made and drawn as these are: of the same file the
    same rows.  `apart`: rows that the job holds out of what it draws.  Raises BadInput."""
    corpus = load_corpus(
        Path(path), tokenizer, vocab=vocab, length=row_length(options.length, positions, task),
        by_document=options.by_document, prompts=options.prompt_format, rows=Sample(most + apart, options.seed),
        task=task,
    )  # fmt: skip
    return sample_rows(corpus, min(most, len(corpus.ids)), options.seed)


def _as_many_as_there_are(corpus: Corpus, asked: int, apart: int, options: Drawing) -> tuple[int, int]:
    """Of too few rows: what was asked for outright stays, the rest is divided as it would have been."""
    there = len(corpus.ids)
    if options.samples is not None and options.held_out is not None:
        return asked, apart
    if options.samples is not None:
        return asked, max(LEAST_HELD_OUT, there - asked)
    if options.held_out is None:
        apart = max(LEAST_HELD_OUT, round(there * apart / (asked + apart)))
    return max(LEAST_ROWS, there - apart), apart


def _noted(corpus: Corpus, requested: int | None) -> Corpus:
    """With a word for the report where there are fewer rows than usual."""
    if requested is None or len(corpus.ids) >= requested:
        return corpus
    return replace(corpus, about={**corpus.about, "fewer_than": requested})
