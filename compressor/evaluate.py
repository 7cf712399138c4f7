"""Evaluate a model, quantized or not, on a text: how well it predicts, and how far it is from a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from calib import BadInput
from calib.checkpoint import find_model, read_json, read_tokenizer
from calib.corpus import Corpus, checked, embedded_corpus, load_corpus
from calib.evaluate import Logits, Quality, compare
from calib.job import DEVICES, option, pick_device
from compressor.load import load


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    data: Path | None = option(None, "text, .jsonl or .safetensors token ids; default: the embedded held-out text")
    length: int = option(512, "tokens per row")
    rows: int | None = option(None, "only the first rows")
    by_document: bool = option(False, "one document per row instead of packed rows")
    reference: str | None = option(None, "a model to compare with: mean KL(reference || MODEL), equal top tokens")
    device: str = option("auto", "where to compute", choices=DEVICES)

    def __post_init__(self) -> None:
        if self.length < 2 or (self.rows is not None and self.rows < 1):
            raise BadInput("length must be at least 2 and rows at least 1")


def evaluate(model: str | Path, how: Evaluate | None = None) -> Quality:
    """MODEL is a folder or a hub name: OUT of a quantization, or a float model.  Raises BadInput."""
    how = how or Evaluate()
    folder = find_model(model)
    tokenizer, vocab = read_tokenizer(folder), _vocabulary(folder)
    if how.data is not None:
        corpus = load_corpus(Path(how.data), tokenizer, vocab=vocab, length=how.length, by_document=how.by_document)
    else:
        corpus = embedded_corpus(
            "held-out", folder, tokenizer, vocab=vocab, length=how.length, by_document=how.by_document
        )
    corpus = checked(corpus, vocab)[: how.rows]
    if how.reference is None:
        return compare(corpus, _logits(folder, corpus, how))
    reference = find_model(how.reference)
    if _vocabulary(reference) != vocab:
        raise BadInput(
            f"{reference}: has {_vocabulary(reference)} tokens, {folder} has {vocab}; they cannot be compared"
        )
    return compare(corpus, _logits(folder, corpus, how), _logits(reference, corpus, how))


def _vocabulary(folder: Path) -> int:
    size = read_json(folder / "config.json").get("vocab_size")
    if not isinstance(size, int):
        raise BadInput(f"{folder / 'config.json'}: has no vocab_size; this is no language model's config")
    return size


def _logits(folder: Path, corpus: Corpus, how: Evaluate) -> Logits:
    device = pick_device(how.device)
    model = load(folder, device=device)

    def logits(rows: slice) -> Tensor:
        result: Tensor = model(corpus.ids[rows].to(device)).logits
        return result

    return logits
