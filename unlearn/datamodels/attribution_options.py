"""Options of an attribution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.jobs.options import PROMPT_FORMAT, check_numbers, check_sizes, option
from calib.runtime.choices import DEVICES


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Options of an attribution: which training rows an answer comes from."""

    base_model: Path | None = option(None, "base of MODEL, where that is adapters; default: the one they name")
    dequantize: bool = option(False, "go on with the floats that MODEL stands for, where it is GGUF, FP8 or the like")
    train: Path | None = option(
        None, "what the model was trained on: .jsonl, .json, .csv, .tsv, .parquet, .txt (a row a line)", group="data"
    )
    query: Path | None = option(
        None, "rows whose answers are to be explained, in a file of the same kind", group="data"
    )
    length: int | None = option(
        None, "tokens of a row; longer rows are cut into several windows, whose scores are added; default: 512, or as "
        "many as the model has positions", group="data",
    )  # fmt: skip
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    top: int = option(10, "training rows that are listed for each query, at either end", group="basic")
    width: int = option(16, "of each weight, squared numbers that gradients are projected to", group="method")
    damping: float = option(0.1, "of the curvature, as a share of its mean diagonal", group="method")
    micro_batch_tokens: int = option(2048, "tokens that pass through a block together")
    memory_budget: float | None = option(
        None, "GiB of hidden states held in RAM before they go to disk; default: 2 or a quarter of what is available"
    )
    seed: int = option(0, "seed of the projections, and of the labels that the curvature is drawn with")
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    def __post_init__(self) -> None:
        if self.train is None or self.query is None:
            raise BadInput("train and query: both are needed; give --train FILE and --query FILE")
        least = {"length": 2, "top": 1, "width": 1, "micro_batch_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        check_numbers(self)
        check_sizes(self)
        if not self.damping > 0:
            raise BadInput(f"damping is {self.damping}; it must be positive")
