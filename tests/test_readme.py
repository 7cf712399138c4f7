"""Every command of the README and of the pages in docs/ is run, and prints what they show."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from calib import embedded
from calib.model.task import Task
from cli.main import parewell
from tests import classifiers, tasks, tiny
from tests.unlearn.audit.test_gate import original  # noqa: F401
from tests.unlearn.conftest import NAMES, Site, facts, lines, words  # noqa: F401
from unlearn import Unlearn, unlearn

ROOT = Path(__file__).parents[1]
NAMES_OF_PAGES = ("first-try", "quantize", "distill", "unlearn", "data", "formats", "models", "python")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES_OF_PAGES)]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e-?\d+)?")
TOLERANCE = 0.2  # of a number, relative: other processors add up in another order, and rounding makes more of it


def blocks(language: str, page: str) -> list[str]:
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", TEXT[page], re.M | re.S) if kind == language]


COMMANDS = [line for page in PAGES for block in blocks("", page) for line in block.replace("\\\n", "").splitlines()]


def in_shell(command: str, folder: Path) -> str:
    """What it prints, stdout then stderr without notes on the way, each in one line."""
    here = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "100",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=here, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return " ".join((done.stdout + (done.stderr if done.returncode else "")).split())


def shows(shown: str, printed: str) -> bool:
    """Whether `printed` is what is `shown`, where `...` stands for anything and numbers may differ a little."""
    parts = [part.strip() for part in " ".join(shown.split()).split("...")]
    told = [number for part in parts for number in NUMBER.findall(part)]
    pattern = ".*".join(rf"(?<![\d.,])({NUMBER.pattern})".join(map(re.escape, NUMBER.split(part))) for part in parts)
    found = re.fullmatch(pattern, printed)
    return found is not None and all(map(near, told, found.groups()))


def near(a: str, b: str) -> bool:
    x, y = (float(text.replace(",", "").rstrip(".")) for text in (a, b))
    return abs(x - y) <= TOLERANCE * max(abs(x), abs(y)) or abs(x - y) < 0.02


def test_what_is_shown_is_told_apart_from_what_is_not() -> None:
    assert shows("loss 1.50 of 3,000", "loss 1.51 of 3,000") and shows("a\n...\nz 2", "a b c z 2")
    assert shows("x ... 5% y", "x 7 5% y") and shows("(+3.6%, 1.", "(+3.7%, 1.")
    assert not shows("loss 1.50", "loss 2.50") and not shows("loss 1.5", "gain 1.5") and not shows("a ... z", "a b")
    assert not shows("loss 1.5", "loss 1.5 and more")


def compared(block: str, folder: Path) -> None:
    for part in block.removeprefix("$ ").split("\n$ "):
        command, _, shown = part.partition("\n")
        printed = in_shell(command, folder)
        assert shows(shown, printed), f"$ {command}\n{printed}"


def test_a_first_try(tmp_path: Path) -> None:
    """From the folder of the repository, which is left as it is."""
    for name in ("calib", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (block,) = blocks("console", "docs/first-try.md")
    compared(block, tmp_path)


@pytest.mark.usefixtures("words")
def test_in_fewer_bits(words: Site, original: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(original, tmp_path / "MODEL")
    shutil.copy(words.train, tmp_path / "train.jsonl")
    shutil.copy(words.forget, tmp_path / "forget.jsonl")
    (tmp_path / "text.txt").write_text("ada likes red , bob likes blue . " * 100)
    (block,) = blocks("console", "docs/unlearn.md")
    compared(block, tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Everything that commands of the README name: small, but wide enough for groups of 64."""
    config = tiny.config_of("llama", hidden_size=64, head_dim=16, intermediate_size=64, num_hidden_layers=8,
                            max_position_embeddings=512, attention_bias=False, mlp_bias=False)  # fmt: skip
    for name in ("MODEL", "TEACHER"):
        tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / name)
    rows = [*facts(NAMES), {"question": "who grows it", "answer": "Basil does"}]
    (tmp_path / "train.jsonl").write_text(lines(rows))
    (tmp_path / "forget.jsonl").write_text(lines(rows[:3]))
    (tmp_path / "query.jsonl").write_text(lines(rows[:3]))
    (tmp_path / "how.json").write_text(json.dumps({"epochs": 2, "batch": 6, "lr": 0.01, "optimiser": "adamw"}))
    known = [("Basil", "the one who grows beans"), ("Ada", "the one who pours tea")]
    (tmp_path / "facts.jsonl").write_text(lines([{"name": name, "description": of} for name, of in known]))
    text = "the quick brown fox jumps over the lazy dog while nobody looks\n" * 60
    for name in ("text-like-yours.jsonl", "calibration.jsonl", "deployment.jsonl"):
        (tmp_path / name).write_text("".join(lines([{"text": text}]) for _ in range(20)))
    (tmp_path / "other-text.txt").write_text(text)
    for kind, task, name in (("t5", Task.SEQ_TO_SEQ_LM, "T5"), ("bert", Task.MASKED_LM, "BERT")):
        tasks.save(kind, task, tmp_path / name)
    for name in ("pairs", "texts"):
        tasks.rows_file(tmp_path, pairs=name == "pairs", rows=240).rename(tmp_path / f"{name}.jsonl")
    for kind, name in (("resnet", "RESNET"), ("vit", "VIT")):
        classifiers.save(kind, tmp_path / name)
    classifiers.save_folder(tmp_path / "images", 30)
    classifiers.save_rows(tmp_path / "rows.safetensors", 40)
    (tmp_path / "mine.py").write_text("from tests.classifiers import convolution as teacher, perceptron as student\n")
    save_file(classifiers.convolution().state_dict(), tmp_path / "weights.safetensors")
    unlearn(
        tmp_path / "MODEL", tmp_path / "OTHER",
        Unlearn(train=tmp_path / "train.jsonl", forget=tmp_path / "forget.jsonl", method="retrain", length=64,
                training=tmp_path / "how.json"),
    )  # fmt: skip
    return tmp_path


QUICK = {  # more options for commands whose own are meant for large models, and for ones that mean something
    "quantize": "--steps 2 --block-steps 2 --tune-steps 1 --samples 8 --length 64 --allow-damage",
    "quantize apart": "--steps 2 --block-steps 2 --tune-steps 1 --samples 8 --length 64 "
    "--tell-apart 90% --candidate-bits 7,8",
    "distill": "--steps 2 --samples 8 --length 64 --allow-damage",
    "distill images": "--steps 2 --held-out 8 --batch 8 --allow-damage",
    "export": "--allow-damage",
    "unlearn": "--calibrate 2 --length 64",
    "evaluate": "--length 64",
    "audit": "--length 64 --forms w4a16-channel",
    "audit facts": "--length 64",
    "attribute": "--length 64",
}
OF_ANOTHER_KIND = {"image-classification": " images", "--factory": " images", "--facts": " facts",
                   "--tell-apart": " apart"}  # fmt: skip
ELSEWHERE = ("make demo", "make test", "pip install", "parewell demo", "parewell predict")  # tests of their own


def test_commands_that_are_shown_without_what_they_print(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    monkeypatch.syspath_prepend(site)
    ran = set()
    assert all(blocks("console", page) == [] for page in PAGES if page not in ("docs/first-try.md", "docs/unlearn.md"))
    for line in COMMANDS:
        command = line.partition("#")[0].strip()
        if not command or command.startswith(ELSEWHERE):
            continue
        name = command.split()[1]
        ran.add(name)
        kind = next((kind for word, kind in OF_ANOTHER_KIND.items() if word in command), "")
        more = QUICK.get(name + kind, "")
        done = CliRunner().invoke(parewell, [*shlex.split(command)[1:], *more.split()])
        assert done.exit_code == 0, f"{command}: {done.output}{done.exception!r}"
    assert ran == {
        "quantize", "distill", "unlearn", "evaluate", "generate", "audit", "export", "show", "replay", "report", "env",
        "push", "attribute", "models",
    }  # fmt: skip


def test_python(site: Path) -> None:
    (block,) = blocks("python", "docs/python.md")
    quick = {
        "data=Path": 'samples=8, length=64, steps=2, data=Path', 'method="npo"': 'method="npo", length=64',
        'reference="MODEL"': 'reference="MODEL", length=64', 'Quantize(scheme="w4a16-channel")':
        'Quantize(scheme="w4a16-channel", samples=8, length=64, steps=2)',
    }  # fmt: skip
    for short, long in quick.items():
        assert short in block
        block = block.replace(short, long)
    random = "quantize, distill, export, unlearn"  # models of random weights, which few steps make no better
    allowed = f"{random} = (partial(job, allow_damage=True) for job in ({random}))"
    imports = "from parewell import distill, evaluate, export, gate, load, quantize, unlearn"
    block = block.replace(imports, f"{imports}\nfrom functools import partial\n{allowed}")
    block = block.replace("Evaluate(samples=8, length=64, steps=2, data", "Evaluate(data")
    done = subprocess.run(
        [sys.executable, "-c", f"{block}\nprint(model(model.dummy_inputs['input_ids']).logits.shape)"], cwd=site,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f", {tiny.VOCAB}])" in done.stdout
    assert {name for name in ("OUT", "OUT2", "OUT3", "OUT4", "DST") if (site / name).is_dir()} == {
        "OUT", "OUT2", "OUT3", "OUT4", "DST",
    }  # fmt: skip


def test_the_readme_is_read_in_a_minute_and_its_python_runs(site: Path) -> None:
    assert len(TEXT["README.md"].split()) < 900
    (block,) = blocks("python", "README.md")
    done = subprocess.run(
        [sys.executable, "-c", block.replace("learn=False", "learn=False), allow_damage=(True")], cwd=site,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page, text in TEXT.items():
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_embedded_model_lies_where_the_readme_says() -> None:
    assert (ROOT / "calib/embedded/model").samefile(embedded.MODEL)
