"""The page of a soup, its verdict, and the figures by which outputs are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from calib.report.charts import Axis, Line, chart
from calib.report.html import Report, Steps, Verdict, as_json, load_lines, render_page
from compressor.report.common import page_data, recovered_phrase
from compressor.report.distillation import COMPARED, sizes
from compressor.report.verdict import level_of

GOOD_ABOVE, POOR_ABOVE = 0.0, 0.02  # of the soup's perplexity over the best model's


def soup_rows(report: Report) -> list[tuple[Any, ...]]:
    """Table rows of the models and their mean: share and perplexity on held-out rows."""
    rows = [(model["name"], f"{model['share']:.3g}", model["perplexity"]) for model in report["models"]]
    return [*rows, ("the soup", "", report["quality"]["perplexity"])]


def soup_verdict(report: Report) -> Verdict:
    """Judge a soup beside the best of its models, and by the barrier on the line between two."""
    best = min(model["perplexity"] for model in report["models"])
    own = report["quality"]["perplexity"]
    level = level_of((own / best - 1, GOOD_ABOVE, POOR_ABOVE))
    if (found := report["damage"]["found"]) is not None:
        return Verdict("bad", f"Bad: {found}; written all the same, as --allow-damage was given.", "")
    beside = f"{abs(own / best - 1):.1%} {'above' if own > best else 'below'} the best of its models"
    barrier = ""
    if report["line"]:
        barrier = f"; between the two the loss is {barrier_of(report):.3g} nats above a straight line at most"
    return Verdict(
        level, f"{level.capitalize()}: its perplexity is {beside}.",
        f"On {report['quality']['tokens']:,} held-out tokens {own:.3f}, {best:.3f} at best{barrier}"
        f"{recovered_phrase(report)}.",
    )  # fmt: skip


def barrier_of(report: Report) -> float:
    """How far the loss lies above the straight line between both ends, at most: the barrier of linear mode connectivity
    (arXiv:1912.05671), in nats."""
    line = [(point["share"], math.log(point["perplexity"])) for point in report["line"]]
    first, last = line[0][1], line[-1][1]
    return max(loss - ((1 - share) * first + share * last) for share, loss in line)


def soup_page(report: Report, steps: Steps = ()) -> str:
    """Render the page of a soup's report; `steps` are its recipe's."""
    curves = []
    if report["line"]:
        curves = [
            chart(
                {Line("measured", "measured"): [point["perplexity"] for point in report["line"]]},
                f"From {report['models'][0]['name']} to {report['models'][1]['name']}",
                x=Axis("share of the second", "weights"), y=Axis("perplexity", "held-out rows"),
                at=[point["share"] for point in report["line"]],
            )
        ]  # fmt: skip
    return render_page(
        Path(__file__).parent / "templates/job.html", title="parewell: soup",
        heading=f"Mean of {len(report['models'])} models", verdict=soup_verdict(report),
        files={"report.json": as_json(report)}, figures=(("", "share", "perplexity"), soup_rows(report)),
        curves=curves, lines_of=load_lines(["transformers", "vLLM", "parewell.load"]),
        **page_data(report, steps, "averaged"),
    )  # fmt: skip


def soup_figures(report: Report) -> dict[str, float]:
    """Figures of a soup, by the names under which outputs are compared."""
    quality = {text: report["quality"][name] for name, text in COMPARED.items()}
    return {text: value for text, value in quality.items() if value is not None} | sizes(report)
