"""Places, permissions, memory, terminals, clocks: what a job meets outside of its input.

What cannot be is refused with status 2 and nothing written; what fails on the way ends with status 1 and one line; what
is only odd works.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import BadInput, embedded
from calib.jobs.journal import check_journal
from calib.jobs.output_folder import beside
from cli.main import run_cli
from compressor import Evaluate, Quantize, evaluate, quantize
from tests.kills import digest
from tests.processes import ROOT
from tests.unprivileged import unprivileged

SMALL = ("--samples", "4", "--held-out", "2", "--length", "16", "--no-learn", "--scheme", "w4a16-channel")
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Run a command -> its exit status and what it said on stderr, a line where it did not end well."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["parewell", *map(str, arguments)])
        try:
            run_cli()
        except SystemExit as stop:
            (line,) = capsys.readouterr().err.strip().splitlines()  # an interrupt ends the terminal's line first
            return int(stop.code or 0), line
        return 0, capsys.readouterr().err

    return run


@pytest.fixture
def quantized(said: Said, text_file: Path) -> Said:
    """`parewell quantize MODEL OUT ...`, small."""
    return lambda model, out, *more: said("quantize", model, out, "--data", text_file, *SMALL, *more)


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# Places.


def test_names_of_any_script_of_several_lines_and_long_ones(
    model: Path, tmp_path: Path, quantized: Said, text_file: Path
) -> None:
    odd = tmp_path / "模型 é\u202e𝕏"
    model.rename(odd)
    assert quantized(odd, tmp_path / "plain") == (0, "")
    for name in ("büro", "two\nlines", "-x'\"$(y)", "x" * 240):
        out = tmp_path / name
        assert quantized(odd, "./" + os.path.relpath(out)) == (0, "")
        assert digest(out)["model.safetensors"] == digest(tmp_path / "plain")["model.safetensors"]
    before = tree(tmp_path)
    for out, words in (
        (tmp_path / ("x" * 300), "too long a name"),
        (tmp_path / ("d/" * 3000), "leads nowhere"),
        (tmp_path / "no\nsuch/out", r"no\nsuch: is no folder"),
        (tmp_path / os.fsdecode(b"not\xff"), r"not\udcff: is not UTF-8"),
    ):
        status, line = quantized(odd, out)
        assert status == 2 and words in line and tree(tmp_path) == before
    for name in ("x" * 5000, "no\nsuch", "\x1b[31m", "\0"):
        assert quantized(name, tmp_path / "out")[0] == 2 and tree(tmp_path) == before


def test_a_destination_that_is_a_link(model: Path, tmp_path: Path, quantized: Said) -> None:
    (tmp_path / "disk").mkdir()
    for target in ("disk/out", "disk/out"):  # once to nothing, once to what was written before
        (tmp_path / "out").unlink(missing_ok=True)
        (tmp_path / "out").symlink_to(target)
        assert quantized(model, tmp_path / "out") == (0, "")
        assert (tmp_path / "out").is_symlink() and "model.safetensors" in digest(tmp_path / "disk/out")
    (tmp_path / "circle").symlink_to("circle")
    before = tree(tmp_path)
    status, line = quantized(model, tmp_path / "circle")
    assert status == 2 and "leads nowhere" in line and tree(tmp_path) == before
    (tmp_path / "door").symlink_to("model")
    for out in ("door", "door/out"):
        status, line = quantized(model, tmp_path / out)
        assert status == 2 and "lies inside the model folder" in line


def test_shards_that_are_links(model: Path, tmp_path: Path, quantized: Said) -> None:
    file = model / "model.safetensors"
    file.rename(model / "real.safetensors")
    file.symlink_to("real.safetensors")
    assert quantized(model, tmp_path / "out") == (0, "")
    file.unlink()
    file.symlink_to("model.safetensors")
    status, line = quantized(model, tmp_path / "out2")
    assert status == 2 and "model.safetensors" in line
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    status, line = quantized(model, tmp_path / "out2")
    assert status == 2 and "leads nowhere" in line
    (model / "real.safetensors").rename(tmp_path / "elsewhere.safetensors")
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    status, line = quantized(model, tmp_path / "out2")
    assert status == 2 and "a file outside the folder" in line and not (tmp_path / "out2").exists()


def test_folders_that_must_not_be_written(model: Path, tmp_path: Path, quantized: Said) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for folder in (place, model):
        folder.chmod(0o555)
    with unprivileged():
        status, line = quantized(model, place / "out")
        assert status == 2 and line.endswith("place: cannot be written to") and not tree(place)
        assert quantized(model, tmp_path / "out") == (0, ""), "the model's folder is only read"
    assert os.access(tmp_path / "out" / "config.json", os.W_OK)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "."])
def test_files_that_must_not_be_read(name: str, model: Path, tmp_path: Path, quantized: Said) -> None:
    (model / name).chmod(0)
    with unprivileged():
        status, line = quantized(model, tmp_path / "out")
    (model / name).chmod(0o755)
    assert status == 2 and str(model) in line and "Permission denied" in line and not (tmp_path / "out").exists()


def test_data_that_must_not_be_read(model: Path, tmp_path: Path, quantized: Said) -> None:
    for name in ("x.txt", "x.jsonl", "x.safetensors"):
        (tmp_path / name).touch(0)
        with unprivileged():
            status, line = quantized(model, tmp_path / "out", "--data", tmp_path / name)
        assert status == 2 and name in line and "Permission denied" in line
        status, line = quantized(model, tmp_path / "out", "--data", tmp_path)
        assert status == 2, "a folder is no file"


# Two at once.


@pytest.mark.parametrize("command", ["quantize", "distill"])
def test_a_job_whose_destination_another_is_making(
    command: str, model: Path, tmp_path: Path, said: Said, text_file: Path
) -> None:
    journal = beside(tmp_path / "out", "journal")
    journal.mkdir()
    (journal / "job.page").write_bytes(b"of the other one")
    handle = os.open(journal, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = {file: file.read_bytes() for file in tree(tmp_path) if file.is_file()}
    small = ("--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16)
    more = ("--layers", 1) if command == "distill" else SMALL
    for resume in ((), ("--resume",), ("--no-resume",)):
        status, line = said(command, model, tmp_path / "out", *small, *more, *resume)
        assert status == 2 and "another run is writing it" in line
    with pytest.raises(BadInput, match="another run is writing it"):
        check_journal(tmp_path / "out", {}, None)
    assert {file: file.read_bytes() for file in tree(tmp_path) if file.is_file()} == before
    os.close(handle)


# Memory.


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["python", "torch", "c++", "system", "cuda"],
)
def test_no_memory_on_the_way(
    error: Exception, model: Path, tmp_path: Path, quantized: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    assert quantized(model, tmp_path / "whole") == (0, "")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compressor.quantization.stages"], "quantization_pass", exhausted)
        status, line = quantized(model, tmp_path / "out")
    assert status == 1 and "no memory left" in line and "--resume" in line
    assert ("--device-memory" in line) == isinstance(error, torch.OutOfMemoryError)
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out", "journal").exists()
    assert quantized(model, tmp_path / "out", "--resume") == (0, "")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_no_memory_for_real(model: Path, tmp_path: Path, text_file: Path) -> None:
    """As `ulimit -v` does it: enough to begin with, not for a vocabulary of a million."""
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 2_000_000}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(2_000_000, 24)
    save_file(tensors, model / "model.safetensors")
    script = (
        "import resource, sys; from cli import main; import cli.gates, compressor.quantization.cost;"
        "used = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1]) * 1024;"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, {resource.RLIM_INFINITY}));"
        "main()"
    )
    command = [sys.executable, "-c", script, "quantize", str(model), str(tmp_path / "out"), *SMALL]
    done = subprocess.run(
        [*command, "--data", str(text_file)], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "no memory left" in done.stderr, done.stderr


def test_no_memory_to_start_in() -> None:
    script = "import resource; from cli import main; m = 2**28; resource.setrlimit(resource.RLIMIT_AS, (m, m)); main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", str(embedded.MODEL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr == (
        "parewell: no memory to start in; give the process two gigabytes or more\n"
    )


# Terminals.


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_knows_no_arrows(
    encoding: str, model: Path, tmp_path: Path, quantized: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantized(model, tmp_path / "größe\u202e") == (0, "")
    for words in (("report", tmp_path / "größe\u202e"), ("show", tmp_path / "größe\u202e")):
        stdout, raw = BytesIO(), BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["parewell", *map(str, words)])
            patch.setattr(sys, "stdout", TextIOWrapper(stdout, encoding=encoding))
            patch.setattr(sys, "stderr", TextIOWrapper(raw, encoding=encoding))
            run_cli()
            sys.stdout.flush()
            assert b"w4a16-channel" in stdout.getvalue() and not raw.getvalue()


def test_a_reader_that_goes_away(model: Path, tmp_path: Path, quantized: Said) -> None:
    """As in `parewell show OUT | head -1`."""
    assert quantized(model, tmp_path / "out") == (0, "")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cli", "show", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, stdout=write, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


# Clocks.


def test_clocks_zones_and_languages_change_no_byte(
    model: Path, tmp_path: Path, quantized: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is interrupted, its files dated in the future, goes on elsewhere with its clock set back."""
    assert quantized(model, tmp_path / "whole") == (0, "")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compressor.quantization.stages"], "quantization_pass", interrupted)
        assert quantized(model, tmp_path / "out")[0] == 130
    for file in (*tree(model), *tree(beside(tmp_path / "out", "journal"))):
        os.utime(file, (4e9, 4e9))
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        patch.setenv("LC_ALL", "C")
        time.tzset()
        patch.setattr(time, "time", iter(range(10**6, 0, -1)).__next__)
        assert quantized(model, tmp_path / "out", "--resume") == (0, "")
    time.tzset()
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


# What is odd and works.


def _sharded(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    where = {}
    for i in range(3):
        some = names[i::3]
        save_file({name: tensors[name] for name in some}, model / f"part {i} é.safetensors", {"format": "pt", "x": "y"})
        where |= dict.fromkeys(some, f"part {i} é.safetensors")
    index = {"metadata": {"total_size": -3, "by": ["someone"]}, "weight_map": where, "more": None}
    (model / "model.safetensors.index.json").write_text("\ufeff" + json.dumps(index))


def _wide(model: Path, dtype: torch.dtype) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, model / "model.safetensors")


def _tied_twice(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")


def _old_frequencies(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, model / "model.safetensors")


def _marked(model: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        text = (model / name).read_text().replace("\n", "\r\n")
        (model / name).write_text(text + "\r\n\r\n", newline="")


def _more_files(model: Path) -> None:
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "training_args.bin", "notes é.txt"):
        (model / name).write_bytes(b"\xff not read")
    (model / "onnx").mkdir()


ODD = {
    "sharded, of odd names, index with more": _sharded,
    "float64": partial(_wide, dtype=torch.float64),
    "tied weights stored twice": _tied_twice,
    "frequencies stored by old versions": _old_frequencies,
    "CRLF in the config": _marked,
    "files beside that are nobody's": _more_files,
}


@pytest.mark.parametrize("change", ODD.values(), ids=list(ODD))
def test_models_that_are_odd_and_sound(
    change: Callable[[Path], None], model: Path, tiny_folder: Path, tmp_path: Path, quantized: Said, text_file: Path
) -> None:
    change(model)
    options = Evaluate(data=text_file, length=16, rows=4)
    assert evaluate(model, options).perplexity == pytest.approx(evaluate(tiny_folder, options).perplexity, rel=1e-9)
    assert quantized(model, tmp_path / "out") == (0, "")


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "%s"}\n',
        b'{"text": "%s"}\r\n\r\n',
        b'  {"text": "%s"}  \t\n\n  \n',
        b'{"id": 3, "text": "%s", "meta": {"url": null}, "text2": 1}',
        b'{"text": "%s"}',
    ],
    ids=["BOM", "CRLF", "spaces around", "other fields", "no end of line"],
)
def test_lines_that_are_odd_and_sound(content: bytes, model: Path, tmp_path: Path) -> None:
    words = b"the quick brown fox jumps over the lazy dog " * 9
    (tmp_path / "plain.txt").write_bytes(words)
    (tmp_path / "x.jsonl").write_bytes(content % words)
    plain, odd = (
        evaluate(model, Evaluate(data=tmp_path / name, length=16, by_document=False))
        for name in ("plain.txt", "x.jsonl")
    )
    assert plain == odd
    options = Quantize(scheme="w8a8", data=tmp_path / "x.jsonl", samples=4, held_out=2, length=16, learn=False)
    quantize(model, tmp_path / "out", options)
