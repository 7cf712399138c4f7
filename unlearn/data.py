"""Files of training rows, and which of them are to be forgotten.

A row is known by what is in it, all fields of it: a file of rows to forget is looked up in the training file. Lines of
text files count from 1, as editors have them, rows of tensors from 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.func import vmap
from transformers import PreTrainedTokenizerBase

from calib import BadInput, first_line
from calib.corpus import Document, encoded_by, from_documents, question, read_documents
from calib.labelled import TEXTS, numbers_of, read_labelled
from calib.weights import read_file
from unlearn.examples import IGNORED, Examples
from unlearn.models import Opened

INPUTS = {"tensors": "", "image-classification": "pixel_values"}


@dataclass(frozen=True)
class Data:
    """Rows of one file: what the model sees of them, what makes each known, its line, and its fields."""

    examples: Examples
    keys: list[bytes]
    numbers: list[int]
    fields: list[dict[str, str]]
    source: str

    def __len__(self) -> int:
        return len(self.keys)

    def shown(self, row: int) -> str:
        """A few words of a row, for messages."""
        words = " | ".join(self.fields[row].values())
        place = f"line {self.numbers[row]}" if words else f"row {self.numbers[row]}"
        return f"{place} ({words[:60]}{'...' if len(words) > 60 else ''})" if words else place

    def describe(self) -> dict[str, Any]:
        return {"source": Path(self.source).name, "rows": len(self), "sha256": self.examples.fingerprint}


def read_data(path: Path, opened: Opened, length: int) -> Data:
    """All rows of a file, as the model takes them.  Raises BadInput, naming the line."""
    if opened.task in INPUTS:
        return _tensors(path, opened)
    if opened.tokenizer is None:
        raise BadInput(f"{opened.folder}: has no tokenizer for {path}; copy its files beside config.json")
    if opened.task == "causal-lm":
        return read_answers(path, opened.tokenizer, length)
    return _labelled(path, opened, length)


def _tensors(path: Path, opened: Opened) -> Data:
    try:
        tensors, _ = read_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: not a safetensors file of 'inputs' and 'labels' ({error})") from error
    inputs, labels = tensors.get("inputs"), tensors.get("labels")
    if inputs is None or labels is None or labels.dim() != 1 or labels.is_floating_point() or not inputs.dim():
        raise BadInput(f"{path}: needs 'inputs' (rows, ...) and whole numbers 'labels' (rows)")
    if len(inputs) != len(labels) or not len(labels):
        raise BadInput(f"{path}: has {len(inputs)} inputs and {len(labels)} labels; give as many of both, at least one")
    if inputs.is_floating_point():
        inputs = inputs.float()
        sound = inputs.reshape(len(inputs), -1).isfinite().all(1)
        if not sound.all():
            row = int((~sound).nonzero()[0])
            raise BadInput(f"{path}, row {row}: has NaN or Inf; mend or remove it")
    examples = Examples({INPUTS[opened.task]: inputs}, labels.long())
    classes = classes_of(opened, examples, path)
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise BadInput(
            f"{path}, row {wrong[0]}: label {int(labels[wrong[0]])} is none of the model's {classes} classes, which "
            f"count from 0 ({len(wrong)} such rows)"
        )
    keys = [_key(x.numpy().tobytes(), int(y)) for x, y in zip(inputs, labels, strict=True)]
    return Data(examples, keys, list(range(len(keys))), [{}] * len(keys), str(path))


def classes_of(opened: Opened, examples: Examples, path: Path) -> int:
    """How many answers the model chooses from.  Raises BadInput where it cannot take these inputs, or not be trained on
    them; a module that cannot run many at once from here on runs one after another."""
    params = {name: p.clone().requires_grad_() for name, p in opened.params.items()}
    some = examples[:2].to(next(iter(params.values())).device)
    try:
        said: Any = opened.forward(params, some)
    except Exception as error:  # a model that is handed what it cannot take may raise anything
        raise BadInput(f"{path}: the model cannot take these inputs ({first_line(error)})") from error
    if not isinstance(said, Tensor) or said.dim() != 2 or len(said) != len(some) or not said.is_floating_point():
        what = f"shape {list(said.shape)}, {said.dtype}" if isinstance(said, Tensor) else type(said).__name__
        raise BadInput(f"{path}: the model answers with {what}; it must give logits (rows, classes)")
    if said.shape[1] < 2:
        raise BadInput(f"{path}: the model has one class, of which nothing can be learned; give one of two or more")
    try:
        torch.autograd.grad(said.sum(), list(params.values()), allow_unused=True)
    except Exception as error:  # and what it is made of too
        raise BadInput(f"{path}: the model cannot be trained on these inputs ({first_line(error)})") from error
    if opened.stackable:
        try:
            two = {name: torch.stack([p, p]) for name, p in params.items()}
            vmap(lambda p: opened.forward(p, some), randomness="different")(two).sum().backward()
        except Exception:  # not every operation can run under vmap; what it raises then may be anything
            opened.stackable = False
    return int(said.shape[1])


def _records(path: Path, *, old_ends: bool) -> list[tuple[int, dict[str, str]]]:
    """Line and fields of each row of a .jsonl file that was read before, or of a .tsv file."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); give a .jsonl or .tsv file in UTF-8") from error
    lines = (text.replace("\r", "\n") if old_ends else text).split("\n")
    if path.suffix == ".jsonl":
        rows = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
        return [(n, {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}) for n, row in rows]
    columns = lines[0].split("\t")
    return [
        (n, dict(zip(columns, line.split("\t"), strict=False))) for n, line in enumerate(lines[1:], 2) if line.strip()
    ]


def read_answers(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Data:
    if path.suffix == ".tsv":
        records = _records(path, old_ends=True)
        documents = [_of_columns(path, number, fields) for number, fields in records]
    elif path.suffix == ".jsonl":
        documents, records = read_documents(path, tokenizer), _records(path, old_ends=False)
    else:
        raise BadInput(f"{path}: has no rows; give a .jsonl or .tsv file of prompts and responses")
    if not documents:
        raise BadInput(f"{path}: is empty; give some rows")
    corpus = from_documents(documents, tokenizer, length=length, source=str(path), by_document=True)
    lengths = [len(ids) for ids in encoded_by(tokenizer, [d.text for d in documents], source=str(path))["input_ids"]]
    short = next((i for i, n in enumerate(lengths) if n < 2), None)
    if short is not None:
        raise BadInput(f"{path}, line {records[short][0]}: has no two tokens, so nothing is predicted; remove it")
    asked = corpus.mask if corpus.answers is None else corpus.mask & corpus.answers
    labels = torch.full_like(corpus.ids, IGNORED)
    labels[:, :-1] = corpus.ids[:, 1:].where(asked[:, 1:], IGNORED)
    mute = (labels == IGNORED).all(1).nonzero().flatten().tolist()
    if mute:
        raise BadInput(
            f"{path}, line {records[mute[0]][0]}: nothing of its answer fits in {length} tokens; raise --length"
        )
    keys = [_key(d.text.encode(errors="backslashreplace"), d.answer) for d in documents]
    return Data(
        Examples({"input_ids": corpus.ids}, labels), keys, [n for n, _ in records], [f for _, f in records], str(path)
    )


def _of_columns(path: Path, number: int, fields: dict[str, str]) -> Document:
    """A row of a TSV file with prompts and responses, or questions and answers, put as in JSON lines."""
    for prompt, response in (("prompt", "response"), ("question", "answer")):
        if fields.get(prompt) and fields.get(response):
            asked, said = fields[prompt], fields[response]
            return question(asked, said) if prompt == "question" else Document(asked + said, len(asked))
    raise BadInput(f"{path}, line {number}: has no prompt and response, or question and answer; name the columns")


def _labelled(path: Path, opened: Opened, length: int) -> Data:
    found, records, tokenizer = read_labelled(path), _records(path, old_ends=True), opened.tokenizer
    assert tokenizer is not None
    if tokenizer.pad_token_id is None:
        raise BadInput(f"{opened.folder}: has no tokenizer that pads; give it a pad token")
    columns = [list(column) for column in zip(*found.texts, strict=True)]
    positions = getattr(opened.module.config, "max_position_embeddings", length)
    most = min(length, int(positions))
    coded = encoded_by(
        tokenizer, *columns, source=str(path), truncation=True, max_length=most, padding=True, return_tensors="pt"
    )
    keys = [_key("\0".join(texts).encode(), label) for texts, label in zip(found.texts, found.labels, strict=True)]
    kept = [{k: v for k, v in fields.items() if k in (*TEXTS, "label")} for _, fields in records]
    return Data(Examples(dict(coded), numbers_of(found, opened.labels)), keys, [n for n, _ in records], kept, str(path))


def _key(content: bytes, label: object) -> bytes:
    return hashlib.sha256(content + f"\0{label}".encode()).digest()


# Which rows are to be forgotten.


def by_file(train: Data, asked: Data) -> list[int]:
    """Rows of `train` that are those of `asked`, one for each.  Raises BadInput, naming the first that are missing."""
    places = defaultdict(list)
    for row, key in enumerate(train.keys):
        places[key].append(row)
    found, missing = list[int](), list[int]()
    for row, key in enumerate(asked.keys):
        if places[key]:
            found.append(places[key].pop(0))
        else:
            missing.append(row)
    if missing:
        first = ", ".join(asked.shown(row) for row in missing[:3])
        raise BadInput(
            f"{asked.source}: {len(missing)} of {len(asked)} rows are not in {train.source}, or not as often: {first}; "
            "give rows that the model was trained on"
        )
    return sorted(found)


def by_lines(train: Data, lines: str) -> list[int]:
    """Rows by numbers such as 3,10-20."""
    place, found = {number: row for row, number in enumerate(train.numbers)}, set[int]()
    for part in lines.split(","):
        if not (match := re.fullmatch(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*", part)):
            raise BadInput(f"forget-lines '{lines}': must be numbers and ranges such as 3,10-20")
        low, high = int(match[1]), int(match[2] or match[1])
        wanted = [n for n in train.numbers if low <= n <= high] if high - low > len(train) else range(low, high + 1)
        for number in wanted:
            if number not in place:
                raise BadInput(f"forget-lines '{lines}': {train.source} has no row at {number}")
            found.add(place[number])
        if low > high:
            raise BadInput(f"forget-lines '{lines}': {low} comes after {high}")
    return sorted(found)


def by_field(train: Data, condition: str) -> list[int]:
    """Rows whose FIELD has a match of REGEX, given as FIELD=REGEX."""
    name, equals, pattern = condition.partition("=")
    known = sorted({field for fields in train.fields for field in fields})
    if not equals or name not in known:
        raise BadInput(
            f"forget-where '{condition}': must be FIELD=REGEX, with a field of {train.source}: "
            f"{', '.join(known) or 'it has none'}"
        )
    try:
        found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"forget-where '{condition}': is no regular expression ({error})") from error
    return [row for row, fields in enumerate(train.fields) if found.search(fields.get(name, ""))]


def check_copies(train: Data, forgotten: Sequence[int]) -> None:
    """Raises BadInput where a row that is to go has a copy that would stay."""
    gone, kept = set(forgotten), defaultdict(list)
    for row, key in enumerate(train.keys):
        if row not in gone:
            kept[key].append(row)
    copies = [(row, kept[train.keys[row]][0]) for row in forgotten if train.keys[row] in kept]
    if copies:
        listed = ", ".join(f"{train.shown(a)} stays at {train.numbers[b]}" for a, b in copies[:5])
        raise BadInput(
            f"{train.source}: {len(copies)} rows to forget have copies that would stay: {listed}; forget all copies, "
            "or add --allow-duplicates"
        )


def lines_of(train: Data, rows: Tensor) -> str:
    """A choice of rows (f,), in order, as `by_lines` takes it: such as 3,10-20."""
    parts, numbers = list[str](), sorted(train.numbers[row] for row in rows.tolist())
    for number in numbers:
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and number == int(last or first) + 1:
            parts[-1] = f"{first}-{number}"
        else:
            parts.append(str(number))
    return ",".join(parts)


def fingerprint_of(rows: Tensor) -> str:
    """Of a choice of rows, int (f,) in order: which, not what."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def chosen(train: Data, forget: Data | None, lines: str | None, where: str | None) -> Tensor:
    """The rows to forget, by whichever way is given; int (f,), in order."""
    rows = set[int]()
    if forget is not None:
        rows |= set(by_file(train, forget))
    if lines is not None:
        rows |= set(by_lines(train, lines))
    if where is not None:
        rows |= set(by_field(train, where))
    return torch.tensor(sorted(rows), dtype=torch.long)
