"""The command, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "cli.main", *arguments])


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In two processes."""
    return run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments])
