"""Write docs/reliability.md: every bad input that the tests try, what parewell says, and what fuzzing and kills found.

    python -m benchmarks.reliability [--figures]

The tests of bad input are run, and each refusal is written down where it is made: the words of the command that matter,
the line that is printed, the exit status, and what is left on disk beside OUT. What people have, and what happens then,
stands in reliability_inputs.py. Figures of fuzzing and of kills lie in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.reliability_inputs import INPUTS, SEARCHED
from calib import one_line

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/reliability.md"
RESULTS = ROOT / "benchmarks/results"
GROUPS = {
    "tests/cli/test_bad_input.py": (
        "Models, texts and options",
        "What `quantize` refuses, and `evaluate`, `show` and `report` with it. All of a checkpoint is checked before "
        "anything is written: names, shapes, dtypes, values, and that no index leads out of the folder.",
    ),
    "tests/cli/test_bad_distill.py": ("Students and losses", "What `distill` refuses beside that."),
    "tests/cli/test_bad_distill_tasks.py": (
        "Encoder-decoders and masked language models as students",
        "What `distill` refuses of `--task seq2seq` and `--task masked-lm`.",
    ),
    "tests/cli/test_bad_images.py": (
        "Classifiers of images, and modules of one's own",
        "What `distill` refuses of them, and of teachers that learn together with a student.",
    ),
    "tests/cli/test_bad_unlearn.py": ("Rows to forget", "What `unlearn` and `audit` refuse beside that."),
    "tests/cli/test_bad_tasks.py": (
        "Masked, sequence-to-sequence and embedding models",
        "What `quantize` and `evaluate` refuse of models that are no causal language models.",
    ),
    "tests/cli/test_bad_export.py": ("Formats", "What `export` refuses beside that."),
    "tests/cli/test_surroundings.py": (
        "Places, memory, other jobs",
        "What a job meets outside of its input. Permissions are tried without root's right to ignore them.",
    ),
}
HAD = "What people have, and what happens"
SMALL = {("--samples", "4"), ("--held-out", "2"), ("--length", "16"), ("--scheme", "w4a16-channel"), ("--steps", "2")}
HEAD = """# What can go wrong, and what happens then

Written by `python -m benchmarks.reliability`, which runs the tests of bad input and writes down what they see; do not
edit it by hand.

- **Bad input** ends with status 2 and one line: what is wrong, where, what to do. Nothing is written. The line is one
  line whatever stands in names and files (control characters are escaped, long texts cut), so that a log stays a log.
- **What fails on the way** (memory, disk, a training that diverges) ends with status 1 and one line. What was done is
  in the journal beside OUT, and `--resume` goes on, unless it would only come to the same point again.
- **An interrupt** (Ctrl-C, SIGTERM) ends with status 130 and the command that continues. SIGKILL and SIGHUP leave the
  journal as it was.
- **OUT is complete or absent** at every moment: it is written beside, flushed and renamed.
- **A second job on one OUT** is refused while the first holds its lock, and the first does not notice.

What is odd and works, by the same tests (HOME, TMPDIR and closed streams tried by hand): names of any script, of
several lines, or 240 characters long; OUT a link, to nothing or to a folder of ours; shards that are links within the
folder or into a hub cache's blobs; a model that may only be read; HOME and TMPDIR that cannot be written; no standard
input or output; shards of odd names and an index with more in it; float64 weights; tied weights stored twice; BOM,
CRLF, spaces and further fields in JSON lines; files dated in the future, a clock that runs backwards, another time zone
or language between two parts of a job (same bytes); a terminal that knows no arrows. `| head -1` ends quietly. What no
Python can turn into a line: C++ that ends the process where a library cannot allocate while it is loaded (seen under
`ulimit -v 500000`, status 134; 250000 is one line, and from 1000000 on the tiny model is quantized), and SIGKILL by the
system's own killer; both leave what SIGKILL leaves.
"""

DEFECTS = """Found and mended, by spoiling alone (about 290,000 executions, before any coverage was looked at): messages
of several lines or megabytes with a file's own control characters in them; an index nested a thousand deep, or with a
name too long for the system; numbers of blocks, heads or widths that are negative, zero or beyond all bounds in a
config; recipes of other shapes where a quantized folder is opened, shown or trained on; reports that have a page and no
table, and text that the terminal takes for markup; journals, caches and teacher's pages with notes that are no notes;
TOML nested too deep; codes and rotations of the wrong shape in a quantized folder. By coverage: a tokenizer that fails
on text for want of its unknown token (in a first part of 414 seconds and 182,000 executions, after which readers were
forked). The inputs lie in `tests/fuzz/corpus` and are read again by every run of the tests, with 31 spoilt files for
each reader. The rows of codes and online are of a second run of 110 seconds, as inputs had been cut short in the first;
where few inputs are read it is because most of what spoils a file is found out."""


@dataclass(frozen=True)
class Refusal:
    """Of a test: the words of the command, the line, the status, what lies beside OUT afterwards."""

    file: str
    test: str
    words: list[str]
    line: str
    status: int
    left: list[str]


class Recorder:
    """A plugin of pytest's that listens where `cli.main` refuses."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self._now = ("", "")

    def pytest_collection_finish(self) -> None:
        here = sys.modules["cli.main"]  # which the tests have imported, as pytest wants to see it before anyone does
        self._fail, here._fail = here._fail, self._failing  # type: ignore[attr-defined]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._now = (item.location[0], item.name)

    def _failing(self, message: str, status: int, **options: Any) -> NoReturn:
        left = [] if status == 2 or len(sys.argv) < 4 else beside(Path(sys.argv[3]))
        self.refusals.append(Refusal(*self._now, sys.argv[1:], message, status, left))
        self._fail(message, status, **options)
        raise AssertionError("it ends the process")


def beside(out: Path) -> list[str]:
    """In which states of its making OUT lies there."""
    found = sorted(out.parent.glob(f".{out.name}.*")) if out.parent.is_dir() else []
    return [*(["OUT"] if out.exists() else []), *(place.name.rpartition(".")[2] for place in found)]


def shown(text: str, most: int) -> str:
    """In a cell of a table: without places of this machine, as short as can be read."""
    text = re.sub(r"/[^\s:'\"]*/pytest-of-\w+/pytest-\d+/[^/\s:'\"]+/?", "", text).replace(str(ROOT), ".")
    text = re.sub(r"(.)\1{20,}", r"\1\1\1...", one_line(text))
    text = re.sub(r"((\S/)\2{9})(\2)+", r"\1...", text)
    text = text if len(text) <= most else text[: most - 3] + "..."
    for sign in "\\`*_{}[]<>|#":
        text = text.replace(sign, "\\" + sign if sign not in "<>|" else {"<": "&lt;", ">": "&gt;", "|": "&#124;"}[sign])
    return text


def command_of(words: list[str]) -> str:
    """Without what the tests put into every command to be small."""
    pairs = list(zip(words, [*words[1:], ""], strict=True))
    dropped = {i + k for i, pair in enumerate(pairs) for k in (0, 1) if pair in SMALL or _text(pair)}
    return shown(shlex.join(w for i, w in enumerate(words) if i not in dropped and w != "--no-learn"), 90)


def _text(pair: tuple[str, str]) -> bool:
    """Whether that is the text that all tests give."""
    return pair[0] == "--data" and pair[1].endswith("/text.txt")


def table(refusals: list[Refusal]) -> list[str]:
    lines = ["| what is wrong | command | what is printed | status | left |", "| --- | --- | --- | --- | --- |"]
    for r in refusals:
        name, _, of = r.test.partition("[")
        what = name.removeprefix("test_").replace("_", " ") + (f" ({of[:-1]})" if of else "")
        left = ", ".join(r.left) or "nothing"
        lines.append(f"| {shown(what, 110)} | {command_of(r.words)} | {shown(r.line, 220)} | {r.status} | {left} |")
    return lines


def inputs() -> list[str]:
    """The section of what people have."""
    lines = [
        "",
        f"## {HAD}",
        "",
        f"{sum(map(len, INPUTS.values()))} kinds of input. Where reports of other projects tell of one, they stand "
        "beside it; the others are from trials of this project's own.",
    ]
    for part, rows in INPUTS.items():
        lines += ["", f"### {part}", "", "| input | what happens | reports |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return [*lines, "", *SEARCHED.splitlines()]


def results(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def fuzzed() -> list[str]:
    found = results("fuzz")
    if found is None:
        return ["Not run yet."]
    rows = found["rows"]
    total = sum(row.get("executions", 0) for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    lines = [
        f"`{found['command']}`: {total:,} executions in {seconds:,} seconds, libFuzzer's seed 1, guided "
        "by coverage of our readers and of the JSON and TOML parsers. Nothing but success or one printable "
        "line counts; panics of libraries and anything that takes 20 s or 4 GiB count as defects too.",
        "",
        "| reader | executions | read | refused | slowest, s | defects |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row["reader"], *(f"{row.get(k, 0):,}" for k in ("executions", "read", "refused")))
        lines.append(f"| {' | '.join(cells)} | {row.get('slowest s', 0):.2f} | {shown(row['defects'], 200)} |")
    return lines


def killed() -> list[str]:
    lines = ["| job | what happens to it | runs | seeds | OUT absent, complete, partial | same bytes after --resume |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, job, what in (
        ("kills", "quantize", "SIGKILL"),
        ("kills-full-disk", "quantize", "a full disk"),
        ("kills-distill", "distill", "SIGKILL and SIGTERM in turn"),
        ("kills-distill-hangup", "distill", "SIGHUP"),
        ("kills-unlearn", "unlearn", "SIGHUP, SIGKILL, SIGTERM and SIGINT in turn"),
    ):
        if found := results(name):
            rows = found["rows"]
            out = Counter(row["OUT"] for row in rows)
            states = ", ".join(str(out[state]) for state in ("absent", "complete", "partial"))
            same = sum(row["resumed"] == "same bytes" for row in rows)
            seeds = ", ".join(str(row["seed"]) for row in rows) if len(rows) < 9 else f"0 to {rows[-1]['seed']}"
            lines.append(f"| {job} | {what} | {len(rows)} | {seeds} | {states} | {same} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--figures", action="store_true", help="only what people have, and what fuzzing and kills found"
    )
    if parser.parse_args().figures:
        text = re.split(rf"\n## (?:{HAD}|Fuzzing)\n", DOCUMENT.read_text())[0].splitlines()
    else:
        recorder = Recorder()
        status = pytest.main(["-q", *(str(ROOT / file) for file in GROUPS)], plugins=[recorder])
        assert status == 0, "a test fails: nothing is written"
        text = HEAD.splitlines()
        for file, (title, words) in GROUPS.items():
            some = [r for r in recorder.refusals if r.file == file]
            text += ["", f"## {title}", "", f"{words} {len(some)} cases of `{file}`.", "", *table(some)]
    text += [*inputs(), "", "## Fuzzing", "", *DEFECTS.splitlines(), "", *fuzzed(), "", "## Kills", "", *killed(), ""]
    DOCUMENT.write_text("\n".join(text))


if __name__ == "__main__":
    main()
