"""Files of training rows, and which of them are to be forgotten.

A row is known by what is in it, all fields of it: a file of rows to forget is looked up in the training file. Lines of
text files count from 1, as editors have them, rows of tensors and images from 0. Of images by class a row has the
fields `file`, as the directory of classes has it, and `class`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from transformers import PreTrainedTokenizerBase

from calib import BadInput
from calib.data.image_rows import opened_processor
from calib.data.labeled import read_labeled
from calib.data.labeled_images import (
    answered_classes,
    check_classes,
    read_image_folder,
    read_image_tensors,
    reader_of,
)
from calib.data.prompts import Document, PromptFormat, prompt_format
from calib.data.records import Row, is_prose, lines_of_text, read_rows
from calib.data.rows import positions_of, row_length
from calib.data.targets import numbers_of
from calib.data.task_rows import LENGTH
from calib.data.token_rows import encode_documents, encoded_by, surrounding
from calib.model.padding import check_padding
from calib.runtime.memory import is_out_of_memory
from unlearn.data.facts import both_ways
from unlearn.model.examples import IGNORED, Examples
from unlearn.model.model import TrainableModel

FILES_AT_ONCE = 64  # image files that are decoded together
INPUTS = {"tensors": "", "image-classification": "pixel_values"}


@dataclass(frozen=True)
class Data:
    """Rows of one file: what the model sees of them, what makes each known, its line, and its fields.

    A row that is too long for the model is several of these, of the same line. `about` says for reports how rows were
    made: the prompt format, how many were cut or take several windows. `rows` are a language model's as the file has
    them.
    """

    examples: Examples
    keys: list[bytes]
    numbers: list[int]
    fields: list[dict[str, str]]
    source: str
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def lines(self, rows: Iterable[int]) -> int:
        """Count the lines that these rows stand in: a long one is several rows, and a fact in both directions two."""
        return len({self.numbers[row] for row in rows})

    def shown(self, row: int) -> str:
        """A few words of a row, for messages."""
        words = " | ".join(self.fields[row].values())
        place = f"line {self.numbers[row]}" if words and "images" not in self.about else f"row {self.numbers[row]}"
        return f"{place} ({words[:60]}{'...' if len(words) > 60 else ''})" if words else place

    def describe(self) -> dict[str, Any]:
        """Summarize the data for a recipe: source, rows, fingerprint."""
        rows = len(set(self.numbers))
        return {"source": Path(self.source).name, "rows": rows, "sha256": self.examples.fingerprint, **self.about}


def read_data(
    path: Path, trainable: TrainableModel, length: int | None = None, prompts: str = "auto", *, reverse: bool = False
) -> Data:
    """Read all rows of a file as the model takes them, on its device: of `length` tokens at most (None: 512, or as many
    as it has positions), prompts in the format `prompts` (`calib.data.prompts`) or, with `reverse`, facts, each in both
    directions.  Raises BadInput, naming the line."""
    data = _read(path, trainable, length, prompts, reverse)
    return replace(data, examples=data.examples.to(trainable.device))


def _read(path: Path, trainable: TrainableModel, length: int | None, prompts: str, reverse: bool) -> Data:
    if reverse and trainable.task != "causal-lm":
        raise BadInput("both-ways: facts have two directions in language models alone; leave it out")
    if trainable.task in INPUTS:
        return _image_files(path, trainable) if path.is_dir() else _tensors(path, trainable)
    config: Any = trainable.module.config
    if trainable.task == "causal-lm":
        width = row_length(length, positions_of(config))
        return language_rows(path, trainable.tokenizer, config, trainable.folder, width, prompts, reverse=reverse)
    if trainable.tokenizer is None:
        raise BadInput(f"{trainable.folder}: has no tokenizer for {path}; copy its files beside config.json")
    return _labelled(path, trainable, length)


def language_rows(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any,
    folder: Path,
    length: int,
    prompts: str,
    *,
    reverse: bool = False,
) -> Data:
    """Rows of `length` tokens at most for the language model in `folder`, whose tokenizer and config these are.  Raises
    BadInput, naming the line."""
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer for {path}; copy its files beside config.json")
    data = read_answers(path, tokenizer, length, prompt_format(prompts, tokenizer), reverse=reverse)
    check_vocabulary(data.examples, config, path)
    return data


def check_vocabulary(rows: Examples, config: Any, path: Path) -> None:
    """Raises BadInput where token ids of `rows`, read from `path`, are beyond the vocabulary of a model's config."""
    largest, vocab = int(rows.inputs["input_ids"].max()), int(config.vocab_size)
    if largest >= vocab:
        raise BadInput(
            f"{path}: token id {largest} is beyond the model's vocabulary of {vocab}; use the model's own tokenizer"
        )


def _tensors(path: Path, trainable: TrainableModel) -> Data:
    rows = read_image_tensors(path)
    inputs, labels = rows.inputs, rows.labels
    examples = Examples({INPUTS[trainable.task]: torch.as_tensor(inputs)}, labels)
    check_classes(labels, classes_of(trainable, examples, path), path)
    return Data(examples, _pixel_keys(examples), list(range(len(labels))), [{}] * len(labels), str(path))


def _pixel_keys(rows: Examples) -> list[bytes]:
    (inputs,) = rows.inputs.values()
    return [_key(x.numpy().tobytes(), int(y)) for x, y in zip(inputs, rows.labels, strict=True)]


def _image_files(path: Path, trainable: TrainableModel) -> Data:
    """Images in a directory of classes, read by the processor that lies beside the model."""
    if trainable.factory:
        raise BadInput(f"{path}: is a directory, and a factory's module takes tensors; give .safetensors")
    rows = read_image_folder(path, trainable.labels)
    processor = opened_processor("AutoImageProcessor", trainable.folder)
    if processor is None:
        raise BadInput(
            f"{trainable.folder}: has no processor that reads images; copy preprocessor_config.json into it, or give "
            ".safetensors of inputs and labels"
        )
    files: Any = rows.inputs
    read = reader_of(processor, getattr(trainable.module.config, "num_channels", 3))
    parts = [read(files[i : i + FILES_AT_ONCE]) for i in range(0, len(files), FILES_AT_ONCE)]
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise BadInput(f"{path}: the model's processor makes images of unlike sizes of these; have it resize them")
    examples = Examples({INPUTS[trainable.task]: torch.cat(parts)}, rows.labels)
    check_classes(rows.labels, classes_of(trainable, examples, path), path)
    names = [{"file": f"{file.parent.name}/{file.name}", "class": file.parent.name} for file in files]
    return Data(examples, _pixel_keys(examples), list(range(len(files))), names, str(path), {"images": True})


def classes_of(trainable: TrainableModel, examples: Examples, path: Path) -> int:
    """Count the answers that the model chooses from.  Raises BadInput where it cannot take these inputs, or not be
    trained on them; a module that cannot run many at once from here on runs one after another."""
    params = {name: p.clone().requires_grad_() for name, p in trainable.params.items()}
    some = examples[:2].to(next(iter(params.values())).device)
    classes = answered_classes(lambda: trainable.forward(params, some), list(params.values()), len(some), path)
    if trainable.stackable:
        try:
            two = {name: torch.stack([p, p]) for name, p in params.items()}
            vmap(lambda p: trainable.forward(p, some), randomness="different")(two).sum().backward()
        except Exception as error:  # not every operation can run under vmap; what it raises then may be anything
            if is_out_of_memory(error):
                raise
            trainable.stackable = False
    return classes


def read_answers(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int | None, form: PromptFormat, *, reverse: bool = False
) -> Data:
    """Rows of prompts and answers, conversations or texts, of any kind of file that calib.data.records reads; of a text
    file each line is one.  A row that is longer than `length` becomes several examples (`answer_windows`)."""
    rows = list(lines_of_text(path) if is_prose(path) else read_rows(path))
    if not rows:
        raise BadInput(f"{path}: is empty; give some rows")
    if reverse:
        documents, rows = both_ways(rows, str(path)), [row for row in rows for _ in range(2)]
    else:
        documents = [form.document(row, f"{path}, {row.place}") for row in rows]
    for row, document in zip(rows, documents, strict=True):
        if document.prompt_only or document.answers == ():
            raise BadInput(f"{path}, {row.place}: has nothing that the model answers, so nothing is learned of it; "
                           "give the answer, or remove it")  # fmt: skip
    width = length or LENGTH
    windows = answer_windows(documents, tokenizer, str(path), width)
    for owner, row in enumerate(rows):
        if not windows[owner]:
            raise BadInput(f"{path}, {row.place}: has no two tokens, so nothing is predicted; remove it")
    examples = stacked_windows([window for some in windows for window in some])
    row_index = [owner for owner, some in enumerate(windows) for _ in some]
    part = [n for some in windows for n in range(len(some))]
    keys = [
        _key(
            documents[o].text.encode(errors="backslashreplace"),
            (documents[o].answers, n) if n else documents[o].answers,
        )
        for o, n in zip(row_index, part, strict=True)
    ]
    about: dict[str, Any] = {"prompt_format": form.name} if any(d.answers is not None for d in documents) else {}
    about = {"both_ways": True} if reverse else about
    if long := sum(len(some) > 1 for some in windows):
        about |= {"long_rows": long, "windows": len(examples)}
    return Data(
        examples, keys, [rows[o].number for o in row_index], [_shown_fields(rows[o]) for o in row_index], str(path),
        about, [rows[o] for o in row_index],
    )  # fmt: skip


def _shown_fields(row: Row) -> dict[str, str]:
    """A row's fields as text; without those that are null, which the word "null" is not."""
    return {
        name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str)
        for name, v in row.fields.items()
        if v is not None
    }


Window = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]  # ids (t,), and what follows each or IGNORED


def stacked_windows(windows: Sequence[Window]) -> Examples:
    """Pad windows, as `answer_windows` gives them, to the longest, as rows of a language model."""
    ids = torch.zeros(len(windows), max(len(own) for own, _ in windows), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for i, (own, following) in enumerate(windows):
        ids[i, : len(own)], labels[i, : len(own)] = torch.from_numpy(own), torch.from_numpy(following)
    return Examples({"input_ids": ids}, labels)


def answer_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, source: str, length: int
) -> list[list[Window]]:
    """Give, for each document, ids (t,) and the token that follows each where that is of an answer, else IGNORED.

    One that has more than `length` tokens is cut into windows. Each begins with what the tokenizer puts first and with
    the last quarter of the window before it, as context: every token of an answer is predicted exactly once.
    """
    lead, found = surrounding(tokenizer)[0], list[list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]()
    if length < 2 * (len(lead) + 1):
        raise BadInput(f"length is {length}; the tokenizer puts {len(lead)} tokens before every text; take longer rows")
    for one in encode_documents(documents, tokenizer, source):
        whole, some, end = np.where(one.answers, one.ids, IGNORED), [], 0
        while end < len(one.ids):
            context = end - (length - len(lead)) // 4 if end else 0
            start, head = max(context, 0), lead if end else []
            stop = min(len(one.ids), start + length - len(head))
            ids = np.concatenate([np.array(head, np.int64), one.ids[start:stop]])
            targets = np.concatenate([np.full(len(head), IGNORED), whole[start:stop]])
            targets[: len(head) + max(end - start, 1 if not head else 0)] = IGNORED  # predicted in the window before
            following = np.append(targets[1:], IGNORED)
            if (following != IGNORED).any():
                some.append((ids, following))
            end = stop
        found.append(some)
    return found


def _labelled(path: Path, trainable: TrainableModel, length: int | None) -> Data:
    found, tokenizer = read_labeled(path), trainable.tokenizer
    assert tokenizer is not None
    if tokenizer.pad_token_id is None:
        raise BadInput(f"{trainable.folder}: has no tokenizer that pads; give it a pad token")
    columns = [list(column) for column in zip(*found.texts, strict=True)]
    most = row_length(length, positions_of(trainable.module.config))
    labels = numbers_of(found, trainable.labels)

    def coded_of(columns: list[list[str]]) -> dict[str, Tensor]:
        return dict(
            encoded_by(
                tokenizer, *columns, source=str(path), truncation=True, max_length=most, padding=True,
                return_tensors="pt",
            )
        )  # fmt: skip

    def answers(texts: Sequence[tuple[str, ...]]) -> Tensor:
        inputs = coded_of([list(column) for column in zip(*texts, strict=True)])
        rows = Examples(inputs, labels[: len(texts)]).to(trainable.device)
        return trainable.forward(trainable.state, rows)

    check_padding(trainable.module, tokenizer, answers, found.texts, trainable.folder)
    coded = coded_of(columns)
    whole = encoded_by(tokenizer, *columns, source=str(path))["input_ids"]
    cut = sum(len(ids) > most for ids in whole)
    keys = [_key("\0".join(texts).encode(), label) for texts, label in zip(found.texts, found.labels, strict=True)]
    about = {"cut_rows": cut} if cut else {}
    return Data(Examples(coded, labels), keys, found.numbers, found.fields, str(path), about)


def _key(content: bytes, label: object) -> bytes:
    return hashlib.sha256(content + f"\0{label}".encode()).digest()


def union(a: Data, b: Data, pad: int = 0) -> Data:
    """The rows of two files as one: numbers of the second count on from the first's.  `pad` is the id of padding."""
    last, rows = max(a.numbers) + (min(b.numbers) == 0), [a.examples, b.examples]  # tensors count from 0
    if "input_ids" in a.examples.inputs:
        width = max(some.inputs["input_ids"].shape[1] for some in rows)
        rows = [some.padded(width, pad) for some in rows]
    return Data(
        rows[0] | rows[1], a.keys + b.keys, a.numbers + [last + n for n in b.numbers],
        a.fields + b.fields, f"{a.source} and {b.source}", b.about | a.about,
        a.rows + b.rows,
    )  # fmt: skip
