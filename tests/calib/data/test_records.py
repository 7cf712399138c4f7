"""Files of rows, compared with what csv, json, pyarrow and datasets read of them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from calib import BadInput
from calib.data.records import Row, lines_of_text, read_rows, take_drawn, take_first

ROWS = [
    {"text": 'a "quoted" word,\tand a tab', "label": "1"},
    {"text": "two\nlines", "label": "0"},
    {"text": "plain", "label": "1"},
]


def fields_in(path: Path) -> list[dict[str, object]]:
    return [row.fields for row in read_rows(path)]


def as_csv(path: Path, **config: str) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], **config)  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda p: p.write_text("\n".join(map(json.dumps, ROWS))),
    "nested.json": lambda p: p.write_text(json.dumps({"version": "1", "data": ROWS})),
    "x.ndjson": lambda p: p.write_text("\n".join(map(json.dumps, ROWS))),
    "X.JSONL": lambda p: p.write_text("\n".join(map(json.dumps, ROWS))),
    "x.csv": as_csv,
    "x.tsv": lambda p: as_csv(p, delimiter="\t"),
    "x.jsonl.gz": lambda p: p.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "x.json.zst": lambda p: p.write_bytes(zstandard.compress(json.dumps(ROWS).encode())),
    "x.parquet": lambda p: datasets.Dataset.from_list(ROWS).to_parquet(str(p)),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(str(p)),
    "splits": lambda p: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(p)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_out_of_every_kind_of_file(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert fields_in(tmp_path / name) == ROWS


def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    WRITERS["X.JSONL"](folder / "train.jsonl")
    assert fields_in(folder) == ROWS


def test_several_splits_are_named(tmp_path: Path) -> None:
    some = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train_sft": some, "test_sft": some}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(BadInput, match=r"has the splits test_sft, train_sft; give one as .*/SPLIT"):
        list(read_rows(tmp_path / "set"))
    assert fields_in(tmp_path / "set" / "test_sft") == ROWS


def test_fields_that_a_table_fills_in_are_not_there(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "tool", "content": "b", "name": "f"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    assert fields_in(tmp_path / "x.parquet") == rows


def test_quotation_marks_are_text_where_they_do_not_enclose_fields(tmp_path: Path) -> None:
    """As in GLUE: read as if they enclosed fields, rows would run into each other."""
    lines = ["sentence\tlabel", '"Peter" said no\t1', 'the 5" disk\t0', '"an open one\t1']
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    want = [dict(zip(("sentence", "label"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert fields_in(tmp_path / "x.tsv") == want


@given(st.lists(st.tuples(st.text("ab \",\t\n'", min_size=1), st.text("01", min_size=1)), min_size=1, max_size=6))
def test_quoted_tables_are_read_as_csv_wrote_them(rows: list[tuple[str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for ending, delimiter in (("csv", ","), ("tsv", "\t")):
            file = Path(folder) / f"x.{ending}"
            with file.open("w", newline="") as stream:
                writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
                writer.writerow(["text", "label"])
                writer.writerows(rows)
            assert [(f["text"], f["label"]) for f in fields_in(file)] == rows


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.lists(st.text())), max_size=4))
def test_an_array_is_what_json_reads(rows: list[dict[str, object]]) -> None:
    import tempfile

    rows = [{"number": i} | row for i, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a.json", json.dumps(rows)), ("b.json", "\n".join(map(json.dumps, rows)))):
            file = Path(folder) / name
            file.write_text(text)
            assert fields_in(file) == rows


def test_numbers_are_lines_and_rows_from_one(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": 2}]')
    (tmp_path / "x.csv").write_text('a,b\n"1\n2",3\n4,5\n')
    assert [row.place for row in read_rows(tmp_path / "x.jsonl")] == ["line 1", "line 3"]
    assert [row.place for row in read_rows(tmp_path / "x.json")] == ["row 1", "row 2"]
    assert [row.place for row in read_rows(tmp_path / "x.csv")] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "text\tlabel\na\tb\t1\n", r"line 2: has 3 fields, the first line names 2"),
        ("x.csv", "text,label\na,b,1\n", r"line 2: has 3 fields, the first line names 2"),
        ("x.csv", "text,label\na\n", r"line 2: has 1 fields"),
        ("x.csv", "text,text\na,b\n", r"'text' stands there twice"),
        ("x.csv", 'text,label\n"a,1\n', r"is not sound CSV"),
        ("x.json", '[{"a": 1}', r"the array has no end|is not JSON"),
        ("x.json", '[{"a": 1}, 3]', r"row 2: has none of the fields"),
        ("x.json", '{"a": ', r"is not JSON"),
        ("x.json", '[{"a": 1}]\n[{"a": 2}]', r"there is more after the array's end"),
        ("x.json", f'[{{"a": 1}}]{" " * 2**17}[{{"a": 2}}]', r"there is more after the array's end"),
        ("x.xml", "<a/>", r"'.xml' is no kind of file"),
        ("x.docx", "PK", r"'.docx' is no kind of file"),
        ("x.txt", '{"text": "a"}\n{"text": "b"}\n', r"holds JSON, which is not read as prose"),
        ("x.txt", '[{"text": "a"}]', r"holds JSON, which is not read as prose"),
        ("x.txt", '[\n  {"text": "a"},\n  {"text": "b"}\n]', r"holds JSON, which is not read as prose"),
        ("x.txt", '{\n  "text": "' + "a" * 2**17 + '"}', r"holds JSON, which is not read as prose"),
        ("x.txt", "a\0b", r"holds zero bytes"),
        ("x.jsonl.gz", "not gzip", r"cannot be read"),
        ("x.parquet", "PAR1", r"cannot be read as Parquet"),
        ("x.jsonl", "\ufeff[1]\n", r"line 1: has none of the fields"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message) as refusal:
        list(read_rows(tmp_path / name))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "a folder/x", "/no/such/place"])
def test_what_is_not_there_is_no_data_set(name: str) -> None:
    with pytest.raises(BadInput, match=r"No such file"):
        list(read_rows(Path(name)))


def test_a_data_set_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto anything")

    monkeypatch.setattr(datasets, "get_dataset_config_names", refused)
    with pytest.raises(BadInput, match=r"some/set: cannot be had as a data set \(no route\)"):
        list(read_rows(Path("some/set")))


def test_names_on_the_hub_say_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def loaded(*names: str, split: str | None = None, streaming: bool = False) -> object:
        asked.append((*names, split))
        return [{"text": "a"}] if split else {"train": [{"text": "b"}]}

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(
        datasets, "get_dataset_config_names", lambda name: ["raw", "v1"] if name == "two" else ["default"]
    )
    assert fields_in(Path("one")) == [{"text": "b"}]
    assert fields_in(Path("org/one:test")) == fields_in(Path("two:raw:test")) == [{"text": "a"}]
    assert asked == [("one", None), ("org/one", "test"), ("two", "raw", "test")]
    with pytest.raises(BadInput, match=r"configurations raw, v1; give one as two:CONFIG:SPLIT"):
        list(read_rows(Path("two")))


def test_pieces_of_a_text_make_it_whole_again(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\r\n" for i in range(30_000)) + "x" * 100_000 + " " + "yz " * 50_000
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = list(read_rows(tmp_path / "x.txt", piece=5000))
    assert "".join(piece.fields["text"] for piece in pieces) == text
    assert max(piece.size for piece in pieces) <= 10_000 and not pieces[0].follows and pieces[1].follows


def test_lines_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\n\n b \r\nc")
    assert [(row.number, row.fields["text"]) for row in lines_of_text(tmp_path / "x.txt")] == [
        (1, "a"),
        (3, " b "),
        (4, "c"),
    ]
    (tmp_path / "x.txt").write_text('{"a": b}, a line of prose in braces\n')
    assert len(list(lines_of_text(tmp_path / "x.txt"))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', "holds JSON"),
        ("a\nb\n".encode("utf-16-le"), "holds zero bytes"),
        ("a\nb\n".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"a\rb\rc\r", "line 1: has carriage returns"),
    ],
)
def test_lines_that_are_not_lines_of_text_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(lines_of_text(tmp_path / "x.txt"))


@pytest.mark.parametrize(("ending", "packed"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_archives_of_several_parts_are_read_whole(
    ending: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """As `cat` and parallel packers make them."""
    file = tmp_path / f"x.jsonl.{ending}"
    file.write_bytes(packed(b'{"text": "a"}\n') + packed(b'{"text": "b"}\n'))
    assert fields_in(file) == [{"text": "a"}, {"text": "b"}]


def rows_of(count: int) -> list[Row]:
    return [Row(f"row {i}", i, {"text": str(i)}, 1 + i % 3) for i in range(count)]


@given(st.integers(0, 200), st.integers(1, 60), st.integers(0, 2**31))
def test_drawn_rows_are_a_random_choice_that_is_just_enough(count: int, wanted: int, seed: int) -> None:
    rows = rows_of(count)
    some, everything = take_drawn(rows, lambda n, size: size >= wanted, seed)
    numbers = [row.number for row in some]
    assert len(set(numbers)) == len(numbers)
    size = sum(row.size for row in some)
    assert everything == (len(some) == count)
    assert size >= min(wanted, sum(row.size for row in rows))
    assert everything or size - some[-1].size < wanted
    assert some == take_drawn(iter(rows), lambda n, size: size >= wanted, seed)[0]


def test_every_row_is_as_likely_as_any_other() -> None:
    rows, seen = rows_of(12), [0] * 12
    for seed in range(3000):
        for row in take_drawn(rows, lambda n, _: n >= 4, seed)[0]:
            seen[row.number] += 1
    assert all(880 < count < 1120 for count in seen)  # 1000 each, standard deviation 26


def test_first_rows() -> None:
    rows = rows_of(5)
    assert take_first(rows, lambda n, _: n >= 2) == (rows[:2], False)
    assert take_first(rows, lambda n, _: n >= 5) == (rows, True)
    assert take_first(rows, lambda n, _: n >= 9) == (rows, True)
