"""Two processes that share an unlearning, against one."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, command, torchrun
from tests.unlearn.conftest import Site

DMM = ["--method", "dmm", "--calibrate", 3, "--lr", 1e-3, "--epochs", 2]
JOBS = {
    "gradients of rows, held-out deletions": [*DMM, "--estimator", "gradients"],
    "folds": [*DMM, "--estimator", "folds", "--folds", 2, "--cache", "CACHE"],
    "oracles, and an audit": ["--method", "oracle-matching", "--oracles", 2, "--lr", 1e-3, "--epochs", 1, "--audit", 2],
    "no models, and a search for the rate": ["--method", "npo", "--epochs", 1],
}


def words_of(site: Site, job: list[Any], cache: Path) -> list[object]:
    files = ["--train", site.train, "--forget", site.forget]
    how = [] if "npo" in job else ["--training", site.training]
    words = [*files, *how, *job, "--length", 64, "--device", "cpu", "--json", "--allow-damage", "--yes"]
    return [cache if word == "CACHE" else word for word in words]


@pytest.fixture(scope="module")
def shared(words: Site, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """By a job's name: what two processes wrote in a folder of its own, and what they reported."""

    @functools.cache
    def made(name: str) -> tuple[Path, dict[str, Any]]:
        place = tmp_path_factory.mktemp("two")
        job = words_of(words, JOBS[name], place / "two-cache")
        two = torchrun("-m", "cli.main", "unlearn", words.model, place / "two", *job)
        assert two.returncode == 0, two.stderr
        assert {file.name for file in place.iterdir()} - {"two-cache"} == {"two"}
        return place / "two/model.safetensors", json.loads(two.stdout)

    return made


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_write_what_one_writes(
    name: str, words: Site, shared: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    one = command("unlearn", words.model, tmp_path / "one", *words_of(words, JOBS[name], tmp_path / "one-cache"))
    assert one.returncode == 0, one.stderr
    weights, report = shared(name)
    assert json.loads(one.stdout) == report
    assert (tmp_path / "one/model.safetensors").read_bytes() == weights.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} - {"one-cache"} == {"one"}


def test_killed_and_continued_they_write_the_same_bytes(
    words: Site, shared: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    name = "gradients of rows, held-out deletions"
    job, (right, report) = words_of(words, JOBS[name], tmp_path / "cache"), shared(name)
    arguments = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "cli.main", "unlearn"]
    arguments += [words.model, tmp_path / "out", *job]
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as running:  # fmt: skip
        while not (tmp_path / ".out.journal/gradients-0.page").exists() and running.poll() is None:
            time.sleep(0.01)
        workers = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        for pid in [running.pid, *map(int, workers)]:
            os.kill(pid, signal.SIGKILL)
    alone = command("unlearn", words.model, tmp_path / "out", *job, "--resume")
    assert alone.returncode == 2 and "runs_on.processes was 2 and is now 1" in alone.stderr
    again = torchrun("-m", "cli.main", "unlearn", words.model, tmp_path / "out", *job, "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == right.read_bytes()
    assert json.loads(again.stdout) == report


def test_what_one_process_meets_ends_all_with_one_line(words: Site, tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"epochs": 2, "batch": 6, "lr": 1e30, "optimiser": "sgd"}')
    job = ["--train", words.train, "--forget", words.forget, "--training", tmp_path / "how.json", *DMM, "--yes"]
    ran = torchrun("-m", "cli.main", "unlearn", words.model, tmp_path / "out", *job, "--length", 64, "--device", "cpu")
    assert ran.returncode != 0
    told = [line for line in ran.stderr.splitlines() if line.startswith("parewell: ") and "forget 3 of" not in line]
    assert len(told) == 1 and "lower" in told[0], ran.stderr
    refused = torchrun("-m", "cli.main", "unlearn", words.model, tmp_path / "out", *job, "--length", 1)
    assert refused.stderr.count("parewell: length is 1") == 1
    assert not (tmp_path / "out").exists()
