"""`parewell report OUT`, and of two outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import click
from rich.console import Console

from calib import BadInput
from calib.jobs.recipe import read_recipe
from calib.model.config import RECIPE, read_json
from calib.report.html import Report
from cli.command import GroupedCommand
from cli.compare import Comparison, compare_reports, comparison_page
from cli.console import (
    print_classification,
    print_comparison,
    print_distillation,
    print_export,
    print_quantization,
    print_soup,
    print_unlearning,
)
from cli.folders import check_written
from cli.from_dataclass import check_page
from compressor.report.distillation import classified_figures, classified_page, distilled_page, language_figures
from compressor.report.export import exported_figures, exported_page
from compressor.report.quantization import quantized_page
from compressor.report.soup import soup_figures, soup_page
from unlearn.report.unlearning import unlearned_figures, unlearned_page


@dataclass(frozen=True)
class Kind:
    """Functions that show the report of one kind of job."""

    needs: set[str]
    page: Callable[..., str]
    show: Callable[..., None]
    figures: Callable[[Report], Mapping[str, float]]


REPORT_KINDS = {
    "quantize": Kind(
        {"scheme", "quality", "layers", "loaders"}, quantized_page, print_quantization, language_figures
    ),
    "distill": Kind(
        {"student", "quality_by_stage", "parameters"}, distilled_page, print_distillation, language_figures
    ),
    "unlearn": Kind({"method", "quality_by_stage", "rows"}, unlearned_page, print_unlearning, unlearned_figures),
    "classify": Kind(
        {"student", "quality_by_stage", "parameters"}, classified_page, print_classification, classified_figures
    ),
    "soup": Kind({"models", "line", "quality"}, soup_page, print_soup, soup_figures),
    "export": Kind({"to", "bytes", "bits_per_weight", "loaders"}, exported_page, print_export, exported_figures),
}  # fmt: skip


@click.command(
    cls=GroupedCommand, short_help="A report on the terminal, or of two outputs side by side.",
    examples={
        "parewell report OUT": "figures and verdict",
        "parewell report OUT OTHER --html both.html": "what differs, as a page",
    },
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write the page to this file as well")
def report_command(out: Path, other: Path | None, as_json: bool, html: Path | None) -> None:
    """The report that lies in OUT, on the terminal; with OTHER, what both outputs have and how it differs."""
    check_page(html)
    content, page = read_report(out)
    if other is not None:
        beside = read_report(other)[0]
        with _as_written(out, other):
            comparison = _compared((out, other), (content, beside))
            content, page = comparison.asdict(), comparison_page(comparison)
    if html is not None:
        html.write_text(page, encoding="utf-8", errors="backslashreplace")
    if as_json:
        click.echo(json.dumps(content))
    elif other is not None:
        print_comparison(comparison)
    else:
        REPORT_KINDS[content["job"]].show(content)


def read_report(out: Path) -> tuple[Report, str]:
    """A report and its page.  Raises BadInput where either is not as parewell writes it."""
    check_written(out, "report.json")
    content = read_json(out / "report.json")
    kind = REPORT_KINDS.get(str(content.get("job")))
    if kind is None or not kind.needs <= content.keys():
        raise BadInput(f"{out / 'report.json'}: is no report of parewell's")
    steps = read_recipe(out) if (out / RECIPE).exists() else []
    with _as_written(out):
        kind.show(content, Console(file=StringIO(), markup=False))  # what cannot be shown is not shown by half
        return content, kind.page(content, steps)


@contextmanager
def _as_written(*outs: Path) -> Iterator[None]:
    """Raises BadInput where a report lacks what is read inside."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # there is no end to what may be wrong in a file that anyone may have written
        which = " or ".join(str(out / "report.json") for out in outs)
        raise BadInput(f"{which}: is not as parewell writes it ({error!r}); make OUT again") from error


def _compared(outs: tuple[Path, Path], reports: tuple[Report, Report]) -> Comparison:
    a, b = (out.resolve().name for out in outs)
    names = (a, b) if a != b else (str(outs[0]), str(outs[1]))
    first, second = (REPORT_KINDS[content["job"]].figures(content) for content in reports)
    comparison = compare_reports(names, reports, (first, second))
    if not comparison.figures and not comparison.layers:
        raise BadInput(
            f"{outs[0]} ({reports[0]['job']}) and {outs[1]} ({reports[1]['job']}): their reports share nothing that "
            "could be compared; give two outputs of one kind"
        )
    return comparison
