"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib.data.records import SOURCES
from calib.jobs.options import PROMPT_FORMAT, check_options, option
from calib.runtime.choices import DEVICES, PRECISIONS


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    base_model: Path | None = option(
        None, "base model of MODEL where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize MODEL first, where it is GGUF, FP8 or the like")
    data: Path | None = option(None, f"rows: {SOURCES}; default: the embedded held-out text", group="data")
    length: int | None = option(
        None, "tokens per row; default: 512, or as many as the model has positions", group="data", ge=2
    )
    rows: int | None = option(None, "only the first rows", group="data", ge=1)
    by_document: bool = option(False, "one document per row instead of packed rows", group="data")
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    answers_only: bool = option(False, "measure answers, not prompts", group="data")
    reference: str | None = option(
        None, "a model to compare with: mean KL(reference || MODEL), top-token agreement", group="basic"
    )
    memory_budget: float | None = option(
        None,
        "GiB of hidden states held in RAM before they go to disk; default: 2 or a quarter of what is available",
        ge=0,
    )
    device: str = option("auto", "where to compute", choices=DEVICES, group="basic")
    precision: str = option(
        "auto", "precision of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    def __post_init__(self) -> None:
        check_options(self)
