"""Images with one class each: tensors as a model takes them, or files in a directory of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from calib import BadInput, first_line
from calib.data.labeled import LabeledRows
from calib.data.targets import numbers_of
from calib.model.weights import read_file
from calib.runtime.memory import is_out_of_memory

ReadFiles = Callable[[Sequence[Path]], Tensor]  # image files -> pixels (n, ...)
IMAGE_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class LabeledImages:
    """n images and their classes: `images` are tensors, (n, ...), or n files; labels int (n,)."""

    images: Tensor | list[Path]
    labels: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | list[int]) -> LabeledImages:
        chosen = list(range(len(self))[rows]) if isinstance(rows, slice) else rows
        images = self.images[chosen] if isinstance(self.images, Tensor) else [self.images[i] for i in chosen]
        return LabeledImages(images, self.labels[chosen], self.source)

    @property
    def inputs(self) -> Sequence[Any]:
        """One tensor or file for each row, as a classifier is given it."""
        return self.images  # type: ignore[return-value]  # a tensor has rows too

    @property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels, in hexadecimal; of files, of their bytes."""
        digest = hashlib.sha256(self.labels.contiguous().numpy().tobytes())
        if isinstance(self.images, Tensor):
            digest.update(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
            digest.update(self.images.contiguous().numpy().tobytes())
        else:
            for file in self.images:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def read_image_tensors(path: Path) -> LabeledImages:
    """Read a safetensors file of `inputs` (or `pixel_values`), (n, ...), and `labels`, whole numbers (n,).  Raises
    BadInput, naming the row, where something is missing or no number."""
    try:
        tensors, _ = read_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: not a safetensors file of 'inputs' and 'labels' ({error})") from error
    inputs = next((tensors[name] for name in ("inputs", "pixel_values") if name in tensors), None)
    labels = next((tensors[name] for name in ("labels", "label") if name in tensors), None)
    if inputs is None or labels is None or labels.dim() != 1 or labels.is_floating_point() or not inputs.dim():
        raise BadInput(f"{path}: needs 'inputs' or 'pixel_values' (rows, ...) and whole numbers 'labels' (rows)")
    if len(inputs) != len(labels) or not len(labels):
        raise BadInput(f"{path}: has {len(inputs)} inputs and {len(labels)} labels; give as many of both, at least one")
    if inputs.is_floating_point():
        inputs = inputs.float()
        sound = inputs.reshape(len(inputs), -1).isfinite().all(1)
        if not sound.all():
            row = int((~sound).nonzero()[0])
            raise BadInput(f"{path}, row {row}: has NaN or Inf; mend or remove it")
    return LabeledImages(inputs, labels.long(), str(path))


def read_image_folder(path: Path, label2id: Mapping[str, int]) -> LabeledImages:
    """Read a directory that has a directory of image files for each class, called by its name or number in `label2id`.

    Files come in the order of their names, class by class; they are opened where they are used. Raises BadInput for
    what is neither, for an unknown class and where there is no image.
    """
    files, names = list[Path](), list[str]()
    for folder in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
        if not folder.is_dir():
            raise BadInput(f"{path}: holds {folder.name} beside its directories; give one directory for each class")
        found = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        if wrong := [file.name for file in found if file.suffix.lower() not in IMAGE_KINDS or not file.is_file()]:
            raise BadInput(f"{folder}: {wrong[0]} is no image ({', '.join(IMAGE_KINDS)}); move it away")
        files += found
        names += [folder.name] * len(found)
    if not files:
        raise BadInput(f"{path}: has no images; give a directory with one directory of images for each class")
    places = [f"directory {name}" for name in names]
    labels = numbers_of(LabeledRows([(name,) for name in names], [*names], str(path), places=places), label2id)
    return LabeledImages(files, labels, str(path))


def reader_of(processor: Any, channels: int) -> ReadFiles:
    """Make pixels (n, channels, H, W) of image files by an image processor of the library: gray where there is one
    channel, else in color.  The function raises BadInput for a file that is no image, and for images that do not become
    alike in size."""

    def read(files: Sequence[Path]) -> Tensor:
        images = [opened_image(file, channels) for file in files]
        try:
            pixels: Tensor = processor(images=images, return_tensors="pt").pixel_values
        except Exception as error:  # processors raise anything
            if is_out_of_memory(error):
                raise
            raise BadInput(
                f"{files[0].parent.parent}: the model's processor does not make images of one size of these "
                f"({first_line(error)}); have it resize them (preprocessor_config.json), or give images of one size"
            ) from error
        return pixels

    return read


def opened_image(file: Path, channels: int) -> Any:
    """Decode an image file: gray where there is one channel, else in color.  Raises BadInput where it is none, or has
    more than 8 bits a channel, of which Pillow keeps no more than the darkest 256 levels apart."""
    from PIL import Image  # not everyone has it

    try:
        with Image.open(file) as image:
            if (deep := image.mode).startswith(("I", "F")):
                raise BadInput(f"it has more than 8 bits a channel, mode {deep}")
            return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise anything
        raise BadInput(f"{file}: cannot be read as an image ({first_line(error)}); replace or remove it") from error


def check_classes(labels: Tensor, classes: int, path: Path) -> None:
    """Raises BadInput, naming the first row, where labels (n,) are none of a model's `classes`, which count from 0."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise BadInput(
            f"{path}, row {wrong[0]}: label {int(labels[wrong[0]])} is none of the model's {classes} classes, which "
            f"count from 0 ({len(wrong)} such rows)"
        )


def answered_classes(answer: Callable[[], Any], params: Sequence[Tensor], rows: int, path: Path) -> int:
    """Count the classes that a model chooses from, by what it answers to some rows.

    Args:
        answer: runs the model on the rows, with a graph.
        params: its parameters, (...) each; gradients of them are tried.
        rows: how many rows it is given.
        path: where they come from, for messages.

    Raises:
        BadInput: the model cannot take these inputs, does not answer with logits (rows, classes) of two or more
            classes, or cannot be trained on them.
    """
    try:
        message = answer()
    except Exception as error:  # a model that is handed what it cannot take may raise anything
        if is_out_of_memory(error):
            raise
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: the model cannot take these inputs ({first_line(error)})") from error
    if not isinstance(message, Tensor) or message.dim() != 2 or len(message) != rows or not message.is_floating_point():
        what = (
            f"shape {list(message.shape)}, {message.dtype}" if isinstance(message, Tensor) else type(message).__name__
        )
        raise BadInput(f"{path}: the model answers with {what}; it must give logits (rows, classes)")
    if message.shape[1] < 2:
        raise BadInput(f"{path}: the model has one class, of which nothing can be learned; give one of two or more")
    try:
        torch.autograd.grad(message.sum(), list(params), allow_unused=True)
    except Exception as error:  # and what it is made of too
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{path}: the model cannot be trained on these inputs ({first_line(error)})") from error
    return int(message.shape[1])
