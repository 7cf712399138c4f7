"""`parewell push DIR REPO`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from calib import BadInput
from calib.model.config import RECIPE
from calib.report.html import Report
from cli.command import GroupedCommand
from cli.folders import check_written
from cli.from_dataclass import THRESHOLD
from cli.report import read_report


@click.command(
    cls=GroupedCommand, short_help="Upload an output to the Hugging Face hub.",
    examples={
        "parewell push OUT NAME/MODEL-W4": "into a private repository, made where there is none",
        "parewell push OUT NAME/MODEL-W4 --dry-run": "what would be uploaded, and how large it is",
    },
)  # fmt: skip
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private/--public", default=True, show_default=True, help="who may see the repository")
@click.option("--dry-run", is_flag=True, help="check everything and list the files; upload nothing")
@click.option("--allow-damage", is_flag=True, help="upload a model that --allow-damage kept although it is much worse")
@click.option("--allow-recovery", is_flag=True, help="upload a model in which forgotten knowledge is recovered")
@click.option("--json", "as_json", is_flag=True, help="print the files and the address as JSON on stdout")
def push_command(
    out: Path, repository: str, private: bool, dry_run: bool, allow_damage: bool, allow_recovery: bool, as_json: bool
) -> None:
    """Upload DIR, a folder that parewell wrote, to the repository REPO of the Hugging Face hub, in one commit.

    Weights, tokenizer, model card, report and recipe go; other files in DIR stay here.
    """
    from calib.jobs.push import check_repository, files_to_push, push_folder

    check_repository(repository)
    check_written(out, RECIPE)
    report = read_report(out)[0]
    check_publishable(out, report, allow_damage=allow_damage, allow_recovery=allow_recovery)
    files, others = files_to_push(out)
    sizes = {file.as_posix(): (out / file).stat().st_size for file in files}
    found: dict[str, Any] = {
        "repository": repository, "private": private, "files": sizes, "left_out": [file.as_posix() for file in others]
    }  # fmt: skip
    if not dry_run:
        found["url"] = push_folder(out, files, repository, private=private)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, size in sizes.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
    if others:
        click.echo(f"Left out, as parewell did not write them: {', '.join(found['left_out'])}")
    kind = "private" if private else "public"
    click.echo(found.get("url", f"Nothing was uploaded; without --dry-run this goes to {repository} ({kind})."))


def check_publishable(out: Path, report: Report, *, allow_damage: bool = False, allow_recovery: bool = False) -> None:
    """Raises BadInput where an output is not whole, or was kept although it failed its proof."""
    damage, recovery = report.get("damage") or {}, report.get("recovery") or {}
    if (damage.get("found") or damage.get("lost")) and not allow_damage:
        raise BadInput(f"{out}: is much worse than what it was made from, as was allowed; push it with --allow-damage")
    limit = THRESHOLD if recovery.get("threshold") is None else recovery["threshold"]
    if recovery.get("worst", 0) > limit and not allow_recovery:
        raise BadInput(
            f"{out}: {recovery['worst']:.0%} of what was forgotten is recovered; push it with --allow-recovery"
        )
    weights = [file for kind in ("safetensors", "gguf", "onnx*") for file in out.glob(f"*.{kind}")]
    held, expected = sum(file.stat().st_size for file in weights), report.get("bytes", {}).get("after", 1)
    if held < expected:
        raise BadInput(
            f"{out}: holds {held:,} bytes of weights, and its report says {expected:,}; it is incomplete, make it again"
        )
    if report["job"] == "quantize":
        import torch

        from compressor.engine.load import open_checkpoint

        open_checkpoint(out, torch.device("cpu"))
    elif any(out.glob("model*.safetensors")):
        from calib.model.weights import Weights

        Weights(out)
