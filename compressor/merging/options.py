"""Options of a soup."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.data.records import SOURCES
from calib.jobs.options import check_options, option
from calib.runtime.choices import DEVICES

LEAST_POINTS = 3  # both ends of a line, and its middle


@dataclass(frozen=True, kw_only=True)
class Soup:
    """Options of a mean of models; also what its recipe records."""

    weights: str | None = option(None, "share of each model, such as 0.7,0.3; default: all alike", group="basic")
    data: Path | None = option(
        None, f"rows on which the loss is measured: {SOURCES}; default: the embedded held-out text", group="data"
    )
    held_out: int = option(16, "rows on which it is measured", group="data", ge=1)
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data", ge=2
    )
    points: int = option(
        5, "points of the line between two models at which the loss is measured, both ends included", group="method",
        ge=LEAST_POINTS, le=101,
    )  # fmt: skip
    seed: int = option(0, "random seed of which rows are drawn", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    def __post_init__(self) -> None:
        check_options(self)
        if self.weights is not None:
            self.shares(len(self.weights.split(",")))

    def shares(self, count: int) -> list[float]:
        """Shares of `count` models.  Raises BadInput where they are not as many, not positive, or do not add up to
        one."""
        if self.weights is None:
            return [1 / count] * count
        try:
            given = [float(part) for part in self.weights.split(",")]
        except ValueError as error:
            raise BadInput(f"weights '{self.weights}': should be numbers, separated by commas") from error
        if len(given) != count:
            raise BadInput(
                f"weights '{self.weights}': are {len(given)}, and there are {count} models; give one of each"
            )
        if not all(0 < share < 1 for share in given) or not math.isclose(sum(given), 1, abs_tol=1e-6):
            raise BadInput(
                f"weights '{self.weights}': must be above 0 and add up to 1, and they add up to {sum(given):g}"
            )
        return given
