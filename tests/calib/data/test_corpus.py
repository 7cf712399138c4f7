from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calib import BadInput, embedded
from calib.data.corpus import Corpus, check_ids, pad_to, sample_rows
from calib.data.load import Sample, load_corpus
from calib.data.prompts import Document, prompt_format
from calib.data.records import read_rows
from calib.data.token_rows import DOCUMENTS_TOGETHER, from_documents, from_tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.MODEL)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def documents_in(file: Path, tokenizer: PreTrainedTokenizerBase | None = None, asked: str = "auto") -> list[Document]:
    form = prompt_format(asked, tokenizer)
    return [form.document(row, f"{file}, {row.place}") for row in read_rows(file)]


def test_packed_rows_are_the_documents_one_after_the_other(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each row begins with the token that the tokenizer puts first, exactly once; nothing else is lost or added."""
    documents = ["def f(x):\n    return x", "the quick brown fox " * 20, "short"]
    corpus = from_documents([Document(d) for d in documents], tokenizer, length=8, source="here")
    ids = [i for d in documents for i in tokenizer(d)["input_ids"]]
    first, position = tokenizer.bos_token_id, 0
    assert corpus.mask.all() and corpus.about["starts_with"] == tokenizer.bos_token
    for row in corpus.ids.tolist():
        assert row[0] == first != row[1]
        here = row if ids[position] == first else row[1:]
        assert here == ids[position : position + len(here)]
        position += len(here)
    assert len(ids) - position < 8


def test_a_text_that_begins_with_bos_has_it_once(tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = from_documents(
        [Document(f"{tokenizer.bos_token}abc def")], tokenizer, length=16, source="here", by_document=True
    )
    assert corpus.ids[0].tolist().count(tokenizer.bos_token_id) == 1


def test_by_document_rows_are_cut_and_padded_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = ["one", "the quick brown fox " * 20, ""]
    corpus = from_documents([Document(d) for d in documents], tokenizer, length=8, source="here", by_document=True)
    assert len(corpus.ids) == 2, "a document of a single token predicts nothing"
    for row, document in enumerate(documents[:2]):
        assert corpus.ids[row][corpus.mask[row]].tolist() == tokenizer(document)["input_ids"][:8]


@pytest.mark.parametrize("by_document", [True, False])
def test_answers_are_told_from_prompts(by_document: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"prompt": "the quick brown fox", "response": " jumps over the lazy dog"}, {"text": "no prompt here"}]
    documents = documents_in(write(tmp_path / "x.jsonl", *records))
    corpus = from_documents(
        documents, tokenizer, length=60 if by_document else 3, source="here", by_document=by_document
    )
    assert corpus.answers is not None
    said = tokenizer.decode(corpus.ids[corpus.answers & corpus.mask], skip_special_tokens=True)
    prompts = tokenizer.decode(corpus.ids[~corpus.answers & corpus.mask], skip_special_tokens=True)
    assert prompts.strip() == "the quick brown fox"
    assert said.strip().startswith("jumps over the lazy") and "quick" not in said
    assert corpus[:1].answers is not None
    plain = from_documents(documents[1:], tokenizer, length=3, source="here", by_document=by_document)
    assert plain.answers is None


def test_samples_are_rows_without_repetition_and_follow_the_seed() -> None:
    ids = torch.arange(40).view(10, 4)
    corpus = Corpus(ids, torch.ones_like(ids, dtype=torch.bool), "here", None)
    some = sample_rows(corpus, 6, seed=1)
    assert len(set(some.ids[:, 0].tolist())) == 6
    assert torch.equal(some.ids, sample_rows(corpus, 6, seed=1).ids)
    assert some.fingerprint == sample_rows(corpus, 6, seed=1).fingerprint != sample_rows(corpus, 6, seed=2).fingerprint
    with pytest.raises(BadInput, match=r"gives 10 rows.*11 were asked for"):
        sample_rows(corpus, 11, seed=1)


def test_token_files(tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "x.safetensors")
    corpus = load_corpus(tmp_path / "x.safetensors", None, vocab=12, length=5)
    assert torch.equal(corpus.ids, ids[:, :5]) and corpus.mask.sum() == 9
    save_file({"input_ids": ids, "attention_mask": mask.flip(1).contiguous()}, tmp_path / "left.safetensors")
    with pytest.raises(BadInput, match="padding on the right"):
        from_tokens(tmp_path / "left.safetensors", length=5)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "x.txt", "is empty"),
        (b"   \n", "x.txt", "is empty"),
        (b"abc \xff\xfe", "x.txt", "byte 4 is not UTF-8"),
        (b'{"text": "a"}\n{"text": \n', "x.jsonl", "line 2: not JSON"),
        (b'{"text": "a"}\n\n{"txt": "a"}\n', "x.jsonl", "line 3: has none of the fields"),
        (b'{"text": "a\\ud800"}\n', "x.jsonl", "line 1: has half a surrogate pair"),
        (b"[1]\n", "x.jsonl", "line 1: has none of the fields"),
        (b"too short", "x.txt", "too short"),
        (b"not safetensors", "x.safetensors", "not a safetensors file"),
    ],
)
def test_bad_files_are_named_with_the_place(
    content: bytes, name: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        load_corpus(tmp_path / name, tokenizer, vocab=2048, length=64)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match=r"gone\.txt.*No such file"):
        load_corpus(tmp_path / "gone.txt", tokenizer, vocab=9, length=4)


def test_token_ids_beyond_the_vocabulary_are_placed() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 9, 4]])
    with pytest.raises(BadInput, match=r"token id 9 \(row 1, position 1\).*vocabulary of 9"):
        check_ids(Corpus(ids, ids >= 0, "here", None), 9)


def test_embedded_parts_do_not_overlap_and_training_text_is_long_enough() -> None:
    train, held_out = (embedded.python_topics(part) for part in ("train", "held-out"))
    assert not set(train) & set(held_out)
    assert sum(map(len, train)) > 200_000 and sum(map(len, held_out)) > 10_000


def test_line_separators_inside_a_string_are_not_line_ends(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\u2029d"
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert documents_in(file) == [Document(text)]


@pytest.mark.parametrize("text", ["one two three", "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 end", "  a\n\n b "])
def test_each_token_stands_for_bytes_of_its_own(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Summed over a document they are its bytes; a start token stands for none, a character counts once."""
    corpus = from_documents([Document(text)] * 2, tokenizer, length=64, source="here", by_document=True)
    assert corpus.token_bytes is not None
    assert corpus.token_bytes.sum(1).tolist() == [len(text.encode())] * 2
    assert corpus.token_bytes[:, 0].tolist() == [0, 0]
    packed = from_documents([Document(text)] * 8, tokenizer, length=8, source="here")
    for row, counts in zip(packed.ids, packed.token_bytes, strict=True):  # type: ignore[arg-type]
        shown = tokenizer.decode([i for i in row.tolist() if i != tokenizer.bos_token_id])
        assert abs(int(counts.sum()) - len(shown.encode())) <= 3 * ("\ufffd" in shown) * 4, (shown, counts)


def test_only_as_much_of_a_file_is_used_as_rows_want(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drawn rows are of the whole file, differ with the seed, and none comes twice; the first rows are the first."""
    lines = [{"text": f"number {i} of many, and some words to fill a row of its own {i * i}"} for i in range(60_000)]
    file = write(tmp_path / "x.jsonl", *lines)
    vocab = len(tokenizer)
    some = load_corpus(file, tokenizer, vocab=vocab, length=16, rows=Sample(40, 0))
    assert 40 <= len(some.ids) < 100 and torch.equal(
        some.ids, load_corpus(file, tokenizer, vocab=vocab, length=16, rows=Sample(40, 0)).ids
    )
    numbers = [
        int(found[1]) for text in tokenizer.batch_decode(some.ids) if (found := re.search(r"number (\d+) of", text))
    ]
    assert len(set(numbers)) == len(numbers) and min(numbers) < 15_000 and max(numbers) > 45_000
    other = load_corpus(file, tokenizer, vocab=vocab, length=16, rows=Sample(40, 1))
    assert some.fingerprint != other.fingerprint
    first = load_corpus(file, tokenizer, vocab=vocab, length=16, rows=3)
    whole = from_documents([Document(str(line["text"])) for line in lines[:40]], tokenizer, length=16, source="here")
    assert torch.equal(first.ids[:3], whole.ids[:3])


def test_rows_drawn_from_a_long_text_are_pieces_of_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(f"line {i} says {i * 7919 % 10007}\n" for i in range(400_000))
    assert len(text) > 2**22
    (tmp_path / "x.txt").write_text(text)
    some = load_corpus(tmp_path / "x.txt", tokenizer, vocab=len(tokenizer), length=32, rows=Sample(20, 3))
    assert len(some.ids) >= 20
    for row in tokenizer.batch_decode(some.ids[:, 1:]):
        assert row in text
    starts = [text.index(row) / len(text) for row in tokenizer.batch_decode(some.ids[:, 1:])]
    assert min(starts) < 0.3 and max(starts) > 0.7


@pytest.mark.parametrize("by_document", [False, True])
def test_spans_of_characters_become_spans_of_tokens(
    by_document: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each token of a span reaches into it, neighbouring spans stay apart, and rows keep theirs."""
    texts = ["the cat sat on the mat", "a dog ran"]
    given = [[[4, 11], [11, 14]], [[2, 5]]]
    file = tmp_path / "some.jsonl"
    lines = [json.dumps({"text": t, "spans": s}) for t, s in zip(texts, given, strict=True)]
    file.write_text("\n".join(lines))
    corpus = load_corpus(file, tokenizer, vocab=10**6, length=8, by_document=by_document)
    assert corpus.spans is not None and corpus.spans.shape == corpus.ids.shape
    numbers = corpus.spans[corpus.mask]
    assert set(numbers.tolist()) <= {-1, 0, 1, 2}
    if by_document:
        offsets = [tokenizer(t, return_offsets_mapping=True)["offset_mapping"][:8] for t in texts]
        first = {0: 0, 1: 2}
        for row, some in enumerate(offsets):
            for place, (start, end) in enumerate(some):
                inside = [
                    first[row] + i for i, (a, b) in enumerate(given[row]) if any(a <= c < b for c in range(start, end))
                ]
                assert int(corpus.spans[row, place]) == (inside[0] if inside else -1)
        assert torch.equal(pad_to(corpus, 12).spans[:, 8:], torch.full((2, 4), -1))  # type: ignore[index]
    assert corpus[:1].fingerprint != replace(corpus[:1], spans=None).fingerprint


@pytest.mark.parametrize("spans", [[[3]], [[0, 100]], [[4, 2]], [[2, 6], [4, 8]], [["a", 3]], 7, [[True, 3]]])
def test_spans_that_are_none_are_refused(spans: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps({"text": "the cat sat", "spans": spans}))
    with pytest.raises(BadInput, match=r"line 1: span .* must be \[start, end\]"):
        load_corpus(file, tokenizer, vocab=10**6, length=8)


@pytest.mark.parametrize("characters", [DOCUMENTS_TOGETHER - 5, DOCUMENTS_TOGETHER, DOCUMENTS_TOGETHER + 5])
def test_the_last_document_may_fill_what_is_tokenized_together(
    characters: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = ("some words " * DOCUMENTS_TOGETHER)[:characters]
    whole = tokenizer(text)["input_ids"]
    corpus = from_documents([Document(text)], tokenizer, length=128, source="text", by_document=True)
    assert corpus.ids[0].tolist() == whole[:128] and corpus.about["cut_tokens"] == len(whole) - 128
