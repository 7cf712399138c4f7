"""The bytes that each token of a vocabulary stands for, and where two tokenizers' tokens of one text meet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from calib import BadInput
from calib.data.token_rows import encoded_by

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"  # what stands for a space in SentencePiece's tokens


def token_bytes(tokenizer: PreTrainedTokenizerBase, source: str) -> list[bytes]:
    """The bytes of every id; none for special tokens, and for ids that no token has.

    Raises BadInput, naming the `source`, for a tokenizer that is neither byte-level (GPT-2, Llama 3, Qwen) nor
    SentencePiece (Llama 2, Gemma, Mistral), or has no tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInput(f"{source}: its tokenizer does not say which bytes a token has; give the model's tokenizer.json")
    parts = json.loads(backend.to_str())
    kind = json.dumps([parts[part] for part in ("decoder", "pre_tokenizer", "normalizer")], ensure_ascii=False)
    special, found = set(tokenizer.all_special_ids), dict[int, bytes]()
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    by_byte = {sign: byte for byte, sign in bytes_to_unicode().items()}
    pieces = SPACE in kind or "Metaspace" in kind
    if not pieces and "ByteLevel" not in kind:
        raise BadInput(f"{source}: its tokenizer is neither byte-level nor SentencePiece; leave out --align-tokens")
    for token, i in tokenizer.get_vocab().items():
        if i in special:
            continue
        if i in added:
            found[i] = added[i].encode()
        elif pieces:
            byte = _BYTE.fullmatch(token)
            found[i] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        else:
            found[i] = bytes(by_byte[sign] for sign in token if sign in by_byte)
    return [found.get(i, b"") for i in range(max(tokenizer.get_vocab().values()) + 1)]


@dataclass(frozen=True)
class AlignedRow:
    """A row's text as another tokenizer has it: ids (S,); of each position (T - 1,) of the given row the position there
    that has read as much, or -1; and how many bytes each of its tokens stands for (S,)."""

    ids: Tensor
    positions: Tensor
    sizes: Tensor


class TokenAligner:
    """Two tokenizers, whose tokens of one text are aligned where both have read the same bytes.

    matched (k, 2) has the pairs of ids, student's and teacher's, that stand for the same bytes, and the pair of end
    tokens.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab: tuple[int, int],
        sources: tuple[str, str],
    ) -> None:  # fmt: skip
        """vocab: how many ids each model has; sources name the two in messages.  Raises BadInput where a tokenizer does
        not tell its tokens' bytes, or no token is common."""
        self._tokenizers, self._sources = (student, teacher), sources
        self._bytes = [token_bytes(each, source) for each, source in zip((student, teacher), sources, strict=True)]
        firsts = list[dict[bytes, int]]()
        for tokenizer, of, size in zip((student, teacher), self._bytes, vocab, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(of)))))
            bare = [bool(_BYTE.fullmatch(str(token))) for token in tokens]
            firsts.append({})
            for i in sorted(range(len(tokens)), key=lambda i: bare[i]):  # a model writes "a", and hardly ever "<0x61>"
                if of[i]:
                    firsts[-1].setdefault(of[i], i)
        self._prefixed = [self._puts_space_first(side) for side in (0, 1)]
        pairs = [(i, firsts[1][own]) for own, i in firsts[0].items() if own in firsts[1]]
        ends = student.eos_token_id, teacher.eos_token_id
        if ends[0] is not None and ends[1] is not None:
            pairs.append((ends[0], ends[1]))
        if not pairs:
            raise BadInput(
                f"{sources[0]}: has no token in common with {sources[1]}; give a student of a nearer tokenizer"
            )
        self.matched = torch.tensor(sorted(set(pairs)))

    def _puts_space_first(self, side: int) -> bool:
        """Whether a tokenizer begins each text with a space that is none of the text's, as SentencePiece does."""
        ids = self._tokenizers[side]("a", add_special_tokens=False).input_ids
        return b"".join(self._bytes[side][i] for i in ids) == b" a"

    def _ends(self, side: int, ids: Sequence[int]) -> tuple[bytes, list[int]]:
        """The bytes of ids, without the space that SentencePiece puts first, and how many each prefix has."""
        own = [self._bytes[side][i] if i < len(self._bytes[side]) else b"" for i in ids]
        text = b"".join(own)
        ends = list(accumulate(map(len, own)))
        if self._prefixed[side] and text.startswith(b" "):
            return text[1:], [max(0, end - 1) for end in ends]
        return text, ends

    def aligned(self, ids: Tensor, room: int) -> AlignedRow:
        """The teacher's ids of the text that a student's row (T,) stands for, at most `room` of them, and where both
        have read as much of it.

        A text that breaks off within a character, as a row that is cut may, counts up to there. Raises BadInput where
        the teacher's tokenizer changes the text, so that bytes cannot be counted.
        """
        row = ids.tolist()
        text, ends = self._ends(0, row)
        whole = text[: _sound(text)].decode()
        coded = encoded_by(self._tokenizers[1], [whole], source=self._sources[1])["input_ids"][0]
        again, theirs = self._ends(1, coded)
        if again != whole.encode():
            raise BadInput(
                f"{self._sources[1]}: its tokenizer changes the text ({whole[:30]!r}...), so its tokens cannot be "
                "aligned with others; leave out --align-tokens"
            )
        last = len(coded)
        while last and not self._bytes[1][coded[last - 1]]:  # end tokens
            last -= 1
        reached = {end: j for j, end in enumerate(theirs[: min(last, room)])}
        positions = torch.full((len(row) - 1,), -1)
        end = self._tokenizers[0].eos_token_id
        for i, after in enumerate(row[1:]):
            tells = ends[i + 1] > ends[i] or (after == end and ends[i] == len(text))
            if tells:
                positions[i] = reached.get(ends[i], -1)
        sizes = torch.tensor([0, *theirs], dtype=torch.int32).diff()
        return AlignedRow(torch.tensor(coded[:room], dtype=torch.int64), positions, sizes[:room])


def _sound(text: bytes) -> int:
    """How many bytes there are before the first that is no UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)
