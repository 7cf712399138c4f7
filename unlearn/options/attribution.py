"""Options of an attribution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.jobs.options import PROMPT_FORMAT, check_options, option
from calib.runtime.choices import DEVICES
from unlearn.options.estimators import CurvatureOptions, ProjectionOptions


@dataclass(frozen=True, kw_only=True)
class Attribute(CurvatureOptions, ProjectionOptions):
    """Options of an attribution: which training rows an answer comes from."""

    base_model: Path | None = option(
        None, "base model of MODEL where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize MODEL first, where it is GGUF, FP8 or the like")
    train: Path | None = option(
        None, "what the model was trained on: .jsonl, .json, .csv, .tsv, .parquet, .txt (a row a line)", group="data"
    )
    query: Path | None = option(
        None, "rows whose answers are to be explained, in a file of the same kind", group="data"
    )
    length: int | None = option(
        None, "tokens per row; longer texts become several windows, whose scores are added; default: 512, or as many "
        "as the model has positions", group="data", ge=2,
    )  # fmt: skip
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    top: int = option(10, "training rows that are listed for each query, at either end", group="basic", ge=1)
    micro_batch_tokens: int = option(2048, "tokens per forward pass of a block", ge=1)
    memory_budget: float | None = option(
        None, "GiB of hidden states held in RAM before they go to disk; default: 2 or a quarter of what is available",
        ge=0,
    )  # fmt: skip
    seed: int = option(0, "seed of the projections, and of the labels that the curvature is drawn with", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    def __post_init__(self) -> None:
        if self.train is None or self.query is None:
            raise BadInput("train and query: both are needed; give --train FILE and --query FILE")
        check_options(self)
