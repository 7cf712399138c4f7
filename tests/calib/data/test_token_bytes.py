"""Bytes of tokens, and tokens of two tokenizers that meet, beside what the library decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from calib import BadInput
from calib.data.token_bytes import TokenAligner, token_bytes

TEXT = ["the quick brown fox jumps over the lazy dog. " * 3, "Größe, naïve, 東京 und 🙂🙃.", "1 + 1 = 2\n\n  indented"]
WORDS = st.text(st.sampled_from("the fox ÄÖß 東京🙂\n.,12"), min_size=1, max_size=30)  # also with a space first


def byte_level(size: int, bos: bool) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>")


def pieces(size: int) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: ▁ for spaces, one of them put first, bytes for what is no piece."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog. " * 9], trainer)
    import json

    made = json.loads(trained.to_str())
    made["model"] |= {"byte_fallback": True, "fuse_unk": True}
    made["added_tokens"] = made["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


EVERY = {
    "byte-level": byte_level(330, False),
    "byte-level with a first token": byte_level(400, True),
    "pieces": pieces(330),
}


@pytest.mark.parametrize("name", EVERY)
@given(text=WORDS)
@settings(max_examples=60, deadline=None)
def test_the_bytes_of_tokens_add_up_to_the_text(name: str, text: str) -> None:
    tokenizer = EVERY[name]
    own = token_bytes(tokenizer, name)
    ids = tokenizer(text).input_ids
    joined = b"".join(own[i] for i in ids)
    assert joined.decode() == (" " if name == "pieces" else "") + text
    assert not any(own[i] for i in tokenizer.all_special_ids)


def aligner(ours: Any, theirs: Any) -> TokenAligner:
    return TokenAligner(ours, theirs, (len(ours), len(theirs)), ("student", "teacher"))


@pytest.mark.parametrize("ours", EVERY)
@pytest.mark.parametrize("theirs", EVERY)
@given(text=WORDS)
@settings(max_examples=25, deadline=None)
def test_positions_are_those_at_which_both_have_read_the_same(ours: str, theirs: str, text: str) -> None:
    """Against every pair of prefixes, as bytes."""
    a, b = EVERY[ours], EVERY[theirs]
    ids = torch.tensor([*a(text).input_ids, a.eos_token_id])
    found = aligner(a, b).aligned(ids, 1000)
    assert found.ids.tolist() == b(text).input_ids

    def read(tokenizer: Any, row: list[int]) -> list[bytes]:
        own, extra = token_bytes(tokenizer, ""), 1 if tokenizer is EVERY["pieces"] else 0
        return [b"".join(own[i] for i in row[: n + 1])[extra:] for n in range(len(row))]

    mine, other = read(a, ids.tolist()), read(b, found.ids.tolist())
    for i, j in enumerate(found.positions.tolist()):
        meeting = [n for n, prefix in enumerate(other) if prefix == mine[i]]
        if mine[i + 1] == mine[i] and i + 2 < len(ids):
            continue
        assert j == (meeting[-1] if meeting else -1)
    assert int(found.sizes.sum()) == len(text.encode())
    assert int(found.positions[-1]) == len(found.ids) - 1, "the end of the text is where both have read all of it"


def test_matched_tokens_stand_for_the_same_bytes() -> None:
    a, b = EVERY["byte-level"], EVERY["pieces"]
    pairs = aligner(a, b).matched.tolist()
    mine, other = token_bytes(a, ""), token_bytes(b, "")
    assert [a.eos_token_id, b.eos_token_id] in pairs and len({j for _, j in pairs}) == len(pairs) > 100
    assert all(mine[i] == other[j] for i, j in pairs if i != a.eos_token_id)
    theirs = dict(pairs)[a.convert_tokens_to_ids("f")]
    assert b.convert_ids_to_tokens(theirs) == "f", "and not <0x66>, which no text is written with"


def test_what_breaks_off_and_what_is_beyond_the_room() -> None:
    a, b = EVERY["byte-level"], EVERY["pieces"]
    ids = torch.tensor(a("the fox 東").input_ids)
    cut = aligner(a, b).aligned(ids[:-1], 1000)
    assert b.decode(cut.ids, skip_special_tokens=True) == "the fox "
    short = aligner(a, b).aligned(ids, 3)
    assert len(short.ids) == len(short.sizes) == 3 and short.positions.max() <= 2


def test_tokenizers_that_change_the_text_or_do_not_tell_are_refused(tmp_path: Path) -> None:
    lower = byte_level(300, False)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BadInput, match=r"teacher: its tokenizer changes the text \('The fox'...\)"):
        aligner(EVERY["pieces"], lower).aligned(torch.tensor(EVERY["pieces"]("The fox").input_ids), 99)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(BadInput, match="neither byte-level nor SentencePiece"):
        aligner(plain, lower)
