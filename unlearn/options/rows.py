"""Which rows a model was trained on, and which of them it is to forget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib import BadInput
from calib.jobs.options import PROMPT_FORMAT, option


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Options that choose rows, of an unlearning and of an audit."""

    train: Path | None = option(
        None, "what the model was trained on: .jsonl, .json, .csv, .tsv, .parquet, .txt (a row a line), also .gz, "
        ".zst; a folder of datasets, a directory of images by class, or .safetensors of inputs and labels", group="data"
    )  # fmt: skip
    retain: Path | None = option(
        None, "retained rows, instead of --train: this file and --forget together are the training data", group="data"
    )
    forget: Path | None = option(None, "rows to forget, in a file of the same kind", group="data")
    forget_lines: str | None = option(
        None, "rows to forget, by line numbers such as 3,10-20 (rows of tensors and images count from 0)", group="data"
    )
    forget_where: str | None = option(
        None, "rows to forget, by FIELD=VALUE (exact) or FIELD~REGEX (search)", group="data"
    )
    forget_ids: Path | None = option(
        None, "rows to forget, by a file with a value of --id-field on each line", group="data"
    )
    id_field: str | None = option(None, "field whose values --forget-ids lists", group="data")
    length: int | None = option(
        None,
        "tokens per row; longer texts become several rows; default: 512, or as many as the model has positions",
        group="data",
        ge=2,
    )
    prompt_format: str = option("auto", PROMPT_FORMAT, group="data")
    both_ways: bool = option(
        False, "rows are facts with name and description, and each is two: 'name is description', and the reverse",
        group="data",
    )  # fmt: skip

    def check_rows(self) -> None:
        """Raises BadInput where options say too little about rows, or things that do not go together."""
        if self.train is None and self.retain is None:
            raise BadInput(
                "train: which rows the model was trained on must be known; give --train FILE, or --retain FILE beside "
                "--forget FILE"
            )
        if self.retain is not None and (self.train is not None or self.forget is None):
            raise BadInput("retain: goes with --forget FILE, and the two are what --train would be; leave out --train")
        if self.both_ways and self.prompt_format != "auto":
            raise BadInput("prompt-format: changes nothing with --both-ways, which puts facts as text; leave it out")
        if (self.forget_ids is None) != (self.id_field is None):
            raise BadInput("forget-ids: goes with the field that it is about; give --forget-ids FILE --id-field NAME")
        if all(way is None for way in (self.forget, self.forget_lines, self.forget_where, self.forget_ids)):
            raise BadInput(
                "forget: nothing says what; give --forget FILE, --forget-lines 3,10-20, --forget-where FIELD=VALUE or "
                "--forget-ids FILE --id-field NAME"
            )
