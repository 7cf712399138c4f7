"""A job that is interrupted, killed, refused or out of room, and what --resume makes of what it left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calib import BadInput, NoSpace, embedded
from calib.jobs import journal, output_folder, training_loop
from calib.runtime import progress
from compressor import Quantize, quantize
from compressor.quantization.job import validate_quantization
from tests import tiny
from tests.compressor.quantization.test_quantize import SMALL
from tests.kills import digest, kill_and_resume

Forked = Callable[[int, bool | None], int]


@pytest.fixture
def forked(tiny_folder: Path, text_file: Path, tmp_path: Path) -> Forked:
    """A job in a child that dies, without a chance to clean up, at its n-th write, flush or rename.

    -> its exit status: 9 where it died, 0 where it ended well before that.
    """

    def run(moment: int, resume: bool | None) -> int:
        if (process := os.fork()) == 0:
            left = iter(range(moment))

            def dying(function: Callable[..., Any]) -> Callable[..., Any]:
                def step(*arguments: Any, **keywords: Any) -> Any:
                    if next(left, None) is None:
                        os._exit(9)
                    return function(*arguments, **keywords)

                return step

            for module in (output_folder, journal):
                for name in ("sync", "save_file"):
                    setattr(module, name, dying(getattr(module, name)))
            Path.rename, Path.write_text = dying(Path.rename), dying(Path.write_text)  # type: ignore[method-assign]
            options = replace(SMALL, data=text_file, block_steps=2, tune_steps=2)
            quantize(tiny_folder, tmp_path / "out", options, resume=resume)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    return run


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_moment_a_job_resumes_to_the_same_bytes(
    tiny_folder: Path, text_file: Path, tmp_path: Path, forked: Forked
) -> None:
    """OUT is complete or absent at every moment; going on ends with what an undisturbed run ends with."""
    out = tmp_path / "out"
    quantize(tiny_folder, tmp_path / "whole", replace(SMALL, data=text_file, block_steps=2, tune_steps=2))
    whole = digest(tmp_path / "whole")
    seen = set()
    for moment in range(0, 1000, 7):
        status = forked(moment, False)
        seen.add((status, out.exists()))
        if out.exists():
            assert digest(out) == whole
        if status == 0:
            break
        assert forked(moment + 3, True) in (0, 9), "killed again, a little later"
        assert forked(10**9, True) == 0
        assert digest(out) == whole
        assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}
        shutil.rmtree(out)
    assert seen >= {(9, False), (0, True)}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_from_outside_in_every_stage_and_resumed(tmp_path: Path) -> None:
    options = Quantize(
        scheme="w4a16kvfp8-channel", samples=8, held_out=2, length=32, steps=12, block_steps=2, tune_steps=4
    )
    job = partial(quantize, embedded.MODEL, options=options)
    kill_and_resume(job, tmp_path, ("float-2-0", "teacher-3", "learn", "learn-outcome", "block-4-0", "nearest", "tune"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_was_there_is_there_again_after_a_replacement_was_killed(
    tiny_folder: Path, text_file: Path, tmp_path: Path, forked: Forked
) -> None:
    out = tmp_path / "out"
    assert forked(10**9, None) == 0
    whole = digest(out)
    for moment in range(60, 1000, 5):
        status = forked(moment, False)
        with contextlib.suppress(RuntimeError), output_folder.atomic_folder(out, 0):
            raise RuntimeError
        assert digest(out) == whole
        if status == 0:
            break


def no_more_files(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_journal_of_another_job_is_refused_by_what_differs(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SMALL.without_learning(data=text_file)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["compressor.quantization.stages"], "quantization_pass", interrupted)
        quantize(tiny_folder, tmp_path / "out", options)
    assert {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    with pytest.raises(BadInput, match=r"interrupted; continue it with --resume, or discard it with --no-resume"):
        quantize(tiny_folder, tmp_path / "out", options)
    with pytest.raises(BadInput, match=r"options\.seed was 0 and is now 1"):
        quantize(tiny_folder, tmp_path / "out", replace(options, seed=1), resume=True)
    other = tiny.save(tiny.model_of(tiny.config_of("llama"), seed=5, dtype=torch.float32), tmp_path / "other")
    with pytest.raises(BadInput, match=r"model\.name was .* and is now other"):
        quantize(other, tmp_path / "out", options, resume=True)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"versions\.parewell was .* and is now 1\.0"):
        patch.setattr("importlib.metadata.version", lambda name: "1.0")
        quantize(tiny_folder, tmp_path / "out", options, resume=True)
    with (
        monkeypatch.context() as patch,
        pytest.raises(BadInput, match=r"runs_on\.products was float32 and is now float16"),
    ):
        patch.setattr(sys.modules["compressor.quantization.job"], "autocast_dtype", lambda *_: torch.float16)
        quantize(tiny_folder, tmp_path / "out", options, resume=True)
    twisted = tmp_path / "other" / tiny_folder.name
    shutil.copytree(tiny_folder, twisted)
    config = json.loads((twisted / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (twisted / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"model\.files\.config\.json was"):
        quantize(twisted, tmp_path / "out", options, resume=True)
    job = validate_quantization(tiny_folder, tmp_path / "out", options)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(sys.modules["calib.model.weights"], "safe_open", no_more_files)
        patch.setattr(sys.modules["compressor.quantization.quantize"], "validate_quantization", lambda *_: job)
        quantize(tiny_folder, tmp_path / "out", options, resume=True)
    assert (tmp_path / ".out.journal").exists(), "an error that passes costs nothing that was done"
    quantize(tiny_folder, tmp_path / "out", options, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "other"}


@pytest.mark.parametrize("failing", [0, 3, 8, 13, 20])
def test_a_full_disk_names_path_and_bytes_and_the_job_goes_on_once_there_is_room(
    failing: int, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SMALL, data=text_file, block_steps=2, tune_steps=2, memory_budget=3e-6)
    quantize(tiny_folder, tmp_path / "whole", options)
    count = iter(range(failing))

    def filling(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            if next(count, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **keywords)

        return step

    with monkeypatch.context() as patch, pytest.raises(NoSpace) as full:
        for target in ("calib.jobs.output_folder.save_file", "calib.jobs.journal.save_file", "os.posix_fallocate"):
            module, _, name = target.rpartition(".")
            patch.setattr(target, filling(getattr(sys.modules[module], name)))
        quantize(tiny_folder, tmp_path / "out", options)
    assert str(tmp_path) in str(full.value) and "needed; make room" in str(full.value)
    assert not (tmp_path / "out").exists()
    quantize(tiny_folder, tmp_path / "out", options, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}


def test_a_resumed_job_shows_where_it_stands(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Stages that are over say nothing, and the others begin where they were left."""
    monkeypatch.setattr(progress, "EVERY", 1e-9)  # a line for every unit
    options = replace(SMALL, data=text_file, learn=True, steps=6, block_steps=2, tune_steps=2)

    def lines(stops: list[bool]) -> list[str]:
        asked = iter(stops)
        monkeypatch.setattr(training_loop, "asked_to_stop", lambda: next(asked, False))
        with contextlib.suppress(KeyboardInterrupt):
            quantize(tiny_folder, tmp_path / "out", options, resume=True, allow_damage=True)
        return [line.removeprefix("parewell: ") for line in capsys.readouterr().err.splitlines()]

    def seen(told: list[str], stage: str) -> list[int]:
        """Units that lines say are done, each once, in order."""
        return list(dict.fromkeys(int(n) for line in told for n in re.findall(rf"{re.escape(stage)}: (\d+)/", line)))

    first = lines([False] * 4 + [True])
    assert seen(first, "learn")[-1] == 4 and seen(first, "float model")[-1] == 2 and not seen(first, "tune")
    (tmp_path / ".out.journal/float-states-0.page").unlink()  # blocks are walked again, which costs next to nothing
    again = lines([])
    assert seen(again, "float model")[-1] == 2 and not seen(again, "teacher")
    assert not [line for line in again if line.startswith("float model") and "left" in line]
    assert set(seen(again, "learn")) <= {4, 5, 6} and seen(again, "learn")[-1] == 6
    assert seen(again, "tune")[-1] == 2
