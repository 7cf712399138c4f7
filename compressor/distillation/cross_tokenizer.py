"""A teacher with another tokenizer than its student's: it reads the same text in its own tokens, and speaks where both
have read as much of it.

There its next-token distribution is compared with the student's on the tokens that both have (same bytes, or the end of
the text), all others being one class. Tokens that stand in one vocabulary alone can be compared by their sorted
probabilities (ULD, arXiv:2402.12030), as TRL's GOLD does beside its matched ones. Where the two cut a word in different
places nothing is compared: a model that is sure of a word whose first piece the other does not have differs there for
no fault of its own, so the least of these losses is not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib import BadInput
from calib.data.corpus import Corpus
from calib.data.token_bytes import TokenAligner
from calib.losses.chunked_head import chunks
from calib.losses.divergences import forward_kl
from calib.losses.top_k import with_tail_bucket
from calib.runtime.distributed import all_reduce_sum_, local_indices
from calib.runtime.precision import upcast
from calib.runtime.progress import stage
from calib.stats.perplexity import Logits, Quality, compare, standard_error
from compressor.distillation.losses.matched import MatchedTokens
from compressor.distillation.models import Student, Teacher

CROSS_COPIES = 6  # of a chunk's logits: both models', and what is made of them


class CrossTokenizerTeacher:
    """A teacher that reads a student's rows in tokens of its own."""

    def __init__(self, teacher: Teacher, aligner: TokenAligner, room: int) -> None:
        """`room`: tokens that it reads of a row at most."""
        self.teacher, self.aligner, self._room = teacher, aligner, room
        self._matched = aligner.matched.to(teacher.head.weight.device)

    @torch.no_grad()
    def states(self, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what the head sees (n, D) at the positions of a student's rows (B, T) that count (B, T - 1), and at
        which of them (n,) both have read as much; zeros at the others."""
        device, states, heard = self.teacher.head.weight.device, list[Tensor](), list[Tensor]()
        for row, of in zip(ids.cpu(), counted.cpu(), strict=True):
            last = int(of.nonzero().max()) + 2 if of.any() else 1  # what follows is padding
            aligned = self.aligner.aligned(row[:last], self._room)
            there = aligned.positions[of[: last - 1]].to(device)
            if len(aligned.ids):
                hidden = self.teacher.hidden(aligned.ids[None].to(device))[0]
            else:
                hidden = self.teacher.head.weight.new_zeros(1, self.teacher.head.weight.shape[1])
            states.append(hidden[there.clamp(min=0)] * (there >= 0)[:, None])
            heard.append(there >= 0)
        return torch.cat(states), torch.cat(heard)

    def rows(self, corpus: Corpus) -> Corpus:
        """A student's rows in the teacher's tokens."""
        aligned = [
            self.aligner.aligned(ids[real], self._room) for ids, real in zip(corpus.ids, corpus.mask, strict=True)
        ]
        ids, sizes = (
            torch.nn.utils.rnn.pad_sequence(list(of), batch_first=True)
            for of in zip(*((row.ids, row.sizes) for row in aligned), strict=True)
        )
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in aligned])[:, None]
        return Corpus(ids, mask, corpus.source, sizes)

    def signal(self, states: Tensor) -> MatchedTokens:
        """The teacher's distributions at states (n, D)."""
        logits = upcast(self.teacher.head(states))
        log_p = logits.log_softmax(-1)
        ours, theirs = self._matched.unbind(-1)
        own = log_p[:, theirs]
        rest = log_p.exp().index_fill(-1, theirs, 0.0).sort(-1, descending=True).values
        rest = rest[:, : logits.shape[-1] - len(theirs)]
        tail = log_p.index_fill(-1, theirs, -torch.inf).logsumexp(-1)
        return MatchedTokens(ours.expand(len(states), -1), own, tail, rest)


@torch.no_grad()
def compare_across(
    student: Student, teacher: CrossTokenizerTeacher, corpus: Corpus, logits: Callable[..., Logits]
) -> Quality:
    """Compare a student on its rows with a teacher on the same text in its own tokens: perplexity of each by its own
    tokens; bits per byte, which compare; KL and the share of equal most likely tokens where both have read as much, on
    the tokens that both have and one class for all others.

    logits(model, corpus) are a model's own.
    """
    own, theirs = compare(corpus, len(student.head.rows), logits(student, corpus)), teacher.rows(corpus)
    reference = compare(theirs, len(teacher.teacher.head.rows), logits(teacher.teacher, theirs))
    by_row = torch.zeros(len(corpus.ids), 3, dtype=torch.float64)  # positions, KL, equal top tokens
    ours = teacher.aligner.matched[:, 0].to(student.device)
    with stage("compare tokens", len(corpus.ids), "rows") as done:
        for row in local_indices(len(corpus.ids)):
            ids, counted = corpus.ids[row : row + 1].to(student.device), corpus.mask[row : row + 1, 1:]
            states, heard = teacher.states(ids, counted)
            hidden = student.hidden(ids)[:, :-1][counted.to(student.device)]
            states, hidden = states[heard], hidden[heard]
            for some in chunks(len(hidden), CROSS_COPIES * len(student.head.rows)):
                signal, q = teacher.signal(states[some]), student.head(hidden[some])
                by_row[row, 1] += with_tail_bucket(forward_kl, signal, q).double().sum().cpu()
                top = ours[signal.log_p.argmax(-1)]
                most = signal.others[:, 0] if signal.others.shape[-1] else signal.log_tail.new_zeros(len(q))
                sure = signal.log_p.max(-1).values.exp() > most
                by_row[row, 2] += ((q.argmax(-1) == top) & sure).sum().cpu()
            by_row[row, 0] = len(hidden)
            done()
    all_reduce_sum_([by_row])
    positions, kl, same = by_row.sum(0).tolist()
    return replace(
        own, reference_perplexity=reference.perplexity, reference_bits_per_byte=reference.bits_per_byte,
        kl=kl / max(1.0, positions), top1_agreement=same / max(1.0, positions),
        kl_error=standard_error(by_row[:, 1], by_row[:, 0]),
    )  # fmt: skip


def check_same_vocabulary(
    a: PreTrainedTokenizerBase | None, b: PreTrainedTokenizerBase | None, teacher: Path, student: Path
) -> None:
    """Raises BadInput where the two tokenizers do not give every token the same number."""
    if a is None or b is None:
        return
    ours, theirs = a.get_vocab(), b.get_vocab()
    for token in sorted(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, -1), theirs.get(t, -1))):
        if ours.get(token) != theirs.get(token):
            raise BadInput(
                f"{student}: has another tokenizer than {teacher}: {token!r} is {theirs.get(token)} there and "
                f"{ours.get(token)} here; give a student of the same tokenizer"
            )
