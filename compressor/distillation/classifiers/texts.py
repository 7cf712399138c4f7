"""Sequence classifiers as the library opens them, each with its tokenizer and agreed with it on padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from calib import BadInput, first_line
from calib.data.rows import positions_of, row_length
from calib.model.checkpoint import read_tokenizer
from calib.model.companions import copy_companions
from calib.model.conversion import pretrained
from calib.model.padding import agree_on_padding, check_padding, keep_padding
from calib.runtime.device import pick_device
from calib.runtime.precision import autocast_dtype
from calib.runtime.progress import Done, unwatched
from compressor.distillation.options import Distill

ROWS_AT_ONCE = 64  # rows that pass through a model together where nothing is trained


@dataclass
class TextClassifier:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    products: torch.dtype | None
    length: int
    headless: bool = False  # some of its weights, as a head has, were drawn, not read

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(iter(self.model.parameters())).device

    def write(self, folder: Path, origin: Path) -> None:
        """Write model and tokenizer to a directory, with what lies beside the model in `origin`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        copy_companions(origin, folder)
        keep_padding(self.tokenizer, folder)

    def logits(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """Logits (n, C) of texts, with a graph."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        device = self.model.device
        coded = self.tokenizer(*columns, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        with torch.autocast(device.type, self.products, enabled=self.products is not None):
            logits: Tensor = self.model(**coded.to(device)).logits
        return logits.float()

    def cut(self, texts: Sequence[tuple[str, ...]]) -> int:
        """Count the texts that are longer than what the model is given of them."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        return sum(len(ids) > self.length for ids in self.tokenizer(*columns)["input_ids"])

    @torch.no_grad()
    def answers(self, texts: Sequence[tuple[str, ...]], done: Done = unwatched) -> Tensor:
        """(n, C), on the CPU.  `done` is told how many more rows are."""
        self.model.eval()
        by_length = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))  # to pad little
        some = [by_length[i : i + ROWS_AT_ONCE] for i in range(0, len(texts), ROWS_AT_ONCE)]
        parts = list[Tensor]()
        for rows in some:
            parts.append(self.logits([texts[row] for row in rows]).cpu())
            done(units=len(rows))
        return torch.cat(parts)[torch.tensor(by_length).argsort()]


def classifier_config(folder: Path) -> Any:
    """The library's config of a folder.  Raises BadInput."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        numbers = {int(number) for number in config.label2id.values()}
    except Exception as error:  # the library says it in many ways
        raise BadInput(f"{folder}: cannot be opened as a classifier ({first_line(error)})") from error
    if not numbers <= set(range(config.num_labels)):
        raise BadInput(f"{folder / 'config.json'}: label2id has numbers beyond {config.num_labels} classes; mend it")
    return config


def open_classifier(folder: Path, options: Distill, **more: Any) -> TextClassifier:
    """A folder's model and tokenizer; where it has no classification head, one drawn with the job's seed."""
    device = pick_device(options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model, info = pretrained(AutoModelForSequenceClassification, folder, dtype=torch.float32, **more)
        tokenizer = read_tokenizer(folder)
    check_weights(model, info, folder)
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer that pads; copy its files beside config.json")
    agree_on_padding(model, tokenizer, folder)
    length = row_length(options.length, positions_of(model.config))
    products = autocast_dtype(options.precision, device)
    return TextClassifier(model.to(device), tokenizer, products, length, bool(info["missing_keys"]))


def check_weights(model: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Raises BadInput where the library, which opened a model with this `info`, drew more than a head's weights, or a
    tensor is not finite."""
    body = f"{model.base_model_prefix}."
    for name in info["missing_keys"]:
        if name.startswith(body) and "pooler" not in name:
            raise BadInput(f"{folder}: lacks '{name}'; copy the model again")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.isfinite().all():
            raise BadInput(f"{folder}: '{name}' holds NaN or Inf; this model is broken")


def check_rows(classifier: TextClassifier, texts: Sequence[tuple[str, ...]], folder: Path) -> None:
    """`calib.model.padding.check_padding`, of texts as a classifier takes them.  Raises BadInput."""
    plain = replace(classifier, products=None)
    check_padding(classifier.model, classifier.tokenizer, plain.answers, texts, folder)
