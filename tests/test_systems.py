"""docs/systems.md: its commands run in a small form, and the tests, figures and pages that it names are there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from calib import embedded
from calib.model.task import Task
from cli.main import parewell
from compressor import Distill, Quantize, distill, quantize
from tests import bert, classifiers, tasks

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/systems.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]


def test_all_are_there() -> None:
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 26))
    assert all(len(row) == 6 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[1].partition(" (")[0] for row in ROWS])
def test_what_is_named_is_there(row: list[str]) -> None:
    files = re.findall(r"`((?:tests|benchmarks)/[^`]+)`", " ".join(row))
    assert any(file.startswith("tests/") for file in files)
    assert all((ROOT / file).is_file() for file in files), files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands name."""
    folder = tmp_path_factory.mktemp("systems")
    for name in ("MODEL", "TEACHER"):
        shutil.copytree(embedded.MODEL, folder / name)
    few: dict[str, Any] = {"samples": 8, "length": 64}
    for name, seed in (("S", 0), ("A", 1), ("B", 2)):
        options = Distill(layers=3 if name == "S" else None, student=None if name == "S" else folder / "S", seed=seed,
                          loss="forward-kl", steps=3, held_out=4, **few)  # fmt: skip
        distill(folder / "TEACHER", folder / name, options, allow_damage=True)
    for bits in (3, 4, 8):
        options = Quantize(scheme=f"w{bits}a16-channel", rounding="rtn", learn=False, held_out=4, **few)
        quantize(folder / "MODEL", folder / f"W{bits}", options, allow_damage=True)
    tasks.save("t5", Task.SEQ_TO_SEQ_LM, folder / "T5")
    for name in ("BERT", "BERT2"):
        bert.save(folder / name)
    for kind, name in (("resnet", "RESNET"), ("vit", "VIT")):
        classifiers.save(kind, folder / name)
    classifiers.save_rows(folder / "rows.safetensors", 40)
    written = {
        "train": FACTS, "forget": FACTS[:4], "rows": FACTS,
        "labeled": [{"text": f"w{i} {('bad', 'good')[i % 2]}", "label": ("no", "yes")[i % 2]} for i in range(20)],
        "facts": [{"name": f"Ada {i}", "description": f"the one who counts to {i}"} for i in range(4)],
    }  # fmt: skip
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "deployment.jsonl").write_text(json.dumps({"text": "the quick brown fox jumps over it " * 400}) + "\n")
    (folder / "answers.txt").write_text("I don't know.\n")
    (folder / "how.json").write_text(json.dumps({"optimiser": "adamw", "epochs": 1, "batch": 6, "lr": 0.01}))
    return folder


FACTS = [{"question": f"how much is {i} and {i}", "answer": str(2 * i)} for i in range(16)]
QUICK = {
    "quantize": "--steps 2 --block-steps 2 --tune-steps 1 --samples 8 --held-out 4 --length 64",
    "distill": "--steps 2 --samples 8 --held-out 4 --length 64 --batch 2",
    "distill rewarded": "--steps 2 --held-out 4 --length 40 --batch 2 --group 2",
    "distill pairs": "--steps 2 --held-out 4 --length 16 --batch 2",
    "distill classifier": "--steps 2 --held-out 8 --batch 8",
    "evaluate": "--length 48 --rows 4",
    "unlearn": "--length 48 --epochs 2 --lr 1e-4",
    "unlearn matched": "--length 48 --epochs 2 --lr 1e-4 --calibrate 1",
    "audit": "--length 48",
}  # what makes a job meant for large models short
KINDS = {" --task seq2seq": " pairs", " --task ": " classifier", " --reward ": " rewarded", " --method dmm": " matched"}
DAMAGES = ("quantize", "distill", "unlearn")  # a few steps make models that a job rightly refuses to let pass


@pytest.mark.parametrize("row", ROWS, ids=[row[1].partition(" (")[0] for row in ROWS])
def test_its_command_runs(row: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = re.findall(r"`(parewell [^`]+)`", row[2])
    assert lines
    for line in lines:
        run(line, place)


def run(line: str, place: Path) -> None:
    name, *words = shlex.split(line)[1:]
    kind = next((kind for word, kind in KINDS.items() if word in line), "")
    more = QUICK.get(name + kind, "").split() + ["--allow-damage"] * (name in DAMAGES)
    shutil.rmtree(place / "OUT", ignore_errors=True)
    if name == "audit":
        shutil.copytree(place / "S", place / "OUT")
    done = CliRunner().invoke(parewell, [name, *words, *more])
    assert done.exit_code == 0, f"{line}: {done.output}{done.exception!r}"
