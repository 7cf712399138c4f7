"""Two processes that share an unlearning, against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


def words_of(site: Site, job: list[Any]) -> list[object]:
    files = ["--train", site.train, "--forget", site.forget]
    how = [] if "npo" in job else ["--training", site.training]
    return [*files, *how, *job, "--length", 64, "--device", "cpu", "--json", "--allow-damage", "--yes"]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_write_what_one_writes(name: str, words: Site, tmp_path: Path) -> None:
    def job(folder: str) -> list[object]:
        return [str(w).replace("CACHE", str(tmp_path / f"{folder}-cache")) for w in words_of(words, JOBS[name])]

    one = command("unlearn", words.model, tmp_path / "one", *job("one"))
    assert one.returncode == 0, one.stderr
    two = torchrun("-m", "cli.main", "unlearn", words.model, tmp_path / "two", *job("two"))
    assert two.returncode == 0, two.stderr
    assert json.loads(one.stdout) == json.loads(two.stdout)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} - {"one-cache", "two-cache"} == {"one", "two"}


def test_killed_and_continued_they_write_the_same_bytes(words: Site, tmp_path: Path) -> None:
    job = words_of(words, JOBS["gradients of rows, held-out deletions"])
    right = torchrun("-m", "cli.main", "unlearn", words.model, tmp_path / "right", *job)
    assert right.returncode == 0, right.stderr
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
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "right/model.safetensors").read_bytes()
    assert json.loads(again.stdout) == json.loads(right.stdout)


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
