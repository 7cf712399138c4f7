"""Commands that read what a job wrote say what they need where they are given something else."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from calib import BadInput
from cli.main import parewell

WRITTEN = "give a folder that parewell quantize, distill, unlearn or export wrote"


@pytest.mark.parametrize(
    ("command", "file"),
    [("show", "parewell.json"), ("report", "report.json"), ("replay", "parewell.json"), ("predict", "report.json")],
)
def test_a_plain_model_a_file_or_nothing(command: str, file: str, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    for given, why in (
        (tiny_folder, f"has no {file}"), (tmp_path / "text.txt", "is a file"), (tmp_path / "nothing", "no such folder"),
    ):  # fmt: skip
        arguments = [*[str(given)] * 3, "--kl", "0.1"] if command == "predict" else [str(given)]
        arguments += [str(tmp_path / "dst")] if command == "replay" else []
        with pytest.raises(BadInput) as found:
            CliRunner().invoke(parewell, [command, *arguments], catch_exceptions=False)
        assert str(found.value).startswith(f"{given}: {why}") and str(found.value).endswith(WRITTEN)
    with pytest.raises(BadInput, match="cannot be read"):
        CliRunner().invoke(parewell, ["show", "x" * 300], catch_exceptions=False)
