"""`parewell evaluate MODEL`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from calib import BadInput, embedded
from calib.checkpoint import find_model, read_json, read_tokenizer
from calib.corpus import Corpus, checked, from_documents, load_corpus
from calib.evaluate import Logits, compare
from calib.job import option, pick_device
from cli.options import options
from compressor import load


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    data: Path | None = option(None, "text, .jsonl or .safetensors token ids; default: the embedded held-out text")
    length: int = option(512, "tokens per row")
    rows: int | None = option(None, "only the first rows")
    by_document: bool = option(False, "one document per row instead of packed rows")
    reference: str | None = option(None, "a model to compare with: mean KL(reference || MODEL), equal top tokens")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        if self.length < 2 or (self.rows is not None and self.rows < 1):
            raise BadInput("length must be at least 2 and rows at least 1")


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
@options(Evaluate)
def evaluate(how: Evaluate, model: str, as_json: bool) -> None:
    """Perplexity and bits per byte of MODEL, and how far it is from a reference."""
    corpus = _corpus(find_model(model), how)
    reference = _logits(how.reference, corpus, how) if how.reference else None
    quality = compare(corpus, _logits(model, corpus, how), reference).asdict()
    if as_json:
        click.echo(json.dumps(quality))
        return
    table = Table(title=f"{model} on {corpus.source}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in quality.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def _corpus(folder: Path, how: Evaluate) -> Corpus:
    tokenizer, vocab = read_tokenizer(folder), int(read_json(folder / "config.json")["vocab_size"])
    if how.data is not None:
        corpus = load_corpus(how.data, tokenizer, vocab=vocab, length=how.length, by_document=how.by_document)
    elif tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer for the embedded text; give token ids with --data")
    else:
        documents = embedded.python_topics("held-out")
        corpus = from_documents(
            documents, tokenizer, length=how.length, source="embedded held-out text", by_document=how.by_document
        )
    return checked(corpus, vocab)[: how.rows]


def _logits(model: str, corpus: Corpus, how: Evaluate) -> Logits:
    device = pick_device(how.device)
    loaded: nn.Module = load(model, device=device)

    def logits(rows: slice) -> Tensor:
        result: Tensor = loaded(corpus.ids[rows].to(device)).logits
        return result

    return logits
