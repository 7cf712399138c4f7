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
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import check_apart, check_cache, check_destination
from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model
from calib.runtime.device import pick_device
from unlearn.audit.evaluate import MEASURED, Asked, read_oracle
from unlearn.audit.probes import read_facts, read_probes
from unlearn.data.dataset import Data, read_data
from unlearn.data.earlier_requests import Earlier, digests_of, earlier_in
from unlearn.data.selection import alike, check_copies, fingerprint_of, lines_of, matched_values, nearly, training_rows
from unlearn.datamodels.estimators import OTHERS, PARTIAL
from unlearn.datamodels.trak import check_trak
from unlearn.methods.dispatch import Work, check_method
from unlearn.methods.learning_rate import divided
from unlearn.model.ensemble import finite
from unlearn.model.examples import Examples
from unlearn.model.model import Opened, open_model, task_of
from unlearn.model.train_ensembles import Population, all_but, check_workers
from unlearn.model.training_recipe import Training, recorded, training_of, with_method
from unlearn.options import TRAINED, Unlearn


@dataclass(frozen=True)
class Checked:
    """A job whose input and destination will do; `how` has a method, `why` says why that one where none was asked for.

    Rows are numbers in `train`: those to forget, and those of `earlier` requests.
    """

    how: Unlearn
    why: str | None
    opened: Opened
    reopen: Callable[[], Opened]
    train: Data
    forgotten: Tensor
    earlier: Earlier
    validation: Data | None
    training: Training | None
    asked: Asked
    identity: dict[str, Any]
    by: str | None = None  # the field that rows were chosen by

    @property
    def left(self) -> Tensor:
        """Numbers of the rows that the job is about: all but those of earlier requests."""
        return all_but(len(self.train), self.earlier.rows).nonzero().flatten()

    @property
    def retained(self) -> Tensor:
        """Numbers of the rows that are neither to be forgotten nor were before."""
        return self.left[~torch.isin(self.left, self.forgotten)]

    @property
    def notes(self) -> list[str]:
        """What the user is to know beside the figures."""
        return [note for note in (self.why, *self.earlier.notes) if note is not None]

    def work(self, how: Unlearn, journal: Journal) -> Work:
        """Rows of earlier requests have no part in it: nothing is trained on them, predicted of them or kept."""
        left = self.left
        rows = self.train.examples[left]
        forgotten, retained = (torch.searchsorted(left, some) for some in (self.forgotten, self.retained))
        descends = how.lr is None and how.method not in ("retrain", "exact")
        measured, judging = divided(retained, how.seed, MEASURED, descends)
        people = None
        if self.training is not None:
            people = Population(self.opened, rows, self.training, journal, self.reopen, how.workers)
        return Work(
            self.opened, rows, forgotten, retained, measured, judging, people, journal, how,
            partial(self.shared, people, how),
        )  # fmt: skip

    def shared(self, people: Population | None, how: Unlearn, masks: Tensor) -> Population:
        """Where models that are trained on `masks` are kept."""
        assert people is not None
        if how.cache is None:
            return people
        of = {
            "data": self.identity["data"]["train"], "base": self.identity["data"].get("base"),
            "training": self.identity["training"], "seed": how.seed, "runs_on": self.identity["runs_on"],
            "masks": hashlib.sha256(masks.numpy().tobytes()).hexdigest(),
            "deletions": how.deletions, "subsets": how.subsets, "share": how.share, "folds": how.folds,
            "model": hashlib.sha256(f"{how.factory} {self.opened.module!r}".encode()).hexdigest(),
        }  # fmt: skip
        if "earlier" in self.identity["data"]:
            of["earlier"] = self.identity["data"]["earlier"]
        return replace(people, journal=kept_apart(how.cache, of, "models"))

    def said(self) -> str:
        """What is to be forgotten, in a few lines, to be confirmed."""
        some = "".join(f"\n  {self.train.shown(row)}" for row in self.forgotten[:3].tolist())
        more = "\n  ..." if len(self.forgotten) > 3 else ""
        count = len(self.earlier.rows)
        before = [f"{count} more were forgotten before, and are not retained"] if count else []
        notes = "".join(f"\n{note}" for note in [*before, *self.notes])
        of = len({self.train.numbers[row] for row in self.forgotten.tolist()}), len(set(self.train.numbers))
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


def checked(model: str | Path, out: Path, how: Unlearn) -> Checked:
    """Everything that can be known before anything is computed.  Raises BadInput."""
    check_workers(how.workers)
    files_given = _files_of(how)
    for option, given in files_given.items():
        if not given.exists():
            raise BadInput(f"{option.replace('_', '-')} {given}: there is no such file or folder; mend the path")
    device = pick_device(how.device)
    folder = Path(model)
    if how.factory is None:
        folder = find_model(model, base_model=how.base_model, dequantize=how.dequantize)
    task = task_of(folder, how.task, how.factory)
    own = folder if folder.is_dir() else folder.parent
    how, why = with_method(how, own)
    training = training_of(how, own)
    reopen = partial(
        open_model, folder, task, factory=how.factory, base=how.base, device=device, lora=how.lora, only=how.patterns,
        seed=how.seed, at_once=how.micro_batch_tokens, checkpointing=how.gradient_checkpointing,
    )  # fmt: skip
    opened = reopen()
    if how.method == "dmm" and how.estimator == "trak":
        check_trak(opened, how)
    data, forgotten = training_rows(how, opened)
    whole = folder.is_dir() or folder.name == "model.safetensors"  # which a recipe beside it is about
    earlier = earlier_in(data, own) if whole else Earlier(forgotten[:0])
    earlier = replace(earlier, rows=earlier.rows[~torch.isin(earlier.rows, forgotten)])
    if len(forgotten) + len(earlier.rows) == len(data):
        before = f", {len(earlier.rows)} of them already," if len(earlier.rows) else ""
        raise BadInput(
            f"{data.source}: all {len(data)} rows{before} would be forgotten; what is left is a model drawn anew"
        )
    if not how.allow_duplicates:
        check_copies(data, [*forgotten.tolist(), *earlier.rows.tolist()])
    rows_as = (how.length, how.prompt_format)
    validation = None if how.validation is None else read_data(Path(how.validation), opened, *rows_as)
    oracle = None if how.oracle is None else read_oracle(how.oracle, opened)
    if how.probes is not None and oracle is None:
        raise BadInput("probes: truth ratios are compared with a model that never saw the rows; give --oracle DIR")
    useful = _useful(how)
    if len({file.stem for file in useful}) < len(useful):
        raise BadInput(f"utility {how.utility}: two files have one name, by which they are reported; rename one")
    asked = Asked(
        oracle,
        None if how.probes is None else read_probes(Path(how.probes), opened, *rows_as, paraphrased=True),
        {file.stem: read_probes(file, opened, *rows_as, paraphrased=False) for file in useful},
        None if how.facts is None else read_facts(Path(how.facts), opened, how.length),
    )
    _check_answers(opened, data.examples, own)
    left = all_but(len(data), earlier.rows).nonzero().flatten()
    check_method(opened, data.examples[left], how)
    folders = [f for f in (own, how.base, how.oracle) if f is not None and f.is_dir() and (folder.is_dir() or f != own)]
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    for given in [*files_given.values(), *([] if folder.is_dir() else [folder])]:
        check_apart(out, given, "what the job reads,")
    if how.cache is not None:
        check_cache(Path(how.cache), out, folders)
        check_kept(Path(how.cache), "models")
    check_destination(out, folders, _bytes(opened, files, how, len(data)))
    name = {"name": folder.resolve().name, "sha256": hash_of(files), "files": {}, "given": str(model)}
    named = folder_identity(model, folder, hash_of(files)) if folder.is_dir() else name
    identity = identity_of(how, named, device, None)
    secret = str(named["sha256"])
    identity["data"] = {
        "train": data.describe(),
        "forget": {
            "rows": len({data.numbers[row] for row in forgotten.tolist()}),  # a long one may be several examples
            "sha256": fingerprint_of(forgotten), "lines": lines_of(data, forgotten),
            "digests": sorted(digests_of([data.keys[row] for row in forgotten.tolist()], secret)),
        },
    }  # fmt: skip
    if len(earlier.rows):
        identity["data"]["earlier"] = {"rows": len(earlier.rows), "sha256": fingerprint_of(earlier.rows)}
    if validation is not None:
        identity["data"]["validation"] = validation.describe()
    places = [("base", how.base), ("oracle", how.oracle), ("probes", how.probes), ("facts", how.facts)]
    for what, place in [*places, *((f"utility {file.stem}", file) for file in useful)]:
        if place is not None:
            identity["data"][what] = hash_of(place.glob("*.safetensors") if place.is_dir() else [place])
    identity["training"] = recorded(training)
    if how.forget_where is not None:  # what was forgotten is not written down
        identity["options"]["forget_where"] = hashlib.sha256(how.forget_where.encode()).hexdigest()
    identity["before"] = past_of(own) if whole else []
    by = how.id_field if how.forget_where is None else re.split("[=~]", how.forget_where)[0]
    return Checked(how, why, opened, reopen, data, forgotten, earlier, validation, training, asked, identity, by)


def _useful(how: Unlearn) -> list[Path]:
    return [Path(name.strip()) for name in (how.utility or "").split(",") if name.strip()]


def _files_of(how: Unlearn) -> dict[str, Path]:
    """What a job reads, by option."""
    names = ("train", "retain", "forget", "forget_ids", "validation", "training", "base", "oracle", "probes", "facts")
    found = {name: Path(getattr(how, name)) for name in names if getattr(how, name) is not None}
    return found | {f"utility ({file.stem})": file for file in _useful(how)}


@torch.no_grad()
def _check_answers(opened: Opened, rows: Examples, folder: Path) -> None:
    for _, logits in opened.one().answers(rows[:256]):
        if not finite(logits):
            raise BadInput(f"{folder}: the model's answers to the first rows are NaN or infinite; this model is broken")


def _bytes(opened: Opened, files: list[Path], how: Unlearn, rows: int) -> int:
    """About what OUT and its journal will take."""
    own = sum(f.stat().st_size for f in files)
    params = sum(p.nbytes for p in opened.params.values())
    models = 3 * how.audit + (how.oracles * (1 + how.audit) if how.method == "oracle-matching" else 0)
    if how.method == "dmm" and how.estimator in TRAINED and how.cache is None:
        models += parts_of(how) + OTHERS
    gradients = 8 * rows * sum(min(how.width, one.ins) * min(how.width, one.outs) for one in opened.linears.values())
    return (
        own + 4 * params + models * params + (gradients if how.method == "dmm" and how.estimator == "gradients" else 0)
    )


def parts_of(how: Unlearn) -> int:
    """Models that an estimator learns from, at most."""
    return how.folds if how.estimator == "folds" else how.subsets + how.subsets // PARTIAL
