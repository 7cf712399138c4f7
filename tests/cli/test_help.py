"""What a command line looks like to who types it: groups, examples, other tools' names, old names, typing errors."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from calib import BadInput
from calib.jobs.options import GROUPS, RENAMED
from calib.jobs.recipe import read_recipe
from cli.command import HEADINGS, GroupedCommand
from cli.from_dataclass import PEERS_NAMES
from cli.main import parewell
from compressor import Distill, Quantize
from unlearn import Unlearn
from unlearn.options.estimators import ESTIMATORS
from unlearn.options.methods import METHODS

JOBS: dict[str, type[Any]] = {"quantize": Quantize, "distill": Distill, "unlearn": Unlearn}


def output_of(*words: str) -> str:
    return CliRunner().invoke(parewell, words, terminal_width=200).output


def options_of(command: str) -> dict[str, click.Option]:
    return {
        name: param
        for param in parewell.commands[command].params
        if isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts)
    }


@pytest.mark.parametrize("name", list(parewell.commands))
def test_every_command_says_what_it_does_in_a_line_and_shows_two_examples(name: str) -> None:
    command = parewell.commands[name]
    assert isinstance(command, GroupedCommand)
    assert command.short_help and len(command.short_help) <= 64 and command.short_help in output_of("--help")
    assert len(command.examples) == 2
    for line in command.examples:
        words = shlex.split(line)
        assert words[:2] == ["parewell", name]
        assert {word for word in words if word.startswith("--")} <= options_of(name).keys(), line
        assert line in output_of(name, "--help")


@pytest.mark.parametrize("name", JOBS)
def test_options_stand_in_groups_and_each_is_shown_once(name: str) -> None:
    text = output_of(name, "--help")
    headings = [line.rstrip(":") for line in text.splitlines() if line.rstrip(":") in HEADINGS.values()]
    assert headings == [HEADINGS[group] for group in GROUPS if f"\n{HEADINGS[group]}:\n" in text] and len(headings) >= 4
    first = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    flags = [f"--{f.name.replace('_', '-')}" for f in fields(JOBS[name])]
    assert [first.count(flag) for flag in flags] == [1] * len(flags)


def test_names_that_other_tools_use_are_taken_and_not_shown(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    text = output_of("quantize", "--help")
    for names in PEERS_NAMES.values():
        for name in names:
            assert f"--{name}" in options_of("quantize") and f"--{name}" not in text
    ours = ["--scheme", "w4a16-g8", "--samples", "4", "--length", "16"]
    theirs = ["--bits", "4", "--group-size", "8", "--num-calibration-samples", "4", "--max-seq-length", "16"]
    for words, out in ((ours, "ours"), (theirs, "theirs")):
        common = ["--data", str(text_file), "--held-out", "1", "--no-learn", "--allow-damage"]
        done = CliRunner().invoke(parewell, ["quantize", str(tiny_folder), str(tmp_path / out), *words, *common])
        assert done.exit_code == 0, done.output
    for file in ("model.safetensors", "parewell.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    (tmp_path / "job.toml").write_text('scheme = "w8a8"\nheld-out = 1\n')
    for words in (
        ["--config", str(tmp_path / "job.toml"), "--bits", "4"],
        ["--bits", "4", "--config", str(tmp_path / "job.toml")],
    ):
        small = ["--data", str(text_file), "--samples", "4", "--length", "16", "--group-size", "8", "--no-learn"]
        out = tmp_path / words[0].strip("-")
        done = CliRunner().invoke(parewell, ["quantize", str(tiny_folder), str(out), *words, *small, "--allow-damage"])
        assert done.exit_code == 0 and read_recipe(out)[-1]["scheme"] == "w4a16-g8", done.output
    assert "--bits is part of the scheme" in output_of("quantize", "m", "o", "--bits", "4", "--scheme=w8a16")


def test_group_sizes(tiny_folder: Path) -> None:
    assert Quantize(scheme="w4a16", group_size="32").scheme == "w4a16-g32"
    assert Quantize(scheme="W4A16", group_size="channel").scheme == "w4a16-channel"
    assert Quantize(scheme="w4a16").scheme == "w4a16-g128" == Quantize(scheme="w4a16-g128", group_size="128").scheme
    for options, message in (
        ({"scheme": "w4a16-g64", "group_size": "32"}, "leave one of them out"),
        ({"scheme": "nf4", "group_size": "32"}, "leave one of them out"),
        ({"group_size": "many"}, "is no number"),
    ):
        with pytest.raises(BadInput, match=message):
            Quantize(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("command", "old"), [(job, old) for job, names in RENAMED.items() for old in names])
def test_an_old_name_is_answered_with_the_new_one(command: str, old: str, tmp_path: Path) -> None:
    flag, new = f"--{old.replace('_', '-')}", f"--{RENAMED[command][old].replace('_', '-')}"
    assert f"{flag} is called {new}" in output_of(command, "m", "o", flag, "1")
    assert new in options_of(command) and RENAMED[command][old] in {f.name for f in fields(JOBS[command])}
    (tmp_path / "job.toml").write_text(f"{old} = 1\n")
    with pytest.raises(BadInput, match=f"'{old}' is called {new.removeprefix('--')}"):
        CliRunner().invoke(parewell, [command, "--config", str(tmp_path / "job.toml")], catch_exceptions=False)


def test_a_name_that_is_none_is_answered_with_the_nearest() -> None:
    assert "is quantize meant?" in output_of("quantise") and "choose from quantize, distill" in output_of("xyz")
    assert "--scheme" in output_of("quantize", "m", "o", "--sheme", "w4a16")


def test_the_help_of_a_method_shows_what_the_method_takes() -> None:
    def shown(*words: str) -> set[str]:
        lines = output_of("unlearn", *words, "--help").splitlines()
        return {line.split()[0] for line in lines if line.startswith("  --")}

    every = shown()
    ways = [("--method", method) for method in METHODS]
    ways += [("--method", "dmm", "--estimator", estimator) for estimator in ESTIMATORS]
    assert every == set().union(*(shown(*way) for way in ways))
    npo, dmm = shown("--method", "npo"), shown("--method=dmm")
    assert "--retain-loss" in npo - dmm and "--estimator" in dmm - npo and {"--lr", "--train", "--audit"} <= npo & dmm
    subsets = shown("--method", "dmm", "--estimator", "subsets")
    assert "--gp-noise" in subsets - dmm and "--width" in dmm - subsets
