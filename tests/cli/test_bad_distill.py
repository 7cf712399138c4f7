"""Bad input to `parewell distill`: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calib import embedded
from cli.main import main
from tests import tiny

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """Run `parewell distill TEACHER OUT ...` and return the one line it refuses with."""

    def run(*arguments: object, teacher: Path = tiny_folder, status: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        small = ["--samples", 4, "--held-out", 2, "--length", 16, "--steps", 2]
        data = [] if "--data" in arguments else ["--data", text_file]
        words = ["parewell", "distill", teacher, tmp_path / "out", *small, *data, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == status
        if status == 2:
            assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_tokenizers_that_differ(tmp_path: Path, refused: Refused, tiny_folder: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_folder, student)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    a, b = sorted(words, key=words.get)[5:7]
    words[a], words[b] = words[b], words[a]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer" in refused("--student", student)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--layers", 9], "the teacher has 2, 9 were asked for"),
        (["--layers", 0], "the teacher has 2, 0 were asked for"),
        (["--heads", 3], "ask for a multiple of 2"),
        (["--ffn", 4000], "the teacher has 40"),
        (["--hidden", 4000], "the teacher has 24"),
        ([], "no student: give --student DIR, a shape such as --layers 6"),
        (["--layers", 1, "--loss", "kl"], "loss 'kl' is unknown; choose from ce, alpha-beta"),
        (["--layers", 1, "--loss", "sinkhorn"], "blind to which row got which answer"),
        (["--layers", 1, "--loss", "0*ce+forward-kl"], "it must be positive"),
        (["--layers", 1, "--temperature", 0], "temperature is 0.0; it must be positive"),
        (["--layers", 1, "--temperature", "nan"], "must be positive"),
        (["--layers", 1, "--lr", -1], "lr is -1.0"),
        (["--layers", 1, "--on-policy", 2], "on-policy must lie between 0 and 1"),
        (["--layers", 1, "--answers-only"], "has no prompts"),
        (["--layers", 1, "--teacher", "top-k", "--temperature", 2], "was said at 1"),
        (["--layers", 1, "--cache", "here"], "an online teacher keeps nothing"),
        (["--layers", 1, "--merge"], "add --lora R"),
        (["--hidden", 16, "--loss", "ce+hidden"], "add --project"),
        (["--layers", 1, "--loss", "ce+hidden", "--balance", "gradient"], "use recap"),
        (["--layers", 1, "--loss", "ce+cka", "--teacher", "top-k"], "cannot be had from a teacher kept as top-k"),
        (
            ["--layers", 1, "--loss", "ce+spans"],
            'has no spans; give JSON lines such as {"text": ..., "spans": [[0, 12]]}',
        ),
        (["--layers", 1, "--loss", "ce+ofa-exits"], "loss ofa-exits: a student of one block"),
        (["--layers", 1, "--loss", "uskd"], "it is for sequence-classification"),
        (["--student-scheme", "w4"], "scheme 'w4' is unknown"),
        (["--student-scheme", "w4a16-g7"], "group size 7 does not divide"),
        (["--student-scheme", "w4a4", "--lora", 2], "is trained whole and on given text"),
        (["--layers", 1, "--samples", 100000], "were asked for"),
    ],
)
def test_options_that_will_not_do(arguments: list[object], word: str, refused: Refused) -> None:
    assert word in refused(*arguments)


def test_a_student_with_a_shape(tiny_folder: Path, refused: Refused) -> None:
    assert "leave out --layers" in refused("--student", tiny_folder, "--layers", 1)


def test_all_tokens_masked(tmp_path: Path, refused: Refused) -> None:
    """Prompts so long that no answer is left in the rows."""
    file = tmp_path / "prompts.jsonl"
    record = {"prompt": "the quick brown fox jumps over the lazy dog " * 40, "response": "yes"}
    file.write_text(f"{json.dumps(record)}\n" * 8)
    assert "all tokens are masked" in refused("--layers", 1, "--data", file, "--by-document", "--answers-only")


def test_labels_out_of_range(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((9, 16), tiny.VOCAB)}, file)
    assert "is beyond the model's vocabulary" in refused("--layers", 1, "--data", file)


def test_a_cache_of_another_model(tmp_path: Path, refused: Refused) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.txt").touch()
    assert "keeps no teacher's words" in refused("--layers", 1, "--teacher", "top-k", "--cache", cache)


def test_packages_that_are_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["compressor.distill"], "find_spec", lambda name: None)
    assert "pip install 'parewell[lora]'" in refused("--layers", 1, "--lora", 2)
    assert "pip install 'parewell[eight-bit]'" in refused("--layers", 1, "--eight-bit")


def test_a_quantized_teacher(tmp_path: Path, refused: Refused, tiny_folder: Path) -> None:
    teacher = tmp_path / "quantized"
    shutil.copytree(tiny_folder, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "is quantized already" in refused("--layers", 1, teacher=teacher)
    assert "was quantized by another tool" in refused("--student", teacher)


def test_a_loss_that_becomes_nan_keeps_the_last_good_state(tmp_path: Path, refused: Refused) -> None:
    line = refused("--layers", 1, "--lr", 1e30, "--steps", 9, "--warmup", 0, teacher=embedded.MODEL, status=1)
    assert "step " in line and "not finite" in line and "lower the learning rate" in line and "rows" in line
    assert (tmp_path / ".out.journal/distil.page").exists() and not (tmp_path / "out").exists()
