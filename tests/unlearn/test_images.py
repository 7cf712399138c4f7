"""What DMM was measured on, small: classifiers of images (ResNet, ViT) with rows in a directory of images by class, and
BERT on SST-2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from calib import BadInput
from tests import classifiers
from tests.unlearn.test_batchnorm import alone
from unlearn import Unlearn, unlearn
from unlearn.data.dataset import read_data, union
from unlearn.data.selection import by_field, by_file, by_ids, by_lines
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import open_model
from unlearn.model.training_recipe import Training

pytest.importorskip("PIL", reason="needs the extra images")
CPU = torch.device("cpu")
HOW = {"epochs": 3, "batch": 8, "lr": 0.05}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models, and 40 pictures in directories of their classes."""
    root = tmp_path_factory.mktemp("site")
    for kind in ("resnet", "vit"):
        classifiers.save(kind, root / kind)
    classifiers.save_folder(root / "train", 40)
    classifiers.save_folder(root / "validation", 20, seed=1)
    (root / "training.json").write_text(json.dumps(HOW))
    return root


def tensors_of(site: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels and classes in the order of files, by Pillow alone."""
    from numpy import array
    from PIL import Image

    files = sorted((site / "train").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(array(Image.open(f)))[None].float() for f in files]) / 127.5 - 1
    names = {name: number for number, name in classifiers.NAMES.items()}
    return pixels, torch.tensor([names[f.parent.name] for f in files]), [f"{f.parent.name}/{f.name}" for f in files]


def test_rows_are_pixels_of_files_known_by_content_name_and_class(site: Path, tmp_path: Path) -> None:
    trainable = open_model(site / "vit", "image-classification", device=CPU)
    found, (pixels, labels, names) = read_data(site / "train", trainable), tensors_of(site)
    assert torch.allclose(found.examples.inputs["pixel_values"], pixels, atol=1e-6)
    assert found.examples.labels.tolist() == labels.tolist()
    assert [fields["file"] for fields in found.fields] == names
    assert by_field(found, "class=left") == [i for i, name in enumerate(names) if name.startswith("left/")]
    assert by_field(found, f"file={names[7]}") == by_lines(found, "7") == [7]
    (tmp_path / "ids.txt").write_text(f"{names[3]}\n{names[11]}\n")
    assert by_ids(found, tmp_path / "ids.txt", "file") == [3, 11]
    for row, other in ((5, "z.png"), (9, "a.png")):  # under other names, not in their order
        place = tmp_path / "forget" / names[row].split("/")[0]
        place.mkdir(parents=True, exist_ok=True)
        (place / other).write_bytes((site / "train" / names[row]).read_bytes())
    asked = read_data(tmp_path / "forget", trainable)
    assert by_file(found, asked) == [5, 9]
    assert found.shown(5) == f"row 5 ({names[5]} | {names[5].split('/')[0]})"
    both = union(asked, found)
    assert both.lines(range(len(both))) == 42, "rows that count from 0 keep numbers of their own"
    with pytest.raises(BadInput, match="2 of 2 rows are not in"):
        by_file(read_data(site / "validation", trainable), asked)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_directory_is_unlearned_as_its_tensors_are(kind: str, site: Path, tmp_path: Path) -> None:
    """By matching what gradients predict, scaled by models trained without other rows; the same bytes, and running
    statistics stay."""
    _, labels, _ = tensors_of(site)
    trainable = open_model(site / kind, "image-classification", device=CPU)
    save_file(
        {"inputs": read_data(site / "train", trainable).examples.inputs["pixel_values"], "labels": labels},
        tmp_path / "t.safetensors",
    )
    given: dict[str, Any] = {"training": site / "training.json", "forget_lines": "0-4", "method": "dmm", "calibrate": 2}
    made = {}
    for name, train in (("files", site / "train"), ("tensors", tmp_path / "t.safetensors")):
        options = Unlearn(train=train, epochs=2, **given)
        report = unlearn(site / kind, tmp_path / name, options, allow_damage=True)
        assert report["rows"] == {"train": 40, "forget": 5} and report["scale"]["raw"]
        made[name] = AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict()
    assert all(torch.equal(tensor, made["tensors"][name]) for name, tensor in made["files"].items())
    before = AutoModelForImageClassification.from_pretrained(site / kind).state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, made["files"][name])]
    assert moved and not any("running" in name for name in moved)


def test_resnet_18_is_retrained_by_its_own_statistics(site: Path, tmp_path: Path) -> None:
    """Two basic blocks in each of four stages, on what a directory has beside the forgotten class: torch's loop. The
    last maps are one pixel, whose statistics over a batch blow up last digits, so steps are few and small."""
    how = {"epochs": 2, "batch": 12, "lr": 0.005}
    (tmp_path / "how.json").write_text(json.dumps(how))
    classifiers.save("resnet", tmp_path / "model", depths=[2, 2, 2, 2], hidden_sizes=[4, 4, 6, 8])
    options = Unlearn(
        train=site / "train", validation=site / "validation", forget_where="class=top", method="retrain",
        training=tmp_path / "how.json",
    )  # fmt: skip
    unlearn(tmp_path / "model", tmp_path / "out", options, allow_damage=True)
    trainable = open_model(tmp_path / "model", "image-classification", device=CPU)
    rows = read_data(site / "train", trainable).examples
    torch.manual_seed(0)
    fresh = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    expected = alone(fresh, 0, rows, rows.labels != 2, Training(**how)).state_dict()  # type: ignore[arg-type]
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(made[name], tensor, atol=2e-5), name
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == classifiers.SIZE


def small_bert(folder: Path, sentences: list[str]) -> Path:
    """Two layers and a word for each that the sentences have, trained on them by nobody yet."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({w for text in sentences for w in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif("PAREWELL_DATA" not in os.environ, reason="needs SST-2 in PAREWELL_DATA")
def test_bert_forgets_rows_of_sst_2(tmp_path: Path) -> None:
    """80 rows, ten of them with a wrong label that the model has learned. Every method makes it doubt these ten, and
    matching the answers of a model that never saw them at least a quarter as much as that model does."""
    head, *rows = (Path(os.environ["PAREWELL_DATA"]) / "glue/SST-2/train.tsv").read_text().splitlines()[:81]
    wrong = [f"{row[:-1]}{1 - int(row[-1])}" for row in rows[:10]]
    (tmp_path / "train.tsv").write_text("\n".join([head, *wrong, *rows[10:]]) + "\n")
    (tmp_path / "forget.tsv").write_text("\n".join([head, *wrong]) + "\n")
    how = {"optimiser": "adamw", "epochs": 10, "batch": 10, "lr": 3e-3, "decay": 0.0}
    (tmp_path / "training.json").write_text(json.dumps(how))
    model = small_bert(tmp_path / "model", [row.split("\t")[0] for row in rows])
    trainable = open_model(model, "sequence-classification", device=CPU)
    data = read_data(tmp_path / "train.tsv", trainable).examples
    everything = torch.ones(1, len(data), dtype=torch.bool)
    trained = train_ensemble(trainable.one(), data, everything, [5], Training(**how))  # type: ignore[arg-type]
    trainable.write(model, {name: p[0] for name, p in trained.params.items()})
    nats: dict[str, float] = {}
    given: dict[str, Any] = {"train": tmp_path / "train.tsv", "forget": tmp_path / "forget.tsv"}
    learns: dict[str, Any] = {"training": tmp_path / "training.json"}
    moves = learns | {"lr": 1e-3}
    by_method: dict[str, dict[str, Any]] = {
        "retrain": learns, "oracle-matching": moves, "dmm": moves | {"estimator": "folds", "multiplier": 1.0},
    }  # fmt: skip
    for method, more in by_method.items():
        options = Unlearn(method=method, **given, **more)
        report = unlearn(model, tmp_path / method, options, allow_damage=True)
        assert report["rows"] == {"train": 80, "forget": 10} and report["task"] == "sequence-classification"
        nats["nothing"] = report["quality_by_stage"]["before"]["forget"]["nats"]
        nats[method] = report["quality_by_stage"]["after"]["forget"]["nats"]
    assert nats["nothing"] < 0.3 < nats["retrain"]
    assert all(value > nats["nothing"] + 0.05 for name, value in nats.items() if name != "nothing"), nats
    assert nats["oracle-matching"] > 0.25 * nats["retrain"], nats
