"""Libraries that are too old or missing, or built without what is asked for, are named before anything else fails."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from calib import BadInput
from calib.runtime.device import pick_device
from cli.main import parewell
from cli.versions import check_versions
from tests.processes import ROOT

NEEDED = ["click>=8", "torch>=2.11", "transformers>=5.4,<6", 'torch>=9; extra == "other"']


def installed(patch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    patch.setattr(importlib.metadata, "version", version)
    patch.setattr(importlib.metadata, "requires", lambda name: NEEDED)


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.11", "2.13.0a0+git1", "3.0", "2.100.1"])
def test_what_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch=version, transformers="5.4.0")
    check_versions()


@pytest.mark.parametrize(
    ("torch", "transformers", "why"),
    [
        (
            "2.10.1+cu128",
            "5.4.0",
            "torch: version 2.10.1+cu128 is installed, and parewell needs torch>=2.11; pip",
        ),
        ("2.9", "4.57.6", "torch: version 2.9 is installed"),
        ("2.11.0", "5.3.0", "transformers: version 5.3.0 is installed, and parewell needs transformers>=5.4,<6; pip"),
        ("2.11.0", "4.57.6", "transformers: version 4.57.6 is installed"),
        ("2.11.0", "6.0.0", "transformers: version 6.0.0 is installed"),
        ("2.11.0", None, "transformers: is not installed; pip install 'transformers>=5.4,<6'"),
    ],
)
def test_what_is_not(torch: str, transformers: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before options and folders are looked at."""
    installed(monkeypatch, torch=torch, **({} if transformers is None else {"transformers": transformers}))
    for words in (["quantize", "away/from/here", "out"], ["evaluate", "a", "--rows", "0"], ["demo"]):
        with pytest.raises(BadInput) as found:
            CliRunner().invoke(parewell, words, catch_exceptions=False)
        assert str(found.value).startswith(why) and "\n" not in str(found.value)


def test_bounds_are_those_of_the_package() -> None:
    """And the oldest that are allowed are those that `make test-oldest` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = ("test", "dev", "benchmarks", "fuzz")  # extras that no user needs
    extras = [line for name, lines in project["optional-dependencies"].items() if name not in ours for line in lines]
    oldest = dict(line.split("==") for line in _lines(ROOT / "constraints-oldest.txt"))
    for requirement in (*project["dependencies"], *extras):
        name, _, bounds = requirement.partition(">=")
        assert (oldest[name] + ".").startswith(bounds.split(",")[0] + "."), requirement


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(BadInput, match=r"torch 2\.13\.0\+cpu is built without CUDA.*torch==2\.13\.0 from the index"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BadInput, match=r"built for CUDA 13\.0 and sees no device.*nvidia-smi.*--device cpu"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
