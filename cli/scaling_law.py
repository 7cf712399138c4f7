"""`parewell predict OUT...`: a power law through the losses of several outputs, and the size that a loss takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from calib import BadInput
from calib.jobs.recipe import read_recipe
from calib.report.charts import AFTER, Axis, Line, chart
from calib.report.html import Verdict, as_csv, as_json, format_number, render_page
from calib.stats.scaling_law import (
    Band,
    FlooredLaw,
    Law,
    count_of,
    cut_size,
    fit,
    fit_floored,
    leave_one_out_errors,
)
from cli.command import GroupedCommand
from cli.from_dataclass import check_page
from cli.report import read_report

UNITS = {"quantize": "bits", "distill": "parameters"}  # what sizes are counted in, by job


@dataclass(frozen=True)
class Prediction:
    """Outputs by name, smallest first, with their sizes and losses in nats a token (KL from what they were made from,
    or cross-entropy, which has a floor); the law through them; and the size that `loss` takes.  `whole`: parameters of
    a teacher that all were cut out of."""

    unit: str
    whole: int | None
    names: Sequence[str]
    sizes: Sequence[float]
    losses: Sequence[float]
    law: Law | FlooredLaw
    loss: float

    @property
    def floored(self) -> bool:
        """Whether losses are cross-entropies."""
        return isinstance(self.law, FlooredLaw)

    @property
    def called(self) -> str:
        """The loss in words."""
        return "cross-entropy" if self.floored else "KL"

    @property
    def needed(self) -> Band:
        """Sizes that the loss takes by the law, with a 95% band."""
        size, low, high = self.law.needed(self.loss)
        return self._size(size), self._size(low), self._size(high)

    @property
    def scales(self) -> list[float]:
        """Sizes that were measured."""
        return _scales(self.unit, self.whole, self.sizes)

    def _size(self, scale: float) -> float:
        if self.whole is not None:
            return count_of(scale, self.whole)
        if self.unit != "bits":
            return scale
        return max(0.0, math.log2(scale)) if 0 < scale < math.inf else scale

    def rows(self) -> list[tuple[str, ...]]:
        """A head, then a row for each output."""
        off: list[tuple[str, ...]] = [
            ("–" if math.isnan(ratio) else f"{ratio - 1:+z,.1%}",)
            for ratio in leave_one_out_errors(self.scales, self.losses, floored=self.floored)
        ]
        head = ("", self.unit, f"{self.called}, nats", "by the fit", *(["over the fit to the others"] if off else []))
        return [
            head,
            *(
                (name, f"{size:,.4g}" if self.unit == "bits" else f"{size:,}", format_number(loss),
                 format_number(self.law.predicted(scale)[0]), *over)
                for name, size, scale, loss, over in zip(
                    self.names, self.sizes, self.scales, self.losses, off or [()] * len(self.names), strict=True)
            ),
        ]  # fmt: skip

    def verdict(self) -> str:
        """Describe the prediction in a sentence."""
        size, low, high = (_shown(value, self.unit) for value in self.needed)
        of = "2^(-bits)" if self.unit == "bits" else f"1 / {self.unit}"
        if self.whole is not None:
            of = f"ln({self.whole:,} / {self.unit})"
        falls = (
            f"the loss falls as {of} to the power {self.law.exponent:.3f} ± {self.law.exponent_error:.3f}, seen from "
            f"{len(self.names)} outputs."
        )
        if not isinstance(self.law, FlooredLaw):
            return f"A KL of {self.loss:g} nats takes {size} {self.unit} ({low} to {high}, 95%): {falls}"
        asked, floor = f"A perplexity of {math.exp(self.loss):.4g}", math.exp(self.law.floor)
        above = f"{math.exp(max(0.0, self.law.floor - self.law.floor_error)):.4g} to "
        above += f"{math.exp(self.law.floor + self.law.floor_error):.4g}"
        floors = f"above a floor of perplexity {floor:.4g} ({above}) {falls}"
        if self.loss <= self.law.floor:
            return f"{asked} is below what any size reaches by this law: {floors}"
        return f"{asked} takes {size} {self.unit} ({low} to {high}, 95%): {floors}"

    def asdict(self) -> dict[str, Any]:
        """The prediction as JSON has it."""
        return {
            "unit": self.unit,
            "outputs": [
                {"name": name, "size": size, "cross_entropy" if self.floored else "kl": loss}
                for name, size, loss in zip(self.names, self.sizes, self.losses, strict=True)
            ],
            "exponent": self.law.exponent,
            "exponent_error": self.law.exponent_error,
            "cross_entropy" if self.floored else "kl": self.loss,
            "floor": self.law.floor if isinstance(self.law, FlooredLaw) else None,
            "floor_error": self.law.floor_error if isinstance(self.law, FlooredLaw) else None,
            "needed": [value if math.isfinite(value) else None for value in self.needed],
            "teacher_parameters": self.whole,
            "over_the_law_of_the_others": [
                None if math.isnan(ratio) else ratio
                for ratio in leave_one_out_errors(self.scales, self.losses, floored=self.floored)
            ],
        }


@click.command(
    cls=GroupedCommand, short_help="The size at which a model would reach a loss.",
    examples={
        "parewell predict A B C --kl 0.1": "from three outputs or more of one kind",
        "parewell predict A B C --kl 0.1 --html law.html": "with a chart",
    },
)  # fmt: skip
@click.argument("outs", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--kl", type=float, help="the KL whose size is asked for, in nats per token")
@click.option(
    "--perplexity",
    type=float,
    help="the perplexity whose size is asked for, by a law with a floor (six outputs)",
)
@click.option("--json", "raw", is_flag=True, help="print the result as JSON on stdout")
@click.option("--html", type=click.Path(path_type=Path), help="write a page of it to this file")
def predict_command(
    outs: tuple[Path, ...], kl: float | None, perplexity: float | None, raw: bool, html: Path | None
) -> None:
    """The size at which a model would have a loss, from three outputs or more of one model in different sizes.

    Quantized outputs differ in bits, distilled ones in parameters.
    """
    if (kl is None) == (perplexity is None):
        raise BadInput("give --kl or --perplexity, and one of them")
    if kl is not None and not 0 < kl < math.inf:
        raise BadInput(f"kl is {kl}; it must be positive")
    if perplexity is not None and not 1 < perplexity < math.inf:
        raise BadInput(f"perplexity is {perplexity}; it must be above 1")
    check_page(html)
    found = predict_sizes(outs, kl) if kl is not None else predict_sizes(outs, math.log(perplexity or 1), floored=True)
    if html is not None:
        html.write_text(prediction_page(found), encoding="utf-8", errors="backslashreplace")
    if raw:
        click.echo(json.dumps(found.asdict()))
        return
    widths = [max(map(len, column)) for column in zip(*found.rows(), strict=True)]
    for name, *figures in found.rows():
        click.echo("  ".join([name.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:], strict=True))]))
    click.echo(found.verdict())


def predict_sizes(outs: Sequence[Path], loss: float, *, floored: bool = False) -> Prediction:
    """Predict the size of a `loss` in nats: KL, or cross-entropy where `floored`.  Raises BadInput where outputs are
    not of one kind, model and text, or show no law."""
    read = [_size_and_loss(out, floored=floored) for out in outs]
    if not floored and (count := len({size for size, *_ in read})) < 3:
        raise BadInput(f"a law needs three different sizes or more, and there are {count}")
    _check_alike(outs, [report for _, _, report, _ in read])
    measured = sorted(read, key=lambda one: one[0])
    unit = UNITS[measured[0][2]["job"]]
    sizes, losses = [one[0] for one in measured], [one[1] for one in measured]
    whole = None
    if unit == "parameters" and not floored:  # cross-entropy is no distance from the teacher
        whole = _teacher(outs, [report for _, _, report, _ in read])
    scales, names = _scales(unit, whole, sizes), [one[3] for one in measured]
    law = fit_floored(scales, losses) if floored else fit(scales, losses)
    return Prediction(unit, whole, names, sizes, losses, law, loss)


def _scales(unit: str, whole: int | None, sizes: Sequence[float]) -> list[float]:
    """What the loss is a power of: of bits, their levels."""
    if whole is not None:
        return [cut_size(size, whole) for size in sizes]
    return [2.0**size if unit == "bits" else float(size) for size in sizes]


def _teacher(outs: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> int | None:
    """Its parameters, where all students were cut out of it: one that was given may be anything beside it, and one that
    is rounded loses something at any size."""
    options = [read_recipe(out)[-1]["options"] for out in outs]
    if any(of.get("student") is not None or of.get("student_scheme") is not None for of in options):
        return None
    whole = int(reports[0]["parameters"]["teacher"])
    for out, report in zip(outs, reports, strict=True):
        if report["parameters"]["student"] >= whole:
            raise BadInput(f"{out}: is as large as its teacher, beside which it loses nothing; leave it out")
    return whole


def _size_and_loss(out: Path, *, floored: bool) -> tuple[float, float, Mapping[str, Any], str]:
    report, _ = read_report(out)
    if report["job"] not in UNITS:
        raise BadInput(f"{out}: is of a job ({report['job']}) without such a law; give what quantize or distill wrote")
    try:
        quality = report["quality"]
        size, loss = _size(out, report), math.log(quality["perplexity"]) if floored else float(quality["kl"])
    except BadInput:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{out / 'report.json'}: is not as parewell writes it ({error!r}); make OUT again") from error
    return size, loss, report, out.resolve().name


def _size(out: Path, report: Mapping[str, Any]) -> float:
    if report["job"] == "distill":
        return int(report["parameters"]["student"])
    step = read_recipe(out)[-1]
    if "scheme" not in step:
        raise BadInput(f"{out}: its weights are transformed and not rounded, so they have no bits; leave it out")
    from compressor.engine.load import scheme_in

    bits = scheme_in(out, step).weights.bits
    mean = float(report["precision"]["mean_bits"]) if "precision" in report else bits
    if not 2 <= mean <= 8:
        raise ValueError(f"{mean} bits")
    return mean


def _check_alike(outs: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadInput where one differs from the first in more than size."""
    for out, report in zip(outs, reports, strict=True):
        for what, of in ALIKE.items():
            if of(report) != of(reports[0]):
                raise BadInput(f"{out}: is of another {what} than {outs[0]}; give outputs that differ in size alone")


# In --samples, --length, --seed and --data outputs may differ where --held-out-data is the same.
ALIKE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "job": lambda report: str(report["job"]),
    "kind of scheme": lambda report: re.sub(r"^w\d|, .*", "", str(report.get("scheme"))),
    "held-out text (rows also depend on --samples, --length and --seed, unless --held-out-data is given)":
        lambda report: str(report.get("data", {}).get("held_out", {}).get("sha256")),
    "model": lambda report: str(report["quality"].get("reference_perplexity")),
}  # fmt: skip


def _shown(size: float, unit: str) -> str:
    if not math.isfinite(size):
        return "no end"
    return f"{size:.2f}" if unit == "bits" else f"{size:,.3g}" if size < 1000 else f"{size:,.0f}"


def prediction_page(found: Prediction) -> str:
    """The prediction as an HTML page."""
    rows = found.rows()
    series = {
        Line("reference", "fit"): [found.law.predicted(scale)[0] for scale in found.scales],
        Line(AFTER.role, "measured"): list(found.losses),
    }
    return render_page(
        Path(__file__).parent / "templates/prediction.html",
        title="parewell: prediction",
        eyebrow="parewell",
        heading="Predicted size for a loss",
        verdict=Verdict("plain", found.verdict(), ""),
        files={"prediction.json": as_json(found.asdict()), "outputs.csv": as_csv(rows[0], rows[1:])},
        rows=rows,
        charts=[
            chart(
                series, "Loss by size", x=Axis("size", found.unit), y=Axis(found.called, "nats per token"),
                at=found.sizes, logarithmic=True,
            )
        ],
    )  # fmt: skip
