"""Evaluate a model, quantized or not, on a text: how well it predicts, and how far it is from a reference.

Blocks run one at a time, with everything they do at run time, so a model that does not fit in memory can be evaluated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from calib import BadInput
from calib.data.corpus import Corpus
from calib.data.load import embedded_corpus, load_corpus
from calib.data.rows import positions_of, row_length
from calib.data.task_rows import TaskRows
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import config_for, read_json
from calib.model.pooling import pooling_of
from calib.model.task import ALL_TASKS, Task, task_of_checkpoint
from calib.runtime.device import check_budget, memory_budget_bytes, pick_device
from calib.runtime.memory import limit_malloc_cache
from calib.runtime.precision import autocast_dtype
from calib.stats.perplexity import Logits, Quality, compare
from calib.stats.similarity import Similarity, similarity
from compressor.engine.blockwise_runs import logits_of, run_blocks
from compressor.engine.information_plane import information_plane, positions_compared
from compressor.engine.load import QuantizedCheckpoint, open_checkpoint
from compressor.engine.options import Evaluate


def evaluate(model: str | Path, options: Evaluate | None = None) -> Quality | Similarity:
    """Measure a language model on a text: perplexity, bits per byte and, with a reference, mean KL and agreement; of an
    embedding model how near its embeddings are to a reference's.

    The model runs block by block, so that it need not fit into memory.

    Args:
        model: a directory (also an output of `quantize`), or a name on the hub.
        options: rows, reference and device; default: the embedded held-out text.

    Returns:
        The figures, over all predicted tokens: perplexity, bits per byte, KL in nats per token, the share of equal most
        likely tokens, the tell-apart rate and tokens until told apart (`calib.stats.tell_apart`), standard errors by
        rows. Of a masked language model they are about the tokens that are hidden from it, 15% of each row.

    Raises:
        BadInput: model, reference or data will not do.
    """
    options = options or Evaluate()
    folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
    raw, vocab = read_json(folder / "config.json"), vocabulary(folder)
    raw.pop("quantization_config", None)
    config, tokenizer = config_for(folder, raw, ALL_TASKS), read_tokenizer(folder)
    kind = task_of_checkpoint(config.model_type, config.architectures) or Task.CAUSAL_LM
    task = TaskRows.of(kind, config, tokenizer, folder)
    length = row_length(options.length, positions_of(config), task)
    if options.data is not None:
        corpus = load_corpus(
            Path(options.data), tokenizer, vocab=vocab, length=length, by_document=options.by_document,
            prompts=options.prompt_format, rows=options.rows, task=task,
        )  # fmt: skip
    else:
        corpus = embedded_corpus(
            "held-out", folder, tokenizer, vocab=vocab, length=length, by_document=options.by_document, task=task
        )
    if options.answers_only and corpus.answers is None:
        raise _no_answers(corpus, kind)
    corpus = corpus[: options.rows]
    if kind.embeds and options.reference is None:
        raise BadInput(
            f"{folder}: is an embedding model, whose figures are of how near its embeddings are to another's; give "
            "--reference MODEL, such as the one that it was made from"
        )
    _check_information(kind, folder, corpus, options)
    if options.reference is None:
        found = compare(corpus, vocab, _logits(folder, corpus, options), answers_only=options.answers_only)
        return _with_information(found, {"model": folder}, corpus, options)
    reference = find_model(options.reference)
    if vocabulary(reference) != vocab:
        raise BadInput(
            f"{reference}: has {vocabulary(reference)} tokens, {folder} has {vocab}; they cannot be compared"
        )
    theirs = read_json(reference / "config.json")
    if task_of_checkpoint(str(theirs.get("model_type")), theirs.get("architectures")) is not kind:
        raise BadInput(f"{reference}: is no {kind.described}, as {folder} is; they cannot be compared")
    models = _logits(folder, corpus, options), _logits(reference, corpus, options)
    if kind.embeds:
        return similarity(corpus, pooling_of(folder), *models)
    found = compare(corpus, vocab, *models, answers_only=options.answers_only)
    return _with_information(found, {"model": folder, "reference": reference}, corpus, options)


def _check_information(kind: Task, folder: Path, corpus: Corpus, options: Evaluate) -> None:
    if not options.information_plane:
        return
    if kind is not Task.CAUSAL_LM:
        raise BadInput(f"information-plane: is about causal language models, and {folder} is none; leave it out")
    positions_compared(corpus, options.answers_only)


def _with_information(found: Quality, models: Mapping[str, Path], corpus: Corpus, options: Evaluate) -> Quality:
    if not options.information_plane:
        return found
    planes = dict[str, dict[str, list[float]]]()
    for name, folder in models.items():
        checkpoint = _opened(folder, corpus, options)
        budget = memory_budget_bytes(options.memory_budget, checkpoint.stream.device)
        planes[name] = information_plane(checkpoint, corpus, budget, answers_only=options.answers_only)
    return replace(found, information=planes)


def _no_answers(corpus: Corpus, task: Task) -> BadInput:
    if task is not Task.CAUSAL_LM:
        return BadInput(
            "answers-only: tells answers from prompts where a causal language model reads both as text; leave it out"
        )
    return BadInput(f"{corpus.source}: has no prompts, so nothing is an answer; leave out --answers-only")


def vocabulary(folder: Path) -> int:
    """The vocabulary size in a directory's config.json.  Raises BadInput."""
    raw = read_json(folder / "config.json")
    size = raw.get("vocab_size", raw.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise BadInput(f"{folder / 'config.json'}: has no vocab_size; this is no language model's config")
    return size


def _logits(folder: Path, corpus: Corpus, options: Evaluate) -> Logits:
    checkpoint = _opened(folder, corpus, options)
    return logits_function(checkpoint, corpus, memory_budget_bytes(options.memory_budget, checkpoint.stream.device))


def _opened(folder: Path, corpus: Corpus, options: Evaluate) -> QuantizedCheckpoint:
    device = pick_device(options.device)
    checkpoint = open_checkpoint(folder, device, products=autocast_dtype(options.precision, device))
    checkpoint.stream.check_end()
    check_budget(options.memory_budget, corpus.ids.shape[1], checkpoint.stream.hidden, checkpoint.stream.dtype)
    return checkpoint


def logits_function(checkpoint: QuantizedCheckpoint, corpus: Corpus, budget: int) -> Logits:
    """Logits for `compare` of a checkpoint as it runs, block by block with `budget` bytes of hidden states in RAM."""
    stream, outer = checkpoint.stream, checkpoint.stream.read_outer()
    with tempfile.TemporaryDirectory(prefix="parewell-") as scratch:
        limit_malloc_cache(budget)
        final = run_blocks(
            stream, corpus, outer, stream.reading, checkpoint.online, RunContext(Journal(Path(scratch)), budget)
        )
    return logits_of(stream, corpus, outer, final)
