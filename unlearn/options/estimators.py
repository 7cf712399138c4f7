"""Estimators of datamodel matching, each with the options that it reads.

To add one: a file in `unlearn.datamodels` that defines an `Estimator` in ENTRIES, and a line in ESTIMATORS. Options of
its own are a class here, named in that line and among the bases of `Unlearn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib.jobs.options import option

DELETIONS = ("related", "random")


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """Gradients are kept as random projections."""

    width: int = option(16, "gradients of each weight are projected to width x width numbers", group="method", ge=1)


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions:
    """Gradients are divided by a damped curvature."""

    damping: float = option(0.1, "damping of the curvature, as a share of its mean diagonal", group="method", gt=0)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Models that were trained on parts of the data are kept."""

    cache: Path | None = option(None, "directory that keeps trained models for other forget sets; default: beside OUT")


@dataclass(frozen=True, kw_only=True)
class FoldOptions:
    """Models are trained on all rows but one fold."""

    folds: int = option(
        2, "folds of related rows, each left out by one model (estimator folds)",
        group="method", ge=2
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Models are trained on many parts of the data."""

    subsets: int = option(
        1000, "number of models trained on parts of the data (estimators subsets, regression)", group="method", ge=2
    )
    deletions: str = option(
        "related", "rows that each of them is trained without: related or random ones", DELETIONS,
        group="method",
    )  # fmt: skip
    share: float = option(
        0.5, "share of rows that each random part keeps", group="method", gt=0, lt=1, needs="deletions=random"
    )


@dataclass(frozen=True, kw_only=True)
class NearnessOptions:
    """A Gaussian process weighs deletions by how much they are like the one asked about."""

    gp_interaction: float = option(
        0.35, "how much rows that stand in for each other count (estimator subsets)", group="method", ge=0
    )
    gp_self: float = option(
        0.0, "how much it counts whether a row itself was left out (estimator subsets)", group="method", ge=0
    )
    gp_noise: float = option(1.0, "variance of one model's change (estimator subsets)", group="method", gt=0)


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """A linear model is fitted with a penalty."""

    penalty: float = option(
        1e-3,
        "penalty of the regression (estimator regression), or of the linear head (method exact)",
        group="method",
        gt=0,
    )


@dataclass(frozen=True, kw_only=True)
class LassoOptions:
    """The penalty may be of absolute values."""

    lasso: bool = option(False, "L1 penalty instead of L2", group="method")


@dataclass(frozen=True)
class EstimatorEntry:
    """An estimator's module in `unlearn.datamodels`, whose ENTRIES has it by its name.

    options: the classes of the options that it reads.
    trains: it learns from models trained on parts of the data.
    """

    module: str
    options: tuple[type, ...]
    trains: bool = False


ESTIMATORS = {
    "gradients": EstimatorEntry("gradients", (ProjectionOptions, CurvatureOptions)),
    "folds": EstimatorEntry("folds", (FoldOptions, CacheOptions), trains=True),
    "subsets": EstimatorEntry("nearness", (SubsetOptions, NearnessOptions, CacheOptions), trains=True),
    "regression": EstimatorEntry(
        "regression", (SubsetOptions, PenaltyOptions, LassoOptions, CacheOptions), trains=True
    ),
    "trak": EstimatorEntry("trak", (ProjectionOptions,)),
}
