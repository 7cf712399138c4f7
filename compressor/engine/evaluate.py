"""Evaluate a model, quantized or not, on a text: how well it predicts, and how far it is from a reference.

Blocks run one at a time, with everything they do at run time, so a model that does not fit in memory can be evaluated.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from calib import BadInput
from calib.data.corpus import Corpus, embedded_corpus, load_corpus
from calib.data.rows import row_length
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import read_json
from calib.runtime.device import budget_of, check_budget, pick_device
from calib.runtime.memory import lean
from calib.runtime.precision import products_of
from calib.stats.perplexity import Logits, Quality, compare
from compressor.engine.blockwise_runs import float_ends, logits_of, run_blocks
from compressor.engine.load import Opened, open_folder
from compressor.engine.options import Evaluate


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
