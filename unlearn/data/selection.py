"""Which rows of the training data are to be forgotten: by a file of them, by line, by the value of a field."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from calib import BadInput
from calib.data.records import is_empty, lines_of_text
from calib.model.weights import read_file
from unlearn.data.dataset import Data, read_data, union
from unlearn.model.model import TrainableModel
from unlearn.options.rows import RowOptions


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
    place, found = defaultdict[int, list[int]](list), set[int]()
    for row, number in enumerate(train.numbers):
        place[number].append(row)
    for part in lines.split(","):
        if not (match := re.fullmatch(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*", part)):
            raise BadInput(f"forget-lines '{lines}': must be numbers and ranges such as 3,10-20")
        low, high = int(match[1]), int(match[2] or match[1])
        asked = [n for n in place if low <= n <= high] if high - low > len(train) else range(low, high + 1)
        for number in asked:
            if number not in place:
                raise BadInput(f"forget-lines '{lines}': {train.source} has no row at {number}")
            found |= set(place[number])
        if low > high:
            raise BadInput(f"forget-lines '{lines}': {low} comes after {high}")
    return sorted(found)


def by_field(train: Data, condition: str) -> list[int]:
    """Rows by FIELD=VALUE, where the field is exactly that, or FIELD~REGEX, where it has a match.  Raises BadInput,
    also where no row does."""
    match = re.match(r"([^=~]+)([=~])(.*)", condition, re.DOTALL)
    if not match:
        raise BadInput(f"forget-where '{condition}': must be FIELD=VALUE (exactly) or FIELD~REGEX (searched)")
    name, options, value = match.groups()
    _check_field(train, name, f"forget-where '{condition}'")
    if options == "=":
        rows = [row for row, fields in enumerate(train.fields) if fields.get(name) == value]
    else:
        try:
            pattern = re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadInput(f"forget-where '{condition}': is no regular expression ({error})") from error
        rows = [row for row, fields in enumerate(train.fields) if name in fields and pattern.search(fields[name])]
    if not rows:
        way = "; FIELD~REGEX searches" if options == "=" else ""
        raise BadInput(f"forget-where '{condition}': no row of {train.source} is like that{way}")
    return rows


def by_ids(train: Data, file: Path, name: str) -> list[int]:
    """Rows whose field `name` is exactly one of the lines of a text file.  Raises BadInput, also for a line that no row
    has."""
    _check_field(train, name, f"id-field {name}")
    ids = dict.fromkeys(row.fields["text"].strip() for row in lines_of_text(file))
    if not ids:
        raise BadInput(f"{file}: is empty; give one {name} a line")
    there = {fields.get(name) for fields in train.fields}
    if missing := [one for one in ids if one not in there]:
        raise BadInput(
            f"{file}: {len(missing)} of {len(ids)} are no '{name}' of {train.source}, such as {missing[0][:60]!r}; "
            "give those that are there"
        )
    return [row for row, fields in enumerate(train.fields) if fields.get(name) in ids]


def _check_field(train: Data, name: str, what: str) -> None:
    known = sorted({field for fields in train.fields for field in fields})
    if name not in known:
        raise BadInput(f"{what}: {train.source} has no field '{name}'; it has {', '.join(known) or 'none'}")


def matched_values(train: Data, rows: Sequence[int], name: str) -> Counter[str]:
    """Count, among these rows, the values of a field."""
    lines = {train.numbers[row]: train.fields[row].get(name, "") for row in rows}
    return Counter(lines.values())


def alike(values: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of values of which one is how the other begins: user-1 and user-10 may not both be meant."""
    ordered = sorted(values)
    return [(a, b) for a, b in pairwise(ordered) if a and b.startswith(a)]


def nearly(train: Data, values: Sequence[str], name: str) -> list[str]:
    """Values of a field that are none of `values`, and are where case, white space at the ends and the ways to write
    an accent do not count: whoever wrote them may have meant the same."""

    def folded(value: str) -> str:
        return unicodedata.normalize("NFKC", value).casefold().strip()

    meant = {folded(value) for value in values}
    others = {fields[name] for fields in train.fields if name in fields} - set(values)
    return sorted(value for value in others if folded(value) in meant)


def check_copies(train: Data, forgotten: Sequence[int]) -> None:
    """Raises BadInput where a row that is to go has a copy that would stay."""
    deleted, kept = set(forgotten), defaultdict(list)
    for row, key in enumerate(train.keys):
        if row not in deleted:
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
    parts, numbers = list[str](), sorted({train.numbers[row] for row in rows.tolist()})
    for number in numbers:
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and number == int(last or first) + 1:
            parts[-1] = f"{first}-{number}"
        else:
            parts.append(str(number))
    return ",".join(parts)


def fingerprint_of(rows: Tensor) -> str:
    """SHA-256 of a choice of rows, int (f,) in order: of their numbers, not of their content."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def chosen(
    train: Data, forget: Data | None, lines: str | None, where: str | None, ids: tuple[Path, str] | None = None
) -> Tensor:
    """The rows to forget, by whichever way is given; int (f,), in order."""
    rows = set[int]()
    if forget is not None:
        rows |= set(by_file(train, forget))
    if lines is not None:
        rows |= set(by_lines(train, lines))
    if where is not None:
        rows |= set(by_field(train, where))
    if ids is not None:
        rows |= set(by_ids(train, *ids))
    return torch.tensor(sorted(rows), dtype=torch.long)


def training_rows(options: RowOptions, trainable: TrainableModel) -> tuple[Data, Tensor]:
    """Read all rows the model was trained on, and the numbers of those to forget, int (f,) in order."""
    forget = None if options.forget is None else _forget_rows(Path(options.forget), trainable, options)
    if options.train is not None:
        data = read_data(
            Path(options.train), trainable, options.length, options.prompt_format, reverse=options.both_ways
        )
    else:
        assert options.retain is not None
        data = read_data(
            Path(options.retain), trainable, options.length, options.prompt_format, reverse=options.both_ways
        )
        if forget is not None:
            pad = None if trainable.tokenizer is None else trainable.tokenizer.pad_token_id
            data = union(forget, data, pad or 0)
    ids = (
        None if options.forget_ids is None or options.id_field is None else (Path(options.forget_ids), options.id_field)
    )
    return data, chosen(data, forget, options.forget_lines, options.forget_where, ids)


def _forget_rows(path: Path, trainable: TrainableModel, options: RowOptions) -> Data | None:
    """None where the file is there and has nothing in it."""
    empty = is_empty(path)
    if path.suffix == ".safetensors" and path.is_file():
        empty = not read_file(path)[0].get("labels", torch.ones(1)).numel()
    return None if empty else _read(path, trainable, options)


def _read(path: Path, trainable: TrainableModel, options: RowOptions) -> Data:
    return read_data(path, trainable, options.length, options.prompt_format, reverse=options.both_ways)
