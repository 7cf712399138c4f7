"""What a teacher says once, before the student learns: rows that it writes, and its distributions, which are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.losses.chunked_head import chunks
from calib.losses.top_k import SampledTargets, TopK, sample_targets, top_k
from calib.runtime.device import fork_rng
from calib.runtime.distributed import barrier, local_indices, world_size
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.perplexity import Logits
from compressor.distillation.models import Teacher
from compressor.engine.blockwise_runs import logits_of, run_blocks
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.on_policy.sampling import continued, generate

WRITTEN_AT_ONCE = 32  # rows
WALK = "walk training rows"  # a stage


def written_rows(
    checkpoint: Callable[[], Teacher], corpus: Corpus, rows: int, seed: int, device: torch.device, journal: Journal
) -> tuple[Corpus, Tensor]:
    """The corpus with `rows` rows of the teacher's own, each from the first token of some row on, and which of their
    tokens are real (rows, T)."""
    if "written" not in journal:
        teacher = checkpoint()
        firsts = corpus.ids[:, :1]
        starts = torch.arange(rows) % len(firsts)
        parts: list[tuple[Tensor, Tensor]] = []
        with fork_rng(device, seed), stage("write", rows, "rows") as done:
            for some in starts.split(WRITTEN_AT_ONCE):
                prompts = firsts[some].to(device)
                parts.append(generate(teacher.model, prompts, corpus.ids.shape[1], teacher.head.vocab))
                done(units=len(some))
        barrier()
        ids, mask = (torch.cat(part) for part in zip(*parts, strict=True))
        journal.write("written", {"ids": ids, "mask": mask}, {})
        barrier()
    tensors, _ = journal.read("written")
    ids, mask = tensors["ids"], tensors["mask"].bool()
    more = replace(
        corpus,
        ids=torch.cat([corpus.ids, ids]),
        mask=torch.cat([corpus.mask, mask]),
        answers=None,
        token_bytes=None,
        records=(),
        spans=None if corpus.spans is None else torch.cat([corpus.spans, -torch.ones_like(ids)]),
    )
    return more, mask


def answered_by(teacher: Teacher, corpus: Corpus, seed: int, journal: Journal) -> Corpus:
    """Prompts alone, each row with an answer that the teacher draws; what is measured on them are the answers."""
    if "held-out-written" not in journal:
        device, length = teacher.head.weight.device, corpus.ids.shape[1]
        prompts = [ids[mask] for ids, mask in zip(corpus.ids, corpus.mask, strict=True)]
        with fork_rng(device, seed), stage("answer prompts", len(prompts), "rows") as done:
            ids, written = continued(teacher.model, prompts, length, device, teacher.head.vocab)
            done(units=len(prompts))
        barrier()
        journal.write("held-out-written", {"ids": ids, "mask": written | corpus.mask}, {})
        barrier()
    tensors, _ = journal.read("held-out-written")
    mask = tensors["mask"].bool()
    return replace(corpus, ids=tensors["ids"], mask=mask, answers=mask & ~corpus.mask, token_bytes=None)


@torch.no_grad()
def keep(
    stream: BlockwiseModel,
    corpus: Corpus,
    cache: TeacherCache,
    *,
    kind: str,
    k: int,
    vocab: int,
    seed: int,
    context: RunContext,
) -> None:
    """Walk the teacher, block by block, over the rows of which the cache keeps nothing yet.

    `kind` "top-k": its k most likely tokens, or "drawn": k drawn from it, which depend on row and seed alone.
    """
    missing = [row for row in range(len(corpus.ids)) if row not in cache]
    barrier()  # all have looked before any writes
    if missing:
        logits = walked(stream, corpus[torch.tensor(missing)], vocab, context, label=WALK)
        own = local_indices(len(missing))

        def kept(place: int) -> TopK | SampledTargets:
            generator = torch.Generator(stream.device).manual_seed(seed + 104_729 * missing[place])
            parts: list[TopK | SampledTargets] = []
            for positions in chunks(corpus.ids.shape[1], vocab):
                some = logits(place, positions)
                parts.append(top_k(some, k) if kind == "top-k" else sample_targets(some, k, generator))
            return type(parts[0])(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))

        kept_before = (len(corpus.ids) - len(missing)) // world_size()
        with stage("teacher", kept_before + len(own), "rows", kept_before) as done:
            for place in own:
                cache.write(missing[place], kept(place))
                done("")
        barrier()
    trim_heap()


def walked(
    stream: BlockwiseModel, corpus: Corpus, vocab: int, context: RunContext, label: str = "walk held-out rows"
) -> Logits:
    """The teacher's logits on this process's rows, with one block in memory at a time."""
    outer, plain = stream.read_outer(), [RuntimeTransforms()] * stream.layers
    with torch.no_grad():
        final = run_blocks(stream, corpus, outer, stream.reading, plain, context, label)
    logits = logits_of(stream, corpus, outer, final)
    return lambda row, positions: logits(row, positions)[:, :vocab]
