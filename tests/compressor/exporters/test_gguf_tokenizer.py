"""A tokenizer in GGUF cuts up text as it did: how text is cut beforehand has llama.cpp's name or the export is refused,
and scores lead to the merges that the tokenizer makes."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calib import BadInput, embedded
from compressor import Export, export
from compressor.exporters import gguf_pre_tokenizers
from compressor.exporters.gguf_pre_tokenizers import CHECK_TEXT, PRE_TOKENIZERS, name_of
from compressor.exporters.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, token_columns
from tests import tiny

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

CHECK_TEXT_SHA256 = "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
WORDS = ["Once upon a time, there was a girl named Lily. She said 3 times: What's up? 12345 cats, 99 dogs."] * 20
# As Mistral's tekken cuts, which is none of llama.cpp's patterns with another vocabulary's hash.
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}]+|\p{N}|\s+"


def byte_level(*before: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 300 tokens that cuts up text as it is told."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def model_with(tokenizer: PreTrainedTokenizerFast | None, folder: Path, rows: int = 320) -> Path:
    config = tiny.config_of("llama", vocab_size=rows, attention_bias=False, mlp_bias=False)
    tiny.model_of(config, dtype=torch.float32).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def fields_of(dst: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(dst / "model.gguf").fields.items()}


# How text is cut up.


def test_the_table_is_llama_cpp_s() -> None:
    """Its text, to the last sign, and names as they are spelled there."""
    assert sha256(CHECK_TEXT.encode()).hexdigest() == CHECK_TEXT_SHA256
    assert len(PRE_TOKENIZERS) == 96 and all(re.fullmatch("[0-9a-f]{64}", key) for key in PRE_TOKENIZERS)
    assert {"llama-bpe", "qwen2", "tekken", "smollm", "gpt-2", "deepseek-v3"} <= set(PRE_TOKENIZERS.values())


def test_an_unknown_pattern_is_refused(tmp_path: Path) -> None:
    """It was once taken for Qwen's."""
    tokenizer = byte_level(pre_tokenizers.Split(Regex(TEKKEN), "isolated"))
    model = model_with(tokenizer, tmp_path / "model")
    with pytest.raises(BadInput, match=r"tokenizer.json: cuts up text in a way that llama.cpp b11434 has no name for"):
        export(model, tmp_path / "dst", Export(to="gguf", held_out=0))
    assert not (tmp_path / "dst").exists()
    for file in model.glob("tokenizer*"):
        file.unlink()
    report = export(model, tmp_path / "dst", Export(to="gguf", held_out=0))  # what the line advises
    assert fields_of(tmp_path / "dst")["tokenizer.ggml.model"] == "no_vocab"
    assert "token ids" in report["loaders"]["notes"][0]


def test_a_known_hash_gives_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(pre_tokenizers.Split(Regex(TEKKEN), "isolated"))
    ids = [str(i) for i in tokenizer.encode(CHECK_TEXT)]
    found = sha256(f"[{', '.join(ids)}]".encode()).hexdigest()
    monkeypatch.setattr(gguf_pre_tokenizers, "PRE_TOKENIZERS", {found: "tekken"})
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert name_of(tokenizer, content) == "tekken"
    other = byte_level(pre_tokenizers.Digits(individual_digits=True))
    with pytest.raises(BadInput, match="has no name for"):
        name_of(other, json.loads(other.backend_tokenizer.to_str()))


def test_the_pattern_of_gpt2_is_known_whatever_was_learned(tmp_path: Path) -> None:
    model = model_with(byte_level(), tmp_path / "model")
    export(model, tmp_path / "dst", Export(to="gguf", held_out=0))
    fields = fields_of(tmp_path / "dst")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    # Rows without a token.
    assert len(fields["tokenizer.ggml.tokens"]) == 320 and fields["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    types = fields["tokenizer.ggml.token_type"]
    assert types[:2] == [CONTROL, CONTROL] and set(types[2:300]) == {NORMAL} and set(types[300:]) == {UNUSED}


def test_the_pattern_that_a_model_of_qwen_gives_its_tokenizer(tmp_path: Path) -> None:
    """The library cuts up text as Qwen does beside a model of that type, whatever the file says."""
    config = tiny.config_of("qwen2", vocab_size=320)
    tiny.model_of(config, dtype=torch.float32).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert name_of(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())) == "qwen2"


def test_the_embedded_tokenizer_comes_back(tmp_path: Path) -> None:
    """As transformers reads it from the file."""
    export(embedded.MODEL, tmp_path / "dst", Export(to="gguf", held_out=0))
    before = AutoTokenizer.from_pretrained(embedded.MODEL)
    after = AutoTokenizer.from_pretrained(tmp_path / "dst", gguf_file="model.gguf")
    for text in (*WORDS[:1], CHECK_TEXT, "  a\tb\n\n c"):
        ids = before(text, add_special_tokens=False)["input_ids"]
        assert after(text, add_special_tokens=False)["input_ids"] == ids
    fields = fields_of(tmp_path / "dst")
    assert fields["tokenizer.ggml.bos_token_id"] == before.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == before.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False


# Vocabularies.


def piecewise(added: list[dict[str, Any]], tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    model = {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": merges,
    }  # fmt: skip
    return {"added_tokens": [{"special": False} | token for token in added], "model": model}


def test_types_and_scores() -> None:
    tokens = ["<unk>", "<s>", "<0x41>", "a", "b", "c", "ab", "abc", "▁▁", "<|im|>"]
    added: list[dict[str, Any]] = [
        {"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True},
        {"id": 8, "content": "▁▁"}, {"id": 9, "content": "<|im|>"},
    ]  # fmt: skip
    content = piecewise(added, tokens, [["a", "b"], ["ab", "c"]])
    names, types, scores = token_columns(content, "llama", 12)
    assert names == [*tokens[:8], "  ", "<|im|>", "[PAD10]", "[PAD11]"]
    assert types == [UNKNOWN, CONTROL, BYTE, *[NORMAL] * 5, USER_DEFINED, CONTROL, UNUSED, UNUSED]
    assert scores[6] == 0 and scores[7] == -1 and max(scores[:6] + scores[8:]) < -1e5
    content["model"]["merges"] = ["a b", "ab c"]  # as older files have them
    assert token_columns(content, "llama", 12) == (names, types, scores)


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    content = piecewise([], ["<unk>", "a", "b"], [])
    with pytest.raises(BadInput, match="has 3 tokens, and the embedding 2 rows") as refused:
        token_columns(content, "llama", 2)
    assert "\n" not in str(refused.value)


def test_tokens_added_beyond_the_embedding_are_left_out_and_said(tmp_path: Path) -> None:
    """As Gemma 3 has one for images beside a text model."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    report = export(model_with(tokenizer, tmp_path / "model", 300), tmp_path / "dst", Export(to="gguf", held_out=0))
    assert report["loaders"]["notes"] == ["added tokens that the embedding has no row for are left out: <image>"]
    assert "<image>" not in fields_of(tmp_path / "dst")["tokenizer.ggml.tokens"]


# Scores: what sentencepiece's rule makes of them, beside the tokenizer itself.


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """Slowly: of all neighbours the pair whose result scores best, the first of equals, until none is a token."""
    parts = list(text)
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="abcdehilnorst .,T", min_size=1, max_size=30))
def test_scores_lead_to_the_tokenizer_s_merges(stories_tokens: tuple[Any, dict[str, float]], text: str) -> None:
    tokenizer, scores = stories_tokens
    want = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert joined("▁" + text.replace(" ", "▁"), scores) == want


@pytest.fixture(scope="module")
def stories_tokens() -> tuple[Any, dict[str, float]]:
    if not os.environ.get("PAREWELL_DATA"):
        pytest.skip("PAREWELL_DATA is not set: no real tokenizer here")
    tokenizer = AutoTokenizer.from_pretrained(Path(os.environ["PAREWELL_DATA"]) / "stories260k")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names, types, scores = token_columns(content, "llama", 512)
    return tokenizer, {t: s for t, of, s in zip(names, types, scores, strict=True) if of == NORMAL}
