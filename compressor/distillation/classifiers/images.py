"""Classifiers of images: checkpoints of the library, such as ResNet, ViT and ConvNeXt, and modules of the user's own,
which may take any tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from calib import BadInput
from calib.data.image_rows import opened_processor
from calib.data.labeled_images import LabeledImages, ReadFiles, answered_classes, reader_of
from calib.model.companions import copy_companions
from calib.model.conversion import pretrained
from calib.model.factory import WEIGHTS_FILE, drawn_module, fill_module, weights_file
from calib.runtime.device import pick_device
from calib.runtime.distributed import world_size
from calib.runtime.precision import autocast_dtype
from calib.runtime.progress import Done, unwatched
from compressor.distillation.classifiers.texts import ROWS_AT_ONCE, check_weights
from compressor.distillation.options import Distill


@dataclass
class ImageClassifier:
    """A model of images, in single precision: one of the library's, or what a factory makes.

    `read` makes pixels of image files, `processor` is what it does so with; `stored` the dtypes in which a factory's
    tensors are stored, by name.
    """

    model: Any
    products: torch.dtype | None
    factory: str | None = None
    processor: Any | None = None
    read: ReadFiles | None = None
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    headless: bool = False  # some of its weights, as a head has, were drawn, not read

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(iter(self.model.parameters())).device

    def answer(self, images: Sequence[Any]) -> Any:
        """Run the model on images, tensors (...) or files, with a graph; logits (n, C), or whatever it gives."""
        if isinstance(images[0], Tensor):
            pixels = torch.stack([*images])
        elif self.read is not None:
            pixels = self.read(images)
        else:
            raise BadInput(
                f"{images[0]}: neither model has a processor that reads images; copy preprocessor_config.json into its "
                "directory, or give .safetensors of inputs and labels"
            )
        pixels = pixels.to(self.device)
        with torch.autocast(self.device.type, self.products, enabled=self.products is not None):
            return self.model(pixels) if self.factory else self.model(pixel_values=pixels).logits

    def logits(self, images: Sequence[Any]) -> Tensor:
        """Logits (n, C) of images, with a graph."""
        logits: Tensor = self.answer(images).float()
        return logits

    @torch.no_grad()
    def answers(self, images: Sequence[Any], done: Done = unwatched) -> Tensor:
        """(n, C), on the CPU.  `done` is told how many more rows are."""
        self.model.eval()
        parts = list[Tensor]()
        for first in range(0, len(images), ROWS_AT_ONCE):
            some = images[first : first + ROWS_AT_ONCE]
            parts.append(self.logits(some).cpu())
            done(units=len(some))
        return torch.cat(parts)

    def cut(self, images: Sequence[Any]) -> int:
        """Count the images of which the model is given a part only: none."""
        return 0

    def write(self, folder: Path, origin: Path) -> None:
        """Write the model to a directory, with what lies beside it in the directory `origin`."""
        if self.factory is None:
            self.model.save_pretrained(folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            copy_companions(origin, folder)
            return
        whole = {
            name: t.detach().cpu().to(self.stored.get(name, t.dtype)).clone()
            for name, t in self.model.state_dict().items()
        }
        save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def open_image_classifier(
    place: Path | None, factory: str | None, options: Distill, *, files: bool, **more: Any
) -> ImageClassifier:
    """Open a classifier of images.

    Args:
        place: the library's directory, or a factory's weights; None: a factory's, drawn with the job's seed.
        factory: package.module:function that makes the model; None: it is one of the library's.
        options: of the job.
        files: whether images are files, which its processor, if it has one, then reads.
        more: what replaces values of the library's config.

    Raises:
        BadInput: the directory, the file or what the factory makes will not do.
    """
    device = pick_device(options.device)
    products = autocast_dtype(options.precision, device)
    if factory is not None:
        module = drawn_module(factory, options.seed)
        stored = {} if place is None else fill_module(module, weights_file(place))
        for name, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise BadInput(f"{place or factory}: tensor '{name}' contains NaN or Inf; get a sound copy")
        if not any(True for _ in module.parameters()):
            raise BadInput(f"factory {factory}: makes a model without parameters, which learns nothing; mend it")
        return ImageClassifier(module.to(device), products, factory, stored=stored)
    assert place is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model, info = pretrained(AutoModelForImageClassification, place, dtype=torch.float32, **more)
    check_weights(model, info, place)
    processor = opened_processor("AutoImageProcessor", place) if files else None
    read = None if processor is None else reader_of(processor, getattr(model.config, "num_channels", 3))
    return ImageClassifier(
        model.to(device), products, processor=processor, read=read, headless=bool(info["missing_keys"])
    )


def check_images(classifier: ImageClassifier, rows: LabeledImages, batch: int) -> int:
    """Count the classes that a classifier chooses from, by what it answers to the first rows.

    Args:
        classifier: teacher or student.
        rows: training rows.
        batch: rows of a step, on which it must be able to learn; 0: it does not learn.

    Raises:
        BadInput: it cannot take images of this size or kind, cannot learn on them, or answers with no numbers.
    """
    params = [p for p in classifier.model.parameters() if p.requires_grad]
    some, path = rows.inputs[:2], Path(rows.source)
    classes = answered_classes(lambda: classifier.answer(some), params, len(some), path)
    if not classifier.logits(some).isfinite().all():
        raise BadInput(f"{path}: the model's answers to the first rows are NaN or infinite; this model is broken")
    if batch:
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in classifier.model.modules())
        if norms and world_size() > 1:
            raise BadInput("torchrun: batch norm sees the rows of one process only; run one")
        learning = deepcopy(classifier.model).train()
        few = rows.inputs[: min(batch, len(rows))]
        own = ImageClassifier(learning, classifier.products, classifier.factory, read=classifier.read)
        params = [p for p in learning.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):  # of dropout
            answered_classes(lambda: own.answer(few), params, len(few), path)
    return classes


def share_processor(classifier: ImageClassifier, other: ImageClassifier) -> None:
    """Let a classifier that has no processor read image files as another one does."""
    if classifier.read is None:
        classifier.read, classifier.processor = other.read, other.processor


def described_factory(classifier: ImageClassifier) -> str:
    """SHA-256 of a factory's name and of the modules that it makes, in hexadecimal."""
    return hashlib.sha256(f"{classifier.factory} {classifier.model!r}".encode()).hexdigest()
