"""How long rows may be, and how many are drawn where nobody says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from calib import BadInput, embedded
from calib.data.rows import OFFSET, draw_rows, positions_of, row_length

UNBUILT = {"layoutlmv3", "lilt", "luke", "markuplm"}  # which want more than ids
ABSOLUTE = ["bert", "gpt2", "distilbert", "opt", "electra", *sorted(OFFSET - UNBUILT)]


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_a_model_runs_at_as_many_positions_as_it_has_and_not_at_one_more(model_type: str) -> None:
    """Against the library's own classes, with embeddings of 20 positions."""
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 20, "pad_token_id": 1, "attention_window": 4, "position_embedding_type": "absolute",
    }  # fmt: skip
    if model_type == "data2vec-text":
        sizes |= {"type_vocab_size": 1}
    if model_type == "opt":
        sizes |= {"ffn_dim": 16, "word_embed_proj_dim": 16}
    if model_type == "xmod":
        sizes |= {"default_language": "en_XX"}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModel.from_config(config).eval()
    most = positions_of(config)
    assert most is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.parametrize(
    ("asked", "positions", "length"),
    [(None, None, 512), (None, 64, 64), (None, 4096, 512), (64, 64, 64), (700, None, 700)],
)
def test_lengths(asked: int | None, positions: int | None, length: int) -> None:
    assert row_length(asked, positions) == length


def test_more_than_a_model_has_positions_is_refused() -> None:
    with pytest.raises(BadInput, match="length is 65; the model has 64 positions"):
        row_length(65, 64)


@dataclass
class How:
    data: Path | None
    samples: int | None = None
    length: int | None = 16
    by_document: bool = False
    prompt_format: str = "auto"
    held_out: int | None = None
    held_out_data: Path | None = None
    seed: int = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.MODEL)


def text(folder: Path, rows: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A text of so many rows of sixteen tokens."""
    file = folder / "x.txt"
    words = "".join(f"{i} words and {i * 7}\n" for i in range(40 * rows))
    ids = tokenizer(words, add_special_tokens=False)["input_ids"][: rows * 15 + 3]
    file.write_text(tokenizer.decode(ids))
    return file


@pytest.mark.parametrize(
    ("rows", "options", "counts"),
    [
        (200, {}, (128, 16)),  # enough for the defaults
        (118, {}, (105, 13)),  # shared out as it would have been
        (10, {}, (8, 2)),
        (60, {"held_out": 20}, (40, 20)),
        (60, {"samples": 50}, (50, 10)),
        (60, {"samples": 50, "held_out": 10}, (50, 10)),
    ],
)
def test_defaults_take_what_there_is(
    rows: int, options: dict[str, int], counts: tuple[int, int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = text(tmp_path, rows, tokenizer)
    some, held_out = draw_rows(tmp_path, tokenizer, len(tokenizer), How(data, **options), samples=128)  # type: ignore[arg-type]
    assert (len(some.ids), len(held_out.ids)) == counts
    assert some.about.get("fewer_than") == (128 if "samples" not in options and counts[0] < 128 else None)
    both = {tuple(row) for row in some.ids.tolist()} & {tuple(row) for row in held_out.ids.tolist()}
    assert not both, "no row is both calibrated on and measured on"


@pytest.mark.parametrize(("rows", "options"), [(7, {}), (60, {"samples": 59}), (60, {"samples": 55, "held_out": 6})])
def test_what_is_asked_for_outright_is_given_or_refused(
    rows: int, options: dict[str, int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = text(tmp_path, rows, tokenizer)
    with pytest.raises(BadInput, match=rf"gives {rows} rows of up to 16 tokens, \d+ were asked for"):
        draw_rows(tmp_path, tokenizer, len(tokenizer), How(data, **options), samples=128)  # type: ignore[arg-type]
