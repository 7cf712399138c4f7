"""Files of rows, whatever they are kept in: the one reader of JSON, CSV, TSV, Parquet, text and `datasets`.

Rows come one at a time, so memory follows what is kept of them and not the file. Anything that is not understood is
refused by name: a file is never taken for prose because nobody asked what it was.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import heapq
import io
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from calib import BadInput, first_line

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
TEXT = (".txt", ".text", ".md", ".rst", ".raw", "")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
ROW_FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt (also .gz or .zst of these)"
SOURCES = (
    ".jsonl, .json, .csv, .tsv, .parquet, .txt (also .gz, .zst), .safetensors of token ids, a folder of datasets or a "
    "data set on the hub (NAME, NAME:SPLIT or NAME:CONFIG:SPLIT)"
)
PIECE = 2**16  # characters that are read of a long text at a time
_JSON = re.compile(r'\s*\[?\s*\{\s*"[^"\n]*"\s*:')
HUB = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?::[\w.-]+){0,2}")  # NAME, NAME:SPLIT or NAME:CONFIG:SPLIT


@dataclass(frozen=True)
class Row:
    """A row of a file: where it stands, its fields by name, and about how many bytes it takes.

    A text file has pieces of text instead, in the one field "text"; `follows` where a piece goes on from the last.
    """

    place: str  # "line 3" or "row 3", counted from 1
    number: int
    fields: dict[str, Any]
    size: int
    follows: bool = False


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case and without .gz or .zst; "datasets" for a folder or a name
    on the hub.  Raises BadInput where nothing is there, or of no kind that is known."""
    name = path.name.lower()
    for packed in (".gz", ".zst", ".zstd"):
        name = name.removesuffix(packed)
    ending = Path(name).suffix
    known = (*JSON_LINES, *TEXT, *TABLE_SUFFIXES, ".json", ".parquet", ".safetensors")
    try:
        if path.is_dir():
            return "datasets"
        there = path.exists()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); mend the path") from error
    if not there:
        looks_like_a_file = (ending and ending in known) or path.is_absolute() or str(path).startswith(".")
        if HUB.fullmatch(str(path)) and not looks_like_a_file:
            return "datasets"
        raise BadInput(f"{path}: cannot be read (No such file or directory); give a {ROW_FORMATS} file")
    if ending not in known:
        raise BadInput(f"{path}: '{ending}' is no kind of file that is read here; give {ROW_FORMATS}; name prose .txt")
    return ending


def read_rows(path: Path, piece: int = PIECE) -> Iterator[Row]:
    """The rows of a file, of a folder that `datasets` saved, or of a data set on the hub, in order.

    A text file is cut into pieces of about `piece` characters, or up to twice as many. Raises BadInput, naming the line
    or row, where something is not understood.
    """
    kind = kind_of(path)
    if kind == ".safetensors":
        raise BadInput(f"{path}: holds tensors, not rows of text; give {ROW_FORMATS}")
    if kind == "datasets":
        return _of_datasets(path)
    if kind == ".parquet":
        return _parquet(path)
    if kind in JSON_LINES:
        return _json_lines(path)
    if kind == ".json":
        return _json(path)
    if kind in TABLE_SUFFIXES:
        return _table(path, TABLE_SUFFIXES[kind])
    return _text(path, piece)


def is_prose(path: Path) -> bool:
    """Whether a file holds one running text, not rows."""
    return kind_of(path) in TEXT


def lines_of_text(path: Path) -> Iterator[Row]:
    """Each line of a text file that has more than white space, as a row with the field "text"."""
    _check_prose(path, next(_characters(path), ""))
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream, path), 1):
            if "\0" in line:
                raise BadInput(f"{path}, line {number}: holds zero bytes, so it is no text; convert it to UTF-8")
            if "\r" in line.rstrip("\r"):
                raise BadInput(f"{path}, line {number}: has carriage returns where lines end in \\n; convert the file")
            if line.strip():
                yield Row(f"line {number}", number, {"text": line}, len(line))


def take_first(rows: Iterable[Row], enough: Callable[[int, int], bool]) -> tuple[list[Row], bool]:
    """The first rows, until `enough(how many, their bytes)`.  -> rows, and whether those are all."""
    taken, size, remaining = list[Row](), 0, iter(rows)
    for row in remaining:
        taken.append(row)
        size += row.size
        if enough(len(taken), size):
            return taken, next(remaining, None) is None
    return taken, True


def take_drawn(rows: Iterable[Row], enough: Callable[[int, int], bool], seed: int) -> tuple[list[Row], bool]:
    """Rows drawn at random without replacement in one pass, as few as are `enough(how many, their bytes)`.

    Every row gets a random number and those with the smallest stay. -> rows in order of those numbers, which is a
    random order, and whether those are all rows.
    """
    generator, kept, size, everything = random.Random(seed), list[tuple[float, int, Row]](), 0, True
    for index, row in enumerate(rows):
        draw = generator.random()
        if not everything and draw >= -kept[0][0]:
            continue
        heapq.heappush(kept, (-draw, index, row))
        size += row.size
        while len(kept) > 1 and enough(len(kept) - 1, size - kept[0][2].size):
            size -= heapq.heappop(kept)[2].size
            everything = False
    return [row for _, _, row in sorted(kept, reverse=True)], everything


# Each kind of file.


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked.  Raises BadInput."""
    ending = path.suffix.lower()
    try:
        if ending == ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif ending in (".zst", ".zstd"):
            if find_spec("zstandard") is None:
                raise BadInput(f"{path}: zstandard is not installed; pip install 'parewell[data]'")
            import zstandard  # not everyone has it

            with (
                path.open("rb") as packed,
                zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as stream,
            ):
                yield io.BufferedReader(stream)
        else:
            with path.open("rb") as stream:
                yield stream
    except BadInput:
        raise
    except (OSError, EOFError) as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error}); give a {ROW_FORMATS} file") from error  # type: ignore[union-attr]
    except Exception as error:  # what a damaged archive raises is its library's own
        if type(error).__module__.partition(".")[0] not in ("zlib", "zstd", "zstandard", "gzip"):
            raise
        raise BadInput(f"{path}: cannot be unpacked ({first_line(error)}); get a sound copy") from error


def _lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Lines without their ends.  Only \\n and \\r\\n end one: other separators may stand inside a string."""
    position = 0
    for number, line in enumerate(stream):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, position + error.start) from error
        position += len(line)


def _not_utf8(path: Path, byte: int) -> BadInput:
    return BadInput(f"{path}: byte {byte} is not UTF-8; convert the file to UTF-8")


def _fields(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: has none of the fields that rows have, as it is no JSON object; mend or remove it")
    if "\\ud" in (shown := json.dumps(value)) and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise BadInput(f"{where}: has half a surrogate pair, which is no text ({shown[:40]}); mend or remove the line")
    return value


def _json_lines(path: Path) -> Iterator[Row]:
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream, path), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: not JSON ({error}); mend or remove the line") from error
            yield Row(f"line {number}", number, _fields(value, where), len(line))


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, objects one after the other, or one object that holds such an array and little else."""
    number = 0
    for value, size in _json_values(path):
        listed = isinstance(value, dict) and [v for v in value.values() if isinstance(v, list) and v]
        nested = listed[0] if listed and len(listed) == 1 and all(isinstance(v, dict) for v in listed[0]) else None
        turns = nested is not None and any(name in value for name in ("messages", "conversations", "prompt"))
        for one in nested if nested is not None and not turns and number == 0 and len(value) < 4 else [value]:
            number += 1
            yield Row(f"row {number}", number, _fields(one, f"{path}, row {number}"), size)


def _json_values(path: Path) -> Iterator[tuple[Any, int]]:
    """Each element of a top-level array, or each top-level value, with about how many bytes it takes."""
    decoder, buffer, inside, ended = json.JSONDecoder(), "", False, False
    with _opened(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        started, target = False, PIECE
        while True:
            buffer = buffer.lstrip(" \t\r\n,") if started else buffer.lstrip(" \t\r\n")
            if not started and buffer:
                started, inside = True, buffer[0] == "["
                buffer = buffer[1:] if inside else buffer
                continue
            if inside and buffer.startswith("]"):
                if not (rest := buffer[1:].lstrip(" \t\r\n")) and not ended:
                    more = stream.read(PIECE)
                    ended, buffer = not more, buffer + more
                elif rest:
                    raise BadInput(f"{path}: is not JSON (there is more after the array's end: {rest[:40]}); mend it")
                else:
                    return
                continue
            if buffer:
                try:
                    value, end = decoder.raw_decode(buffer)
                    # A number or literal may go on in what is not read yet; objects and arrays end where they end.
                    if ended or end < len(buffer) or isinstance(value, dict | list | str):
                        yield value, end
                        buffer, target = buffer[end:], PIECE
                        continue
                except RecursionError as error:
                    raise BadInput(f"{path}: is not JSON that can be read ({error}); mend it") from error
                except ValueError as error:
                    if ended:
                        raise BadInput(f"{path}: is not JSON ({error}); mend it, or name prose .txt") from error
            if ended:
                if inside:
                    raise BadInput(f"{path}: is not JSON (the array has no end); get a sound copy")
                return
            try:
                more = stream.read(target)
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
            target *= 2  # of a long value, so that trying again costs little in all
            ended, buffer = not more, buffer + more


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """CSV, or TSV: the first line names the columns, and every row has as many fields."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    quoted = delimiter == "," or _is_quoted(path, delimiter)
    with _opened(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        columns: list[str] = []
        try:
            for row, line in _cells(stream, delimiter, quoted):
                if not columns:
                    columns = row
                    if twice := next((name for name in columns if columns.count(name) > 1), None):
                        raise BadInput(f"{path}: has the columns {', '.join(columns)}; '{twice}' stands there twice")
                    continue
                if len(row) != len(columns):
                    raise BadInput(
                        f"{path}, line {line}: has {len(row)} fields, the first line names {len(columns)}; quote a "
                        "field that holds a separator, or mend the line"
                    )
                yield Row(f"line {line}", line, dict(zip(columns, row, strict=True)), sum(map(len, row)))
        except csv.Error as error:
            raise BadInput(f"{path}: is not sound {path.suffix[1:].upper()} ({error}); mend it") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _cells(stream: TextIO, delimiter: str, quoted: bool) -> Iterator[tuple[list[str], int]]:
    """Rows that are not empty, each with the line that it begins in."""
    reader = csv.reader(
        stream, delimiter=delimiter, strict=quoted, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    line = 1
    for row in reader:
        if row and any(cell.strip() for cell in row):
            yield row, line
        line = reader.line_num + 1


def _is_quoted(path: Path, delimiter: str) -> bool:
    """Whether quotation marks enclose fields.  In files of sentences, such as GLUE's, they are part of the text: read
    as if they enclosed fields, some row there ends in the middle or has too few."""
    with _opened(path) as raw:
        stream, width = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), 0
        try:
            for row, _ in _cells(stream, delimiter, quoted=True):
                width = width or len(row)
                if len(row) != width:
                    return False
        except (csv.Error, UnicodeDecodeError):
            return False
    return True


def _text(path: Path, piece: int) -> Iterator[Row]:
    """Pieces of a running text of about `piece` characters, cut at line ends.  Raises BadInput for what is no prose."""
    number, buffer = 0, ""
    for characters in _characters(path):
        if not number and not buffer:
            _check_prose(path, characters)
        buffer += characters
        while len(buffer) >= 2 * piece:
            ends = (buffer.find(c, piece - 1, 2 * piece) + 1 for c in "\n ")
            end = next((end for end in ends if end), piece)
            yield _piece(number, buffer[:end])
            number, buffer = number + 1, buffer[end:]
    if buffer:
        yield _piece(number, buffer)


def _characters(path: Path) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(path) as stream:
        while True:
            more = stream.read(PIECE)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(more, final=not more)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, position - pending + error.start) from error
            position += len(more)
            if text:
                yield text.removeprefix("\ufeff") if position <= PIECE else text
            if not more:
                return


def _piece(number: int, text: str) -> Row:
    return Row(f"piece {number + 1}", number + 1, {"text": text}, len(text), follows=number > 0)


def _check_prose(path: Path, beginning: str) -> None:
    if "\0" in beginning:
        raise BadInput(f"{path}: holds zero bytes, so it is no text; give {ROW_FORMATS}")
    if _JSON.match(beginning):
        try:
            json.JSONDecoder().raw_decode(beginning.lstrip())
        except RecursionError:
            return
        except ValueError as error:  # where the beginning is cut off it goes on
            if getattr(error, "pos", 0) < len(beginning.strip()) - 1 and "Unterminated" not in str(error):
                return
        raise BadInput(f"{path}: holds JSON, which is not read as prose; name it .jsonl (or .json)")


def _parquet(path: Path) -> Iterator[Row]:
    if find_spec("pyarrow") is None:
        raise BadInput(f"{path}: pyarrow is not installed; pip install 'parewell[data]'")
    import pyarrow  # not everyone has it
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as stream:
            for batch in ParquetFile(stream).iter_batches(batch_size=64):
                each = batch.nbytes // max(1, batch.num_rows)
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", number, _whole(fields), each)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read as Parquet ({first_line(error)}); get a sound copy") from error


def _whole(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what a table fills in for fields that a row does not have."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if v is not None}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return {k: cleaned(v) for k, v in fields.items() if v is not None}


def _of_datasets(path: Path) -> Iterator[Row]:
    """A folder that `save_to_disk` wrote, a folder of data files, or NAME, NAME:SPLIT, NAME:CONFIG:SPLIT on the hub."""
    if find_spec("datasets") is None:
        raise BadInput(f"{path}: the datasets package is not installed; pip install 'parewell[data]'")
    import datasets  # not everyone has it

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each try without a network would be a line
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path), streaming=True)
        else:
            found = _from_hub(datasets, str(path))
    except BadInput:
        raise
    except Exception as error:  # the library raises many kinds, from many places
        hint = "" if path.is_dir() else "; there is no such file or folder here either"
        raise BadInput(f"{path}: cannot be had as a data set ({first_line(error)}){hint}") from error
    if isinstance(found, dict):
        splits = sorted(found)
        if "train" not in splits and len(splits) != 1:
            options = f"{path}/SPLIT" if path.is_dir() else f"{path}:SPLIT"
            raise BadInput(f"{path}: has the splits {', '.join(map(str, splits))}; give one as {options}")
        found = found["train" if "train" in splits else splits[0]]
    return _numbered(found, path)


def _from_hub(datasets: Any, name: str) -> Any:
    name, *parts = name.split(":")
    if len(parts) == 2:
        return datasets.load_dataset(name, parts[0], split=parts[1], streaming=True)
    if not parts:
        configs = datasets.get_dataset_config_names(name)
        if len(configs) > 1:
            raise BadInput(f"{name}: has the configurations {', '.join(configs[:20])}; give one as {name}:CONFIG:SPLIT")
        return datasets.load_dataset(name, streaming=True)
    if parts[0] in datasets.get_dataset_config_names(name):
        return datasets.load_dataset(name, parts[0], streaming=True)
    return datasets.load_dataset(name, split=parts[0], streaming=True)


def _numbered(found: Iterable[Any], path: Path) -> Iterator[Row]:
    try:
        for number, fields in enumerate(found, 1):
            size = sum(len(str(value)) for value in fields.values())
            yield Row(f"row {number}", number, _whole(dict(fields)), size)
    except Exception as error:  # rows may still be fetched, and the library raises many kinds
        raise BadInput(f"{path}: cannot be read further ({first_line(error)})") from error


def is_empty(path: Path) -> bool:
    """Whether a file is there and has nothing but white space in it."""
    try:
        return path.is_file() and path.stat().st_size < PIECE and not path.read_bytes().strip()
    except OSError:
        return False
