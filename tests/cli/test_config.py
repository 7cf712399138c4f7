"""Options from a file: the same as on the command line, which comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from calib import BadInput
from cli.main import parewell
from tests.cli.test_commands import ROOT, run


@pytest.fixture
def job(tmp_path: Path, tiny_folder: Path, text_file: Path) -> Path:
    file = tmp_path / "job.toml"
    file.write_text(
        f'model = "{tiny_folder}"\ndata = "{text_file}"\nreference = "{tiny_folder}"\n'
        "rows = 4\nmemory-budget = 1.5\nlength = 16\njson = true\n"
    )
    return file


def test_a_file_says_what_the_command_line_would(job: Path, tiny_folder: Path, text_file: Path) -> None:
    shape = ["--rows", "4", "--memory-budget", "1.5", "--length", "16", "--json"]
    options = ("--data", text_file, "--reference", tiny_folder, *shape)
    assert json.loads(run("evaluate", "--config", job)) == json.loads(run("evaluate", tiny_folder, *options))


def test_the_command_line_comes_first(job: Path) -> None:
    shorter = json.loads(run("evaluate", "--config", job, "--length", 8))
    assert shorter["tokens"] == 4 * 7 and json.loads(run("evaluate", "--config", job))["tokens"] == 4 * 15
    job.write_text(job.read_text().replace("memory-budget", "memory_budget"))
    assert json.loads(run("evaluate", "--length", 8, "--config", job)) == shorter, "either way of writing, any order"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leangth = 3", "'leangth' is no option of evaluate; is length meant?"),
        ("config = 'x'", "'config' is no option of evaluate"),
        ("as_json = true", "'as_json' is no option of evaluate"),
        ("json = 1", "json is 1; it must be true or false"),
        ("length = true", "length is True; it must be a text or a number"),
        ("length = [1]", r"length is \[1\]; it must be a text or a number"),
        ("memory_budget = 1\nmemory-budget = 2", "memory-budget stands there twice"),
        ("length = ", "is no TOML file"),
        ("\ud800", "is no TOML file"),
    ],
)
def test_what_a_file_must_not_say(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(text, errors="surrogatepass")
    with pytest.raises(BadInput, match=said):
        CliRunner().invoke(parewell, ["evaluate", "--config", str(tmp_path / "job.toml")], catch_exceptions=False)


def test_values_are_checked_as_those_of_the_command_line(job: Path) -> None:
    job.write_text(job.read_text().replace("length = 16", "length = 2.5"))
    result = CliRunner().invoke(parewell, ["evaluate", "--config", str(job)])
    assert result.exit_code == 2 and "'2.5' is not a valid integer" in result.output


def test_options_that_are_given_repeatedly(tiny_folder: Path, tmp_path: Path) -> None:
    """As a list in a file, one after the other on the command line."""
    down, file = "model.layers.0.mlp.down_proj", tmp_path / "job.toml"
    for text, words, said in (
        (f'ignore = ["{down}", "first"]', (), "ignore 'first': no linear"),
        (f'ignore = ["{down}"]', ("--ignore", down, "--ignore", "second"), "ignore 'second': no linear"),
        (f'ignore = "{down}"', (), f"ignore is {down}; it must be a list of texts"),
        ("ignore = [1]", (), r"ignore is \[1\]; it must be a list of texts"),
    ):
        file.write_text(text)
        given = ["quantize", str(tiny_folder), str(tmp_path / "out"), "--config", str(file), "--scheme", "w4a16-g8"]
        with pytest.raises(BadInput, match=said):
            CliRunner().invoke(parewell, [*given, *words], catch_exceptions=False)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.toml: is no TOML file"):
        CliRunner().invoke(parewell, ["quantize", "--config", str(tmp_path / "none.toml")], catch_exceptions=False)


def test_a_shell_completes_commands_options_and_choices() -> None:
    def completed(words: str, place: int) -> list[str]:
        asked = {"_PAREWELL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        said = subprocess.run(
            [sys.executable, "-m", "cli"], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=True
        )
        return [line.partition(",")[2] for line in said.stdout.split()]

    assert completed("parewell q", 1) == ["quantize"]
    assert "--retain-multiplier" in completed("parewell unlearn --retain", 2)
    assert completed("parewell unlearn --method np", 3) == ["npo", "npo-js", "npo-forward-kl", "npo-alpha"]


def test_packages_say_that_they_have_types() -> None:
    assert all((ROOT / name / "py.typed").is_file() for name in ("calib", "compressor", "unlearn", "cli"))
