"""Images with classes: tensors and directories, and what a model answers to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calib import BadInput
from calib.data.labeled_images import (
    answered_classes,
    check_classes,
    read_image_folder,
    read_image_tensors,
)

LABELS = {"cat": 0, "dog": 1}


def folder_of(root: Path, files: dict[str, list[str]]) -> Path:
    for name, images in files.items():
        (root / name).mkdir(parents=True)
        for image in images:
            (root / name / image).write_bytes(f"{name} {image}".encode())
    return root


def test_rows_of_tensors_are_chosen_with_their_labels_and_known_by_both(tmp_path: Path) -> None:
    inputs, labels = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    save_file({"inputs": inputs, "labels": labels}, tmp_path / "a.safetensors")
    rows = read_image_tensors(tmp_path / "a.safetensors")
    assert len(rows) == 6 and torch.equal(torch.as_tensor(rows[[4, 1]].images), inputs[[4, 1]])
    assert torch.equal(rows[2:4].labels, labels[2:4])
    prints = {rows.fingerprint, rows[[1, 0, 2, 3, 4, 5]].fingerprint, rows[:5].fingerprint}
    save_file({"pixel_values": inputs, "label": (labels + 1) % 3}, tmp_path / "b.safetensors")
    assert len({*prints, read_image_tensors(tmp_path / "b.safetensors").fingerprint}) == 4


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"inputs": torch.zeros(2, 3)}, "needs 'inputs'"),
        ({"inputs": torch.zeros(2, 3), "labels": torch.zeros(2)}, "whole numbers"),
        ({"inputs": torch.zeros(2, 3), "labels": torch.zeros(3).long()}, "2 inputs and 3 labels"),
        ({"inputs": torch.zeros(0, 3), "labels": torch.zeros(0).long()}, "at least one"),
        ({"inputs": torch.tensor([[0.0], [torch.nan]]), "labels": torch.zeros(2).long()}, "row 1: has NaN"),
    ],
)
def test_tensors_that_are_no_rows(tensors: dict[str, torch.Tensor], word: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=word):
        read_image_tensors(tmp_path / "a.safetensors")


def test_a_directory_of_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", {"dog": ["b.png", "a.JPG"], "cat": ["c.png", ".hidden"]})
    rows = read_image_folder(root, LABELS)
    assert [file.name for file in rows.inputs] == ["c.png", "a.JPG", "b.png"] and rows.labels.tolist() == [0, 1, 1]
    before = rows.fingerprint
    (root / "dog/a.JPG").write_bytes(b"another")
    assert read_image_folder(root, LABELS).fingerprint != before
    by_number = folder_of(tmp_path / "numbers", {"0": ["a.png"], "1": ["b.png"]})
    assert read_image_folder(by_number, LABELS).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"cat": ["a.png"], "cow": ["a.png"]}, "directory cow: label 'cow' is none of the model's 2: cat, dog"),
        ({"cat": ["a.png", "b.txt"]}, "b.txt is no image"),
        ({"cat": []}, "has no images"),
    ],
)
def test_directories_that_are_no_classes(files: dict[str, list[str]], word: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=word):
        read_image_folder(folder_of(tmp_path / "images", files), LABELS)


def test_files_beside_the_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", {"cat": ["a.png"]})
    (root / "list.csv").write_text("")
    with pytest.raises(BadInput, match=r"holds list\.csv beside its directories"):
        read_image_folder(root, LABELS)


def test_labels_beyond_the_classes() -> None:
    check_classes(torch.tensor([0, 2]), 3, Path("x"))
    with pytest.raises(BadInput, match="x, row 1: label 3 is none of the model's 3 classes"):
        check_classes(torch.tensor([0, 3, -1]), 3, Path("x"))


def test_what_a_model_answers_is_held_against_what_it_must() -> None:
    x = torch.randn(2, 4)

    def classes(module: nn.Module, x: torch.Tensor = x) -> int:
        return answered_classes(lambda: module(x), list(module.parameters()), len(x), Path("x"))

    assert classes(nn.Linear(4, 5)) == 5
    for module, word in [
        (nn.Linear(3, 5), "cannot take these inputs"),
        (nn.Linear(4, 1), "has one class"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), r"answers with shape \[8\]"),
    ]:
        with pytest.raises(BadInput, match=word):
            classes(module)
    frozen = nn.Linear(4, 5).requires_grad_(False)
    with pytest.raises(BadInput, match="cannot be trained"):
        classes(frozen)
