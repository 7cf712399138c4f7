"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
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
    information_plane: bool = option(
        False, "how much the state after each block tells of the token read and of the next one (CS-QMI, in nats)"
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


@dataclass(frozen=True, kw_only=True)
class EvaluateTasks:
    """Options of an evaluation by tasks of lm-evaluation-harness; those that it shares with Evaluate mean the same."""

    base_model: Path | None = option(
        None, "base model of MODEL where that is an adapter; default: the one that it names"
    )
    dequantize: bool = option(False, "dequantize MODEL first, where it is GGUF, FP8 or the like")
    tasks: str | None = option(
        None, "tasks of lm-evaluation-harness, such as arc_easy,hellaswag; or task files (.yaml) and folders of them",
        group="basic",
    )  # fmt: skip
    include_path: Path | None = option(
        None, "folder of further task files, whose names --tasks may use", group="data", needs="tasks"
    )
    limit: float | None = option(
        None, "documents of each task: a number, or a share below 1", group="data", gt=0, needs="tasks"
    )
    num_fewshot: int | None = option(
        None, "solved examples before each document; default: the task's", group="data", ge=0, needs="tasks"
    )
    batch_size: int = option(1, "documents of a task per forward pass", group="data", ge=1, needs="tasks")
    reference: str | None = option(None, "a model to compare with", group="basic")
    device: str = option("auto", "where to compute", choices=DEVICES, group="basic")
    precision: str = option(
        "auto", "precision of matrix products; auto: bfloat16 on CUDA, float32 elsewhere", choices=PRECISIONS
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.tasks is not None and (not self.named or len(set(self.named)) < len(self.named)):
            raise BadInput(f"tasks '{self.tasks}': must name some, each once, such as arc_easy,hellaswag")
        if self.limit is not None and not (0 < self.limit < 1 or self.limit == int(self.limit) > 0):
            raise BadInput(f"limit is {self.limit}; it must be a number of documents, or a share between 0 and 1")

    @property
    def named(self) -> list[str]:
        """Names of the tasks, or paths of task files."""
        return [task.strip() for task in (self.tasks or "").split(",") if task.strip()]
