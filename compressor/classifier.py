"""Sequence classifiers as the library opens them, each with its tokenizer and agreed with it on padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from calib import BadInput, first_line
from calib.checkpoint import read_tokenizer
from calib.conversion import pretrained
from calib.job import pick_device
from calib.memory import exhausted
from calib.precision import products_of
from calib.rows import positions_of, row_length
from compressor.wanted import Distill

AT_ONCE = 64  # rows that pass through a model together where nothing is trained
TRIED_ON = 256  # rows whose shortest and longest are seen padded and alone


@dataclass
class Classifier:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    products: torch.dtype | None
    length: int
    headless: bool = False  # some of its weights, as a head has, were drawn, not read

    def logits(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """(n, C)."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        device = self.model.device
        coded = self.tokenizer(*columns, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        with torch.autocast(device.type, self.products, enabled=self.products is not None):
            logits: Tensor = self.model(**coded.to(device)).logits
        return logits.float()

    @torch.no_grad()
    def answers(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """(n, C), on the CPU."""
        self.model.eval()
        by_length = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))  # to pad little
        some = [by_length[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        answers = torch.cat([self.logits([texts[row] for row in rows]).cpu() for rows in some])
        return answers[torch.tensor(by_length).argsort()]


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


def opened(folder: Path, how: Distill, **more: Any) -> Classifier:
    """A folder's model and tokenizer; where it has no classification head, one drawn with the job's seed."""
    device = pick_device(how.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model, info = pretrained(AutoModelForSequenceClassification, folder, dtype=torch.float32, **more)
        tokenizer = read_tokenizer(folder)
    body = f"{model.base_model_prefix}."
    for name in info["missing_keys"]:
        if name.startswith(body) and "pooler" not in name:
            raise BadInput(f"{folder}: lacks '{name}'; copy the model again")
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise BadInput(f"{folder}: '{name}' holds NaN or Inf; this model is broken")
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer that pads; copy its files beside config.json")
    _agree_on_padding(model, tokenizer, folder)
    length = row_length(how.length, positions_of(model.config))
    products = products_of(how.precision, device)
    return Classifier(model.to(device), tokenizer, products, length, bool(info["missing_keys"]))


def _agree_on_padding(model: Any, tokenizer: Any, folder: Path) -> None:
    """Of the config and the tokenizer, one may name a padding token for both.  Raises BadInput where neither does."""
    config, rows = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None and isinstance(config.pad_token_id, int) and 0 <= config.pad_token_id < rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if tokenizer.pad_token_id is None:
        raise BadInput(
            f"{folder}: has no tokenizer that pads; name a pad_token in tokenizer_config.json, and its pad_token_id in "
            "config.json"
        )
    if not tokenizer.pad_token_id < rows:
        raise BadInput(
            f"{folder}: the tokenizer pads with token {tokenizer.pad_token_id}, the model has {rows}; choose another"
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_padding(classifier: Classifier, texts: Sequence[tuple[str, ...]], folder: Path) -> None:
    """Padding must not change what is said of a row; where it does on the tokenizer's side, it moves to the other one.

    Raises BadInput where that does not help, as when the model and its tokenizer do not agree on what padding is.
    """
    ordered = sorted(texts[:TRIED_ON], key=lambda row: sum(map(len, row)))
    pair, plain, tokenizer = [ordered[0], ordered[-1]], replace(classifier, products=None), classifier.tokenizer
    sides, pads = [tokenizer.padding_side], classifier.model.config.get_text_config().pad_token_id
    if pads == tokenizer.pad_token_id:
        sides.append("left" if sides == ["right"] else "right")
    try:
        alone = torch.cat([plain.answers([row]) for row in pair])
        for side in sides:
            tokenizer.padding_side = side
            if (plain.answers(pair) - alone).abs().max() <= 1e-2 * alone.abs().max().clamp(min=1e-6):
                return
    except Exception as error:  # a model that is handed what it cannot take may raise anything
        if exhausted(error):
            raise
        raise BadInput(f"{folder}: the model cannot take rows of text ({first_line(error)})") from error
    raise BadInput(
        f"{folder}: what the model says of a row changes with the padding beside it; make pad_token_id in config.json "
        f"({pads}) and the tokenizer's pad token ({tokenizer.pad_token_id}) one, which stands in no text"
    )


def keep_padding(tokenizer: Any, folder: Path) -> None:
    """Where the tokenizer in `folder` pads otherwise than `tokenizer`, write there how it is to pad."""
    stored = read_tokenizer(folder)
    if stored is not None and (stored.pad_token_id, stored.padding_side) != (
        tokenizer.pad_token_id,
        tokenizer.padding_side,
    ):
        stored.pad_token, stored.padding_side = tokenizer.pad_token, tokenizer.padding_side
        stored.save_pretrained(folder)
