"""Which training rows an answer comes from, for a language model that need not fit into memory.

To first order, a training row adds to a query's margin -g_query H^-1 g_row (`unlearn.datamodels.influence`); gradients
come block by block (`calib.blockwise.gradients`) and wait on disk, in pages of one block and some rows. So do
curvature and scores: layers that are curved together are read together, and no others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calib import BadInput
from calib.blockwise.gradients import BlockwiseLinears, blockwise_gradients
from calib.blockwise.model import BlockwiseModel
from calib.data.rows import positions_of, row_length
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal, journal_beside, stop_if_asked
from calib.jobs.options import stream_identity
from calib.jobs.output_folder import beside
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.runtime.device import check_budget, memory_budget_bytes, pick_device
from calib.runtime.disk import disk_full
from calib.runtime.distributed import barrier, is_main_process, raise_together, rank, world_size
from calib.runtime.memory import limit_malloc_cache
from calib.runtime.progress import stage
from unlearn.data.dataset import Data, language_rows
from unlearn.datamodels.influence import curvature_groups, damped_cholesky_
from unlearn.model.examples import Examples
from unlearn.model.margins import margins
from unlearn.options.attribution import Attribute

WALK_TOKENS = 2**14  # of rows that walk through all blocks together, whose hidden states wait on disk
CHUNK_LOGITS = 2**27  # bytes of logits that exist together
Sums = Callable[[Tensor, Tensor, int], list[Tensor]]  # logits (d, V), labels (d,), seed -> sums over target positions


def attribute(
    model: str | Path, out: str | Path, options: Attribute, *, resume: bool | None = None
) -> list[dict[str, Any]]:
    """Find the training rows that make a language model's answers likelier, and those that make them less likely.

    A row's score for a query is, to first order, how much the row adds to the sum over the query's answer tokens of
    their margin, log p / (1 - p) in nats, by influence functions with a block-diagonal Fisher matrix over all linears
    inside the blocks and the head, randomly projected (arXiv:1703.04730, arXiv:2405.13954). The model is read block by
    block, so that memory does not grow with its depth; nothing is trained. Among several processes of torchrun each
    takes some of the rows.

    Args:
        model: a directory of one of the known architectures, or a name on the hub.
        out: the file to write, JSON lines; complete or absent.
        options: training rows, queries, and how gradients are projected.
        resume: what becomes of an interrupted run's journal beside `out`: True continues it, False discards it, None
            refuses to start.

    Returns:
        What the file has, one line a query: `query`, its line number in the query file; `raises`, the training rows
        with the highest scores, best first, each with `row` (line number in the training file), `score` (nats) and
        `text`; and `lowers`, those with the lowest, lowest first.

    Raises:
        BadInput: model, rows, options or output will not do; nothing was written.
        Failed: the curvature cannot be inverted; raise `damping`.
    """
    out = Path(out)
    with raise_together():
        job = _validated(model, out, options)
        data = {"train": job.train.describe(), "query": job.query.describe()}
        identity = stream_identity(options, model, job.stream.weights.folder, job.stream) | {"data": data}
    with journal_beside(out, identity, resume) as journal:
        context = RunContext(journal, memory_budget_bytes(options.memory_budget, job.stream.device))
        scores = blockwise_scores(job.stream, job.train.examples, job.query.examples, options, context)
        found = listed(scores, job.train, job.query, options.top) if is_main_process() else []
        if is_main_process():
            _write(out, found)
    return found


@dataclass(frozen=True)
class _Job:
    stream: BlockwiseModel
    train: Data
    query: Data


def _validated(model: str | Path, out: Path, options: Attribute) -> _Job:
    """Raises BadInput."""
    assert options.train is not None and options.query is not None
    device = pick_device(options.device)
    limit_malloc_cache(memory_budget_bytes(options.memory_budget, device))
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out}: is there already; choose another place or remove it")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise BadInput(f"{out.parent}: is no folder that may be written to; make it first")
    if (place := beside(out, "journal")).exists() and not place.is_dir():
        raise BadInput(f"{place}: is in the way; remove it, or choose another place")
    folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
    config = read_config(folder)
    stream = BlockwiseModel(config, Weights(folder), device)
    tokenizer, width = read_tokenizer(folder), row_length(options.length, positions_of(config))
    train, query = (
        language_rows(Path(file), tokenizer, config, folder, width, options.prompt_format)
        for file in (options.train, options.query)
    )
    for data in (train, query):
        check_budget(options.memory_budget, data.examples.width, stream.hidden, stream.dtype)
    return _Job(stream, train, query)


# Gradients, in pages.


def _losses(logits: Tensor, labels: Tensor, seed: int) -> list[Tensor]:
    """Nats of the labels, and of labels that the model draws."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return [cross_entropy(logits, some, reduction="sum") for some in (labels, drawn)]


def _margins(logits: Tensor, labels: Tensor, seed: int) -> list[Tensor]:
    return [margins(logits, labels).sum()]


@dataclass(frozen=True)
class _Pages:
    """Projected gradients of all rows of one file, (n, D) for each of `names`, on pages of one part and some rows."""

    journal: Journal
    of: str
    names: tuple[str, ...]
    walks: list[list[slice]]  # of chunks of rows that pass through a block together

    def page(self, walk: int, part: int) -> str:
        return f"{self.of}-{walk}-{part}"

    @property
    def count(self) -> int:
        return self.walks[-1][-1].stop

    def rows(self, walk: int) -> slice:
        return slice(self.walks[walk][0].start, self.walks[walk][-1].stop)

    def columns(self, walk: int, name: str, parts: Sequence[tuple[int, slice]]) -> Tensor:
        """Of the rows of a walk, the columns of some parts, one after the other; float64."""
        found = [self.journal.read(self.page(walk, part))[0][name][:, columns] for part, columns in parts]
        return torch.cat(found, 1).double()


def _chunks(rows: Examples, tokens: int, vocab: int) -> list[list[slice]]:
    """Which rows walk together, and of those which pass through a block together: this decides which labels are drawn,
    so nothing of it depends on the memory that there is."""
    at_once = max(1, min(tokens, CHUNK_LOGITS // (4 * vocab)))
    size = max(1, at_once // rows.labels.shape[1])
    each = max(1, WALK_TOKENS // (size * rows.labels.shape[1]))
    chunks = [slice(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]
    return [chunks[i : i + each] for i in range(0, len(chunks), each)]


def _gradients(
    linears: BlockwiseLinears, rows: Examples, sums: Sums, pages: _Pages, seed: int, context: RunContext
) -> None:
    """Fill the pages; each process those of some walks."""
    firsts = [0, *accumulate(map(len, pages.walks))]
    turns = -(-len(pages.walks) // world_size())
    with stage(f"gradients of {pages.of} rows", turns, "walks") as done:
        for turn in range(turns):  # as many in every process, which meet after each
            walk = turn * world_size() + rank()
            known = walk >= len(pages.walks) or pages.page(walk, 0) in pages.journal
            if not known:
                own, first = rows[pages.rows(walk)], firsts[walk]
                _walk(linears, own, sums, pages, walk, seed + first, context)
            stop_if_asked()
            done(again=known)
    barrier()


def _walk(
    linears: BlockwiseLinears, own: Examples, sums: Sums, pages: _Pages, walk: int, seed: int, context: RunContext
) -> None:
    stream, start = linears.stream, pages.rows(walk).start
    slices = [slice(some.start - start, some.stop - start) for some in pages.walks[walk]]
    seeds = {some.start: seed + i for i, some in enumerate(slices)}
    used = own.width  # what comes after the last target position decides nothing
    labels = own.labels.to(stream.device)

    def totals(some: slice, logits: Tensor) -> list[Tensor]:
        of = labels[some]
        return sums(logits, of[own[some].target_mask.to(of.device)], seeds[some.start])

    found = blockwise_gradients(
        linears, own.inputs["input_ids"][:, :used], own.target_mask[:, :used], totals, slices,
        lambda shape, dtype: context.store(shape, dtype, stream.room),
    )  # fmt: skip
    for part, each in found:  # the first block's comes last: where it is, all are
        pages.journal.write_own(pages.page(walk, part), dict(zip(pages.names, each, strict=True)), {})


# Scores.


def blockwise_scores(
    stream: BlockwiseModel, train: Examples, query: Examples, options: Attribute, context: RunContext
) -> Tensor:
    """Score each training row by what it adds to the sum of each query's margins.  -> (n, m), float64; in the main
    process, others get nothing.

    train and query are rows of token ids, n and m of them. What is finished is kept on the context's journal.
    """
    linears = BlockwiseLinears(stream, options.width, options.seed)
    tokens, vocab = options.micro_batch_tokens, stream.vocab
    of_train = _Pages(context.journal, "train", ("own", "drawn"), _chunks(train, tokens, vocab))
    of_query = _Pages(context.journal, "query", ("margin",), _chunks(query, tokens, vocab))
    _gradients(linears, train, _losses, of_train, options.seed, context)
    _gradients(linears, query, _margins, of_query, options.seed, context)
    if not is_main_process():
        return torch.empty(0, 0, dtype=torch.float64)
    return _scores(linears, of_train, of_query, options.damping)


def _groups(linears: BlockwiseLinears) -> Iterator[list[tuple[int, slice]]]:
    """Columns of parts that are curved together."""
    places = list[tuple[int, slice]]()
    for part in range(len(linears.parts)):
        ends = list(accumulate(linears.sizes(part).values(), initial=0))
        places += [(part, slice(a, b)) for a, b in pairwise(ends)]
    for group in curvature_groups([columns.stop - columns.start for _, columns in places]):
        some, places = places[: len(group)], places[len(group) :]
        parts = sorted({part for part, _ in some})
        yield [
            (p, slice(min(c.start for q, c in some if q == p), max(c.stop for q, c in some if q == p))) for p in parts
        ]


def _scores(linears: BlockwiseLinears, train: _Pages, query: _Pages, damping: float) -> Tensor:
    every = [(part, slice(None)) for part in range(len(linears.parts))]
    size = sum(sum(linears.sizes(part).values()) for part in range(len(linears.parts)))
    squares = torch.zeros((), dtype=torch.float64)
    for walk in range(len(train.walks)):
        for place in every:
            squares += train.columns(walk, "drawn", [place]).square().sum()
    scores = torch.zeros(train.count, query.count, dtype=torch.float64)
    groups = list(_groups(linears))
    with stage("scores", len(groups), "groups of layers") as done:
        for group in groups:
            curvature: Tensor | None = None
            for walk in range(len(train.walks)):
                drawn = train.columns(walk, "drawn", group)
                curvature = drawn.mT @ drawn if curvature is None else curvature.addmm_(drawn.mT, drawn)
            assert curvature is not None
            factor = damped_cholesky_(curvature, squares / size, damping)
            asked = torch.cat([query.columns(walk, "margin", group) for walk in range(len(query.walks))])
            solved = torch.cholesky_solve(asked.mT, factor)
            del curvature, factor
            for walk in range(len(train.walks)):
                scores[train.rows(walk)] -= train.columns(walk, "own", group) @ solved
            done("")
    return scores


# What is written.


def listed(scores: Tensor, train: Data, query: Data, top: int) -> list[dict[str, Any]]:
    """The highest and the lowest scores (n, m) of each query; of a row that is several examples, their sum."""
    whole, of_train = _added(scores, train.numbers)
    whole, of_query = _added(whole.mT, query.numbers)
    shown = {number: row for row, number in reversed(list(enumerate(train.numbers)))}
    found = []
    for number, values in zip(of_query, whole, strict=True):
        order = values.sort(descending=True, stable=True).indices.tolist()

        def some(rows: list[int], values: Tensor = values) -> list[dict[str, Any]]:
            texts = [" | ".join(train.fields[shown[of_train[row]]].values())[:200] for row in rows]
            scored = zip(rows, texts, strict=True)
            return [{"row": of_train[row], "score": float(values[row]), "text": text} for row, text in scored]

        found.append({"query": number, "raises": some(order[:top]), "lowers": some(order[::-1][:top])})
    return found


def _added(scores: Tensor, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(n, ...) -> sums over examples with one line number, and the numbers."""
    each = sorted(set(numbers))
    places = {number: place for place, number in enumerate(each)}
    where = torch.tensor([places[number] for number in numbers])
    return scores.new_zeros(len(each), scores.shape[1]).index_add_(0, where, scores), each


def _write(out: Path, found: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
    new = beside(out, "journal") / "out.new"
    with disk_full(out, len(text)):
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        new.rename(out)
