"""An unlearning before anything is computed: what its input and options are, and whether they will do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.jobs.journal import Journal, check_kept, kept_apart
from calib.jobs.options import flag_name, folder_identity, hash_of, identity_of
from calib.jobs.output_folder import check_apart, check_cache, check_destination
from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model
from calib.runtime.device import pick_device
from calib.runtime.distributed import sharing
from unlearn.audit.evaluate import MEASURED, AuditInputs, read_oracle
from unlearn.audit.probes import read_facts, read_probes
from unlearn.data.alternatives import read_alternatives
from unlearn.data.dataset import Data, read_data
from unlearn.data.earlier_requests import EarlierRequests, digests_of, earlier_in
from unlearn.data.selection import alike, check_copies, fingerprint_of, lines_of, matched_values, nearly, training_rows
from unlearn.methods.dispatch import check_method, method_of
from unlearn.methods.job import UnlearningJob
from unlearn.methods.learning_rate import divided
from unlearn.model.ensemble import finite
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel, limit_memory, open_model, task_of
from unlearn.model.train_ensembles import EnsembleTrainer, all_rows_but, check_workers
from unlearn.model.training_recipe import Training, recorded, training_of, with_method
from unlearn.options.unlearning import Unlearn


@dataclass(frozen=True)
class UnlearningRequest:
    """A job whose input and destination will do; `options` have a method, `why` says why it was chosen where none was
    asked for.

    Rows are numbers in `train`: those to forget, and those of `earlier` requests.
    """

    options: Unlearn
    why: str | None
    trainable: TrainableModel
    reopen: Callable[[], TrainableModel]
    train: Data
    forgotten: Tensor
    earlier: EarlierRequests
    validation: Data | None
    training: Training | None
    asked: AuditInputs
    identity: dict[str, Any]
    by: str | None = None  # the field that rows were chosen by

    @property
    def left(self) -> Tensor:
        """Numbers of the rows that the job is about: all but those of earlier requests."""
        return all_rows_but(len(self.train), self.earlier.rows).nonzero().flatten()

    @property
    def retained(self) -> Tensor:
        """Numbers of the rows that are neither to be forgotten nor were before."""
        return self.left[~torch.isin(self.left, self.forgotten)]

    @property
    def notes(self) -> list[str]:
        """Notes for the user beside the figures."""
        return [note for note in (self.why, *self.earlier.notes) if note is not None]

    def work(self, options: Unlearn, journal: Journal) -> UnlearningJob:
        """Rows of earlier requests have no part in it: nothing is trained on them, predicted of them or kept."""
        left = self.left
        rows = self.train.examples[left]
        forgotten, retained = (torch.searchsorted(left, some) for some in (self.forgotten, self.retained))
        searched = options.lr is None and options.entry.by_steps
        measured, judging = divided(retained, options.seed, MEASURED, searched)
        trainer = None
        if self.training is not None:
            trainer = EnsembleTrainer(self.trainable, rows, self.training, journal, self.reopen, options.workers)
        return UnlearningJob(
            self.trainable, rows, forgotten, retained, measured, judging, trainer, journal, options,
            partial(self.shared, trainer, options), self.asked.alternatives,
        )  # fmt: skip

    def shared(self, trainer: EnsembleTrainer | None, options: Unlearn, masks: Tensor) -> EnsembleTrainer:
        """The trainer whose models, trained on `masks`, are kept in the cache, if there is one."""
        assert trainer is not None
        if options.cache is None:
            return trainer
        of = {
            "data": self.identity["data"]["train"], "base": self.identity["data"].get("base"),
            "training": self.identity["training"], "seed": options.seed, "runs_on": self.identity["runs_on"],
            "masks": hashlib.sha256(masks.numpy().tobytes()).hexdigest(),
            "deletions": options.deletions, "subsets": options.subsets, "share": options.share, "folds": options.folds,
            "model": hashlib.sha256(f"{options.factory} {self.trainable.module!r}".encode()).hexdigest(),
        }  # fmt: skip
        if "earlier" in self.identity["data"]:
            of["earlier"] = self.identity["data"]["earlier"]
        with sharing() as own:  # one process makes the folder, and the others find it
            for _ in own([0]):
                kept_apart(options.cache, of, "models")
        return replace(trainer, journal=kept_apart(options.cache, of, "models"))

    def summary(self) -> str:
        """Describe the rows to forget in a few lines, to be confirmed."""
        some = "".join(f"\n  {self.train.shown(row)}" for row in self.forgotten[:3].tolist())
        more = "\n  ..." if len(self.forgotten) > 3 else ""
        count = self.train.lines(self.earlier.rows.tolist())
        before = [f"{count} more were forgotten before, and are not retained"] if count else []
        notes = "".join(f"\n{note}" for note in [*before, *self.notes])
        of = self.train.lines(self.forgotten.tolist()), self.train.lines(range(len(self.train)))
        return f"forget {of[0]} of {of[1]} rows of {self.train.source}:{some}{more}{self._values}{notes}"

    @property
    def _values(self) -> str:
        """The distinct values by which rows were chosen, with counts."""
        if self.by is None:
            return ""
        found = matched_values(self.train, self.forgotten.tolist(), self.by)
        listed = ", ".join(f"{value[:60]!r} ({count})" for value, count in sorted(found.items())[:20])
        near = [f"{value[:60]!r}" for value in nearly(self.train, list(found), self.by)]
        stays = f"\n  not these, which are nearly the same and stay: {', '.join(near[:20])}" if near else ""
        return f"\n  {self.by}: {listed}{f' and {len(found) - 20} more' if len(found) > 20 else ''}{stays}"

    def doubtful(self) -> str | None:
        """A second question, where a value that was matched is how another begins, as user-1 and user-10."""
        if self.by is None:
            return None
        pairs = alike(list(matched_values(self.train, self.forgotten.tolist(), self.by)))
        if not pairs:
            return None
        listed = "; ".join(f"{a[:60]!r} and {b[:60]!r}" for a, b in pairs[:10])
        return f"{self.by} has values of which one begins like another: {listed}. Are all of these meant?"


def validate(model: str | Path, out: Path, options: Unlearn) -> UnlearningRequest:
    """Check model, rows, options and destination before anything is computed.

    Raises:
        BadInput: a file, the model, the rows, an option or the destination will not do.
    """
    check_workers(options.workers)
    for option, given in _files_of(options).items():
        if not given.exists():
            raise BadInput(f"{flag_name(option)} {given}: there is no such file or folder; mend the path")
    device = pick_device(options.device)
    folder = Path(model)
    if options.factory is None:
        folder = find_model(model, base_model=options.base_model, dequantize=options.dequantize)
    own = folder if folder.is_dir() else folder.parent
    options, why = with_method(options, own)
    training = training_of(options, own)
    reopen = partial(_opened, folder, task_of(folder, options.task, options.factory), options, device)
    trainable = reopen()
    data, forgotten = training_rows(options, trainable)
    whole = folder.is_dir() or folder.name == "model.safetensors"  # which a recipe beside it is about
    earlier = _earlier(data, forgotten, own if whole else None)
    if not options.allow_duplicates:
        check_copies(data, [*forgotten.tolist(), *earlier.rows.tolist()])
    validation = None
    if options.validation is not None:
        rows_as = (options.length, options.prompt_format)
        validation = read_data(Path(options.validation), trainable, *rows_as, reverse=options.both_ways)
    asked = _asked(trainable, options, data, forgotten)
    _check_answers(trainable, data.examples, own)
    left = all_rows_but(len(data), earlier.rows).nonzero().flatten()
    check_method(trainable, data.examples[left], options)
    _check_places(out, folder, trainable, options, len(data))
    rows = _describe_rows(data, forgotten, earlier, validation)
    identity = _identity(model, folder, options, device, rows) | {"training": recorded(training)}
    identity["before"] = past_of(own) if whole else []
    by = options.id_field if options.forget_where is None else re.split("[=~]", options.forget_where)[0]
    return UnlearningRequest(
        options, why, trainable, reopen, data, forgotten, earlier, validation, training, asked, identity, by
    )


def _opened(folder: Path, task: str, options: Unlearn, device: torch.device) -> TrainableModel:
    """Here, or where other processes train models like it."""
    trainable = open_model(
        folder, task, factory=options.factory, base=options.base, device=device, lora=options.lora,
        only=options.patterns, seed=options.seed,
    )  # fmt: skip
    return limit_memory(trainable, options.micro_batch_tokens, checkpointing=options.gradient_checkpointing)


def _earlier(data: Data, forgotten: Tensor, folder: Path | None) -> EarlierRequests:
    """Rows that earlier steps of a folder's recipe forgot.  Raises BadInput where none would be left."""
    earlier = EarlierRequests(forgotten[:0]) if folder is None else earlier_in(data, folder)
    earlier = replace(earlier, rows=earlier.rows[~torch.isin(earlier.rows, forgotten)])
    if len(forgotten) + len(earlier.rows) == len(data):
        before = f", {len(earlier.rows)} of them already," if len(earlier.rows) else ""
        raise BadInput(
            f"{data.source}: all {len(data)} rows{before} would be forgotten; what is left is a model drawn anew"
        )
    return earlier


def _asked(trainable: TrainableModel, options: Unlearn, data: Data, forgotten: Tensor) -> AuditInputs:
    """What is measured beside nats and accuracy.  Raises BadInput."""
    in_pairs = options.entry.in_pairs and len(forgotten) > 0
    alternatives = read_alternatives(data, forgotten, trainable, options) if in_pairs else None
    rows_as = (options.length, options.prompt_format)
    oracle = None if options.oracle is None else read_oracle(options.oracle, trainable)
    if options.probes is not None and oracle is None:
        raise BadInput(
            "probes: truth ratios are compared with those of an oracle, retrained without the forget set; give "
            "--oracle DIR"
        )
    useful = _utility_files(options)
    if len({file.stem for file in useful}) < len(useful):
        raise BadInput(f"utility {options.utility}: two files have one name, by which they are reported; rename one")
    return AuditInputs(
        oracle,
        None if options.probes is None else read_probes(Path(options.probes), trainable, *rows_as, paraphrased=True),
        {file.stem: read_probes(file, trainable, *rows_as, paraphrased=False) for file in useful},
        None if options.facts is None else read_facts(Path(options.facts), trainable, options.length),
        alternatives,
    )


def _weight_files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))


def _check_places(out: Path, folder: Path, trainable: TrainableModel, options: Unlearn, rows: int) -> None:
    """Raises BadInput where the output, or the cache, would lie in what is read, or has no room."""
    own = folder if folder.is_dir() else folder.parent
    folders = [
        f for f in (own, options.base, options.oracle) if f is not None and f.is_dir() and (folder.is_dir() or f != own)
    ]
    for given in [*_files_of(options).values(), *([] if folder.is_dir() else [folder])]:
        check_apart(out, given, "what the job reads,")
    if options.cache is not None:
        check_cache(Path(options.cache), out, folders)
        check_kept(Path(options.cache), "models")
    params = sum(p.nbytes for p in trainable.params.values())
    stored = method_of(options).stored(trainable, rows, options) + 3 * options.audit * params
    size = sum(file.stat().st_size for file in _weight_files(folder)) + 4 * params + stored
    check_destination(out, folders, size)


def _describe_rows(data: Data, forgotten: Tensor, earlier: EarlierRequests, validation: Data | None) -> dict[str, Any]:
    """What a recipe says of rows; of the forget set nothing by which it could be read."""
    found: dict[str, Any] = {
        "train": data.describe(),
        "forget": {
            "rows": data.lines(forgotten.tolist()),
            "sha256": fingerprint_of(forgotten), "lines": lines_of(data, forgotten),
            "digests": [data.keys[row] for row in forgotten.tolist()],  # keyed by the model later
        },
    }  # fmt: skip
    if len(earlier.rows):
        found["earlier"] = {"rows": data.lines(earlier.rows.tolist()), "sha256": fingerprint_of(earlier.rows)}
    if validation is not None:
        found["validation"] = validation.describe()
    return found


def _identity(
    model: str | Path, folder: Path, options: Unlearn, device: torch.device, rows: dict[str, Any]
) -> dict[str, Any]:
    """What a recipe records, and a journal compares."""
    sha256 = hash_of(_weight_files(folder))
    named = folder_identity(model, folder, sha256)
    identity = identity_of(options, named, device, None)
    rows["forget"]["digests"] = sorted(digests_of(rows["forget"]["digests"], str(named["sha256"])))
    identity["data"] = rows
    places = {name: getattr(options, name) for name in ("base", "oracle", "probes", "facts", "alternatives")}
    for what, place in (places | {f"utility {file.stem}": file for file in _utility_files(options)}).items():
        if place is not None:
            rows[what] = hash_of(place.glob("*.safetensors") if place.is_dir() else [place])
    if options.forget_where is not None:  # what was forgotten is not written down
        identity["options"]["forget_where"] = hashlib.sha256(options.forget_where.encode()).hexdigest()
    return identity


def _utility_files(options: Unlearn) -> list[Path]:
    return [Path(name.strip()) for name in (options.utility or "").split(",") if name.strip()]


def _files_of(options: Unlearn) -> dict[str, Path]:
    """What a job reads, by option."""
    names = ("train", "retain", "forget", "forget_ids", "validation", "training", "base", "oracle", "probes", "facts",
             "alternatives")  # fmt: skip
    found = {name: Path(getattr(options, name)) for name in names if getattr(options, name) is not None}
    return found | {f"utility ({file.stem})": file for file in _utility_files(options)}


@torch.no_grad()
def _check_answers(trainable: TrainableModel, rows: Examples, folder: Path) -> None:
    for _, logits in trainable.one().answers(rows[:256]):
        if not finite(logits):
            raise BadInput(f"{folder}: the model's answers to the first rows are NaN or infinite; this model is broken")
