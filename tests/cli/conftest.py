"""What all tests of bad input do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import run_cli

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Run `parewell WORDS`, and return the one line that it ends with; nothing is written where the input is bad."""

    def run(*words: object, folder: Path = tmp_path, status: int = 2) -> str:
        before = sorted(folder.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["parewell", *map(str, words)])
        capsys.readouterr()  # bars of models that the test itself has saved
        with pytest.raises(SystemExit) as stop:
            run_cli()
        assert stop.value.code == status
        if status == 2:
            assert sorted(folder.rglob("*")) == before, "nothing may be written"
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run
