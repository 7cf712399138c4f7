"""Evaluate a model, quantized or not, on a text: how well it predicts, and how far it is from a reference.

Blocks run one at a time, with everything they do at run time, so a model that does not fit in memory can be evaluated.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.checkpoint import find_model, read_json, read_tokenizer
from calib.corpus import Corpus, embedded_corpus, load_corpus
from calib.device import DEVICES, budget_of, check_budget, pick_device
from calib.evaluate import Logits, Quality, compare
from calib.job import check_numbers, check_sizes, option
from calib.memory import lean
from calib.precision import PRECISIONS, products_of
from calib.prompts import PROMPT_FORMAT
from calib.records import SOURCES
from calib.rows import row_length
from compressor.load import Opened, open_folder
from compressor.walks import float_ends, logits_of, run_blocks


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    data: Path | None = option(None, f"rows: {SOURCES}; default: the embedded held-out text")
    length: int | None = option(None, "tokens per row; default: 512, or as many as the model has positions")
    rows: int | None = option(None, "only the first rows")
    by_document: bool = option(False, "one document per row instead of packed rows")
    prompt_format: str = option("auto", PROMPT_FORMAT)
    answers_only: bool = option(False, "measure answers, not prompts")
    reference: str | None = option(None, "a model to compare with: mean KL(reference || MODEL), equal top tokens")
    memory_budget: float | None = option(
        None, "GiB of hidden states held in RAM before they go to disk; default: 2 or a quarter of what is available"
    )
    device: str = option("auto", "where to compute", choices=DEVICES)
    precision: str = option(
        "auto", "of the matrix products in a block; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if (self.length is not None and self.length < 2) or (self.rows is not None and self.rows < 1):
            raise BadInput("length must be at least 2 and rows at least 1")
        check_sizes(self)


def evaluate(model: str | Path, how: Evaluate | None = None) -> Quality:
    """MODEL is a folder or a hub name: OUT of a quantization, or a float model.  Raises BadInput."""
    how = how or Evaluate()
    folder = find_model(model, base_model=how.base_model, dequantize=how.dequantize)
    tokenizer, vocab = read_tokenizer(folder), vocabulary(folder)
    length = row_length(how.length, read_json(folder / "config.json").get("max_position_embeddings"))
    if how.data is not None:
        corpus = load_corpus(
            Path(how.data), tokenizer, vocab=vocab, length=length, by_document=how.by_document,
            prompts=how.prompt_format, rows=how.rows,
        )  # fmt: skip
    else:
        corpus = embedded_corpus("held-out", folder, tokenizer, vocab=vocab, length=length, by_document=how.by_document)
    if how.answers_only and corpus.answers is None:
        raise BadInput(f"{corpus.source}: has no prompts, so nothing is an answer; leave out --answers-only")
    corpus = corpus[: how.rows]
    if how.reference is None:
        return compare(corpus, vocab, _logits(folder, corpus, how), answers_only=how.answers_only)
    reference = find_model(how.reference)
    if vocabulary(reference) != vocab:
        raise BadInput(
            f"{reference}: has {vocabulary(reference)} tokens, {folder} has {vocab}; they cannot be compared"
        )
    models = _logits(folder, corpus, how), _logits(reference, corpus, how)
    return compare(corpus, vocab, *models, answers_only=how.answers_only)


def vocabulary(folder: Path) -> int:
    """As config.json says it.  Raises BadInput."""
    size = read_json(folder / "config.json").get("vocab_size")
    if not isinstance(size, int):
        raise BadInput(f"{folder / 'config.json'}: has no vocab_size; this is no language model's config")
    return size


def _logits(folder: Path, corpus: Corpus, how: Evaluate) -> Logits:
    device = pick_device(how.device)
    opened = open_folder(folder, device, products=products_of(how.precision, device))
    check_budget(how.memory_budget, corpus.ids.shape[1], opened.stream.sizes.hidden, opened.stream.dtype)
    return answers(opened, corpus, budget_of(how.memory_budget, device))


def answers(opened: Opened, corpus: Corpus, budget: int) -> Logits:
    """For `compare`, of a folder as it runs, walked block by block with `budget` bytes of hidden states in RAM."""
    stream, ends = opened.stream, float_ends(opened.stream)
    with tempfile.TemporaryDirectory(prefix="parewell-") as scratch:
        lean(budget)
        final = run_blocks(stream, corpus, ends, stream.reading, opened.online, budget, Path(scratch))
    return logits_of(stream, corpus, ends, final)
