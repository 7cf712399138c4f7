"""Text that a model writes: rows continued in batches, with the library's cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from calib.losses.chunked_head import Head, chunks

COMPLETIONS_AT_ONCE = 64  # rows


@torch.no_grad()
def generate(model: Any, prompts: Tensor, length: int, vocab: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows that a model writes, from prompts (b, s) on: ids (b, length) and which of them are real, on the CPU.

    Tokens are drawn at temperature 1, from torch's own generator, until a row is full or an end token is drawn; of ids
    below `vocab`.
    """
    own = model.generation_config
    # Nothing of the model's own settings: many a checkpoint asks for a lower temperature, or fewer words.
    unsaid = list(range(vocab or model.config.vocab_size, model.config.vocab_size)) or None
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_length=length,
        pad_token_id=0,
        eos_token_id=own.eos_token_id,
        suppress_tokens=unsaid,
    )
    try:
        rows = model.generate(prompts, attention_mask=torch.ones_like(prompts)).cpu()
    finally:
        model.generation_config = own
    over = torch.isin(rows, end_tokens(model))
    over[:, : prompts.shape[1]] = False
    real = over.long().cumsum(-1) - over.long() == 0  # up to the first end token, included
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.bool)
    mask[:, : rows.shape[1]] = real
    ids[:, : rows.shape[1]] = rows * real
    return ids, mask


def end_tokens(model: Any) -> Tensor:
    """The tokens (e,) that end a row of a model's; none of them, where it names none."""
    ends = model.generation_config.eos_token_id
    return torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], dtype=torch.int64)


def continued(
    model: Any, beginnings: Sequence[Tensor], length: int, device: torch.device, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows (n, length) that begin with `beginnings` (s,) and go on as a model writes, and which of their tokens the
    model wrote.

    Beginnings of one length are continued together, so that nothing is padded and the rows need no mask, whatever the
    model's blocks are.
    """
    ids, written = torch.zeros(len(beginnings), length, dtype=torch.int64), torch.zeros(len(beginnings), length).bool()
    for size in sorted({len(beginning) for beginning in beginnings}):
        numbers = [i for i, beginning in enumerate(beginnings) if len(beginning) == size]
        for start in range(0, len(numbers), COMPLETIONS_AT_ONCE):
            some = numbers[start : start + COMPLETIONS_AT_ONCE]
            prompts = torch.stack([beginnings[i] for i in some])
            if size >= length:
                ids[some] = prompts[:, :length]
                continue
            ids[some], real = generate(model, prompts.to(device), length, vocab)
            real[:, :size] = False
            written[some] = real
    return ids, written


def beginning_of(ids: Tensor, counted: Tensor) -> Tensor:
    """Cut a row (T,) to what a student continues, where (T - 1,) says what counts: a prompt whole, up to the first
    token that counts; of a text that has none, a quarter."""
    (found,) = torch.where(counted)
    asked = int(found[0]) if len(found) else 0
    return ids[: asked + 1 if asked else max(1, (len(found) + 1) // 4)]


@torch.no_grad()
def surprise(head: Head, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """How many nats each token of rows (n, T) is below the one that a teacher finds most likely there, and that one,
    both (n, T) and on the CPU; of the first token of a row, which nothing comes before, 0.  states (n, T, d)."""
    apart, likely = torch.zeros(ids.shape), torch.zeros_like(ids)
    for row, (hidden, own) in enumerate(zip(states, ids, strict=True)):
        for some in chunks(len(own) - 1, len(head.rows)):
            after = slice(some.start + 1, some.stop + 1)
            logits = head(hidden[some])
            best, token = logits.max(-1)
            said = logits.gather(-1, own[after, None].to(hidden.device))[:, 0]
            apart[row, after], likely[row, after] = (best - said).cpu(), token.cpu()
    return apart, likely


def corrected(
    ids: Tensor, written: Tensor, surprise: Callable[[Tensor], tuple[Tensor, Tensor]],
    write: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]], *, ends: Tensor, threshold: float, times: int,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Rows (n, T) with the first token that a teacher finds most surprising replaced by its own choice, and written on
    from there, up to `times` times.  -> rows, which of their tokens (n, T) are not given, and how many were replaced.

    After SCRG (arXiv:2407.10068), whose text was not to be had; the rule is this toolbox's own: a token y is replaced
    where log max_v T(v) - log T(y) is above `threshold` nats. surprise(ids) -> that difference, and the teacher's most
    likely token, both (n, T) for the token at each position; write(beginnings) -> rows and what was written of them.
    `ends` (e,) are the tokens that end a row: where the teacher's choice is one of them, nothing follows.
    """
    ids, written, count = ids.clone(), written.clone(), 0
    for _ in range(times):
        apart, likely = surprise(ids)
        above = (apart > threshold) & written  # of what was replaced the teacher is not surprised again
        (rows,) = torch.where(above.any(-1))
        if not len(rows):
            break
        places = above[rows].int().argmax(-1)
        beginnings = [
            torch.cat([ids[row, :place], likely[row, place : place + 1]])
            for row, place in zip(rows.tolist(), places.tolist(), strict=True)
        ]
        new, own = write(beginnings)
        over = torch.isin(likely[rows, places], ends)[:, None] & (torch.arange(ids.shape[1]) > places[:, None])
        new, own = new.masked_fill(over, 0), own & ~over
        own[torch.arange(len(rows)), places] = True
        kept = torch.arange(ids.shape[1]) < places[:, None]
        ids[rows], written[rows] = new, torch.where(kept, written[rows], own)
        count += len(rows)
    return ids, written, count
