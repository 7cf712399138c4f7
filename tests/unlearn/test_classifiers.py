"""Classifiers of text that are no plain encoder of one class: refused by name, or padded as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ViTConfig, ViTForImageClassification

from calib import BadInput
from tests import encoders
from unlearn import Unlearn, unlearn
from unlearn.data.dataset import read_data
from unlearn.model.model import open_model

CPU = torch.device("cpu")


def table(folder: Path, labels: list[object]) -> Path:
    rows = [{"text": f"good w{i} w2" if i % 2 else "bad", "labels": labels[i % len(labels)]} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


@pytest.mark.parametrize(
    ("names", "more", "labels", "word"),
    [
        (["a", "b"], {"problem_type": "multi_label_classification"}, [["a"], ["a", "b"]], "each row several labels"),
        (["score"], {}, [0.5, 3.0], "each row a number"),
        (["a", "b"], {}, [["a"], ["a", "b"]], "train.jsonl, line 1: its label is a list"),
        (["a", "b"], {}, ["a", float("nan")], "train.jsonl, line 2: its labels holds NaN"),
        (["a", "b"], {}, [0.5, 1], "train.jsonl, line 1: label '0.5' is none"),
    ],
)
def test_other_heads_and_labels_are_refused(
    names: list[str], more: dict[str, object], labels: list[object], word: str, tmp_path: Path
) -> None:
    model = encoders.save(tmp_path / "model", "bert", names, **more)
    options = Unlearn(train=table(tmp_path, labels), forget_lines="2", method="npo", device="cpu")
    with pytest.raises(BadInput, match=word):
        unlearn(model, tmp_path / "out", options)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "train.jsonl"}


def test_heads_of_images_too(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2,
        num_labels=3, problem_type="multi_label_classification",
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    save_file(
        {"pixel_values": torch.randn(4, 3, 4, 4), "labels": torch.tensor([0, 1, 2, 0])}, tmp_path / "x.safetensors"
    )
    with pytest.raises(BadInput, match="each row several labels"):
        unlearn(tmp_path / "model", tmp_path / "out", Unlearn(train=tmp_path / "x.safetensors", forget_lines="1"))


def test_class_1_as_pandas_writes_it(tmp_path: Path) -> None:
    trainable = open_model(encoders.save(tmp_path / "model", "bert", ["a", "b"]), "sequence-classification", device=CPU)
    assert read_data(table(tmp_path, [1.0, "0.0", "b"]), trainable).examples.labels.tolist() == [1, 0, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(("model_type", "side"), [("llama", "left"), ("gpt2", "left"), ("gpt2", "right")])
def test_decoders_are_asked_at_the_last_token_that_is_no_padding(model_type: str, side: str, tmp_path: Path) -> None:
    """A config without a pad token, as such models come."""
    folder = encoders.save(tmp_path / "model", model_type, ["a", "b"], pad_token_id=None)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    trainable = open_model(folder, "sequence-classification", device=CPU)
    found = read_data(table(tmp_path, ["a", "b"]), trainable)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        together = trainable.forward(trainable.state, found.examples)
        texts = [fields["text"] for fields in found.fields]
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    (tmp_path / "out").mkdir()
    trainable.write(tmp_path / "out", trainable.state)
    kept = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert kept.padding_side == ("right" if model_type == "gpt2" else side) and kept.pad_token_id == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.pad_token_id == 0
