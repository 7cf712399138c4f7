"""`parewell report OUT`."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import click
from rich.console import Console

from calib import BadInput
from calib.checkpoint import read_json
from cli.tables import print_classification, print_distillation, print_quantization, print_unlearning
from compressor.pages import classified_page, distilled_page, quantized_page
from unlearn.page import unlearned_page

KINDS = {
    "quantize": ({"scheme", "quality", "layers", "loaders"}, quantized_page, print_quantization),
    "distill": ({"student", "quality_by_stage", "parameters"}, distilled_page, print_distillation),
    "unlearn": ({"method", "quality_by_stage", "rows"}, unlearned_page, print_unlearning),
    "classify": ({"student", "quality_by_stage", "parameters"}, classified_page, print_classification),
}


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write the page to this file as well")
def report(out: Path, as_json: bool, html: Path | None) -> None:
    """The report that lies in OUT, on the terminal."""
    content = read_json(out / "report.json")
    needed, page, show = KINDS.get(str(content.get("job")), ({"job"}, quantized_page, print_quantization))
    if "job" not in content or not needed <= content.keys() or str(content["job"]) not in KINDS:
        raise BadInput(f"{out / 'report.json'}: is no report of parewell's")
    try:
        written = page(content)
        show(content, Console(file=StringIO()))
    except Exception as error:  # there is no end to what may be wrong in a file that anyone may have written
        raise BadInput(f"{out / 'report.json'}: is not as parewell writes it ({error!r}); make OUT again") from error
    if html:
        html.write_text(written, encoding="utf-8", errors="backslashreplace")
    if as_json:
        click.echo(json.dumps(content))
    else:
        show(content)
