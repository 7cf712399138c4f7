"""Make a model forget rows that it was trained on, and prove it.

Datamodel matching (arXiv:2410.23232) predicts what the model would say had it never seen them, and moves it there;
other ways to forget stand beside it, under the same options and the same proof.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.checkpoint import TOKENIZER_FILES, find_model, past_of
from calib.fit import Diverged
from calib.job import folder_identity, hash_of, identity_of, pick_device
from calib.journal import Journal, check_journal, check_kept, journal_beside, kept_apart
from calib.weights import Weights, read_file
from calib.writing import check_apart, check_cache, check_destination, write_described, writing
from unlearn.data import Data, check_copies, chosen, fingerprint_of, lines_of, read_data
from unlearn.ensemble import CHUNK_ROWS, Training, train
from unlearn.examples import Examples
from unlearn.forgetting import Work, check_method, forgetting
from unlearn.models import Opened, open_model, task_of
from unlearn.page import unlearned_page
from unlearn.population import Population, check_workers
from unlearn.predict import OTHERS, PARTIAL
from unlearn.proof import Asked, asked_of, audit, figures, groups_of, leaks, read_oracle
from unlearn.questions import read_facts, read_probes
from unlearn.recovery import known
from unlearn.trak import check_trak
from unlearn.wanted import TRAINED, Unlearn, recorded, training_of

Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class Checked:
    """A job whose input and destination will do."""

    opened: Opened
    reopen: Callable[[], Opened]
    train: Data
    forgotten: Tensor
    validation: Data | None
    training: Training | None
    asked: Asked
    identity: dict[str, Any]

    @property
    def retained(self) -> Tensor:
        kept = torch.ones(len(self.train), dtype=torch.bool)
        kept[self.forgotten] = False
        return kept.nonzero().flatten()

    def work(self, how: Unlearn, journal: Journal) -> Work:
        people = None
        if self.training is not None:
            people = Population(self.opened, self.train.examples, self.training, journal, self.reopen, how.workers)
        return Work(
            self.opened, self.train.examples, self.forgotten, self.retained, people, journal, how,
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
        return replace(people, journal=kept_apart(how.cache, of, "models"))

    def said(self) -> str:
        """What is to be forgotten, in a few lines, to be confirmed."""
        some = "".join(f"\n  {self.train.shown(row)}" for row in self.forgotten[:3].tolist())
        more = "\n  ..." if len(self.forgotten) > 3 else ""
        return f"forget {len(self.forgotten)} of {len(self.train)} rows of {self.train.source}:{some}{more}"


def unlearn(
    model: str | Path, out: str | Path, how: Unlearn, *, resume: bool | None = None, confirm: Confirm | None = None
) -> dict[str, Any]:
    """Make MODEL (a folder or a hub name; with a factory, a safetensors file) forget, into the folder OUT.

    -> the report, as in OUT/report.json. What an interrupted run left beside OUT is continued (resume True), discarded
    (False) or refused (None). `confirm` is shown what is chosen and may refuse. Where nothing is to be forgotten OUT
    has the model's own bytes. Raises BadInput, before anything is written, where model, rows, options or OUT will not
    do.
    """
    out = Path(out)
    job = checked(model, out, how)
    goes_on = check_journal(out, job.identity, resume)
    if confirm is not None and not goes_on and not confirm(job.said()):
        raise BadInput("not confirmed; nothing was done")
    with journal_beside(out, job.identity, resume) as journal:
        return _run(job, out, how, journal)


def checked(model: str | Path, out: Path, how: Unlearn) -> Checked:
    """Everything that can be known before anything is computed.  Raises BadInput."""
    assert how.train is not None
    check_workers(how.workers)
    files_given = _files_of(how)
    for option, given in files_given.items():
        if not given.exists():
            raise BadInput(f"{option.replace('_', '-')} {given}: there is no such file or folder; mend the path")
    device = pick_device(how.device)
    folder = find_model(model) if how.factory is None else Path(model)
    task = task_of(folder, how.task, how.factory)
    own = folder if folder.is_dir() else folder.parent
    training = training_of(how, own)
    reopen = partial(
        open_model, folder, task, factory=how.factory, base=how.base, device=device, lora=how.lora, only=how.patterns,
        seed=how.seed,
    )  # fmt: skip
    opened = reopen()
    if how.method == "dmm" and how.estimator == "trak":
        check_trak(opened, how)
    data = read_data(Path(how.train), opened, how.length)
    forget = None if how.forget is None else _forget_rows(Path(how.forget), opened, how.length)
    forgotten = chosen(data, forget, how.forget_lines, how.forget_where)
    if len(forgotten) == len(data):
        raise BadInput(f"{data.source}: all {len(data)} rows would be forgotten; what is left is a model drawn anew")
    if not how.allow_duplicates:
        check_copies(data, forgotten.tolist())
    data = replace(data, examples=data.examples.to(device))
    validation = None if how.validation is None else read_data(Path(how.validation), opened, how.length)
    oracle = None if how.oracle is None else read_oracle(how.oracle, opened)
    if how.probes is not None and oracle is None:
        raise BadInput("probes: truth ratios are compared with a model that never saw the rows; give --oracle DIR")
    useful = _useful(how)
    if len({file.stem for file in useful}) < len(useful):
        raise BadInput(f"utility {how.utility}: two files have one name, by which they are reported; rename one")
    asked = Asked(
        oracle,
        None if how.probes is None else read_probes(Path(how.probes), opened, how.length, paraphrased=True),
        {file.stem: read_probes(file, opened, how.length, paraphrased=False) for file in useful},
        None if how.facts is None else read_facts(Path(how.facts), opened, how.length),
    )
    _check_answers(opened, data.examples, own)
    check_method(opened, data.examples, how)
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
    chosen_rows = fingerprint_of(forgotten)
    identity["data"] = {
        "train": data.describe(),
        "forget": {"rows": len(forgotten), "sha256": chosen_rows, "lines": lines_of(data, forgotten)},
    }
    if validation is not None:
        identity["data"]["validation"] = validation.describe()
    places = [("base", how.base), ("oracle", how.oracle), ("probes", how.probes), ("facts", how.facts)]
    for what, place in [*places, *((f"utility {file.stem}", file) for file in useful)]:
        if place is not None:
            identity["data"][what] = hash_of(place.glob("*.safetensors") if place.is_dir() else [place])
    identity["training"] = recorded(training)
    if how.forget_where is not None:  # what was forgotten is not written down
        identity["options"]["forget_where"] = hashlib.sha256(how.forget_where.encode()).hexdigest()
    identity["before"] = past_of(folder)
    return Checked(opened, reopen, data, forgotten, validation, training, asked, identity)


def _useful(how: Unlearn) -> list[Path]:
    return [Path(name.strip()) for name in (how.utility or "").split(",") if name.strip()]


def _files_of(how: Unlearn) -> dict[str, Path]:
    """What a job reads, by option."""
    names = ("train", "forget", "validation", "training", "base", "oracle", "probes", "facts")
    found = {name: Path(getattr(how, name)) for name in names if getattr(how, name) is not None}
    return found | {f"utility ({file.stem})": file for file in _useful(how)}


def _forget_rows(path: Path, opened: Opened, length: int) -> Data | None:
    """None where the file is there and has nothing in it."""
    if path.is_file():
        if path.suffix != ".safetensors":
            empty = not path.read_bytes().strip()
        else:
            empty = not read_file(path)[0].get("labels", torch.ones(1)).numel()
        if empty:
            return None
    return read_data(path, opened, length)


@torch.no_grad()
def _check_answers(opened: Opened, rows: Examples, folder: Path) -> None:
    for i in range(0, min(256, len(rows)), CHUNK_ROWS):
        if not opened.one().logits(rows[i : i + CHUNK_ROWS]).isfinite().all():
            raise BadInput(f"{folder}: the model's answers to the first rows are NaN or infinite; this model is broken")


def _bytes(opened: Opened, files: list[Path], how: Unlearn, rows: int) -> int:
    """About what OUT and its journal will take."""
    own = sum(f.stat().st_size for f in files)
    params = sum(p.nbytes for p in opened.params.values())
    models = 3 * how.audit + (how.oracles * (1 + how.audit) if how.method == "oracle-matching" else 0)
    if how.method == "dmm" and how.estimator in TRAINED and how.cache is None:
        models += _parts(how) + OTHERS
    gradients = 8 * rows * sum(min(how.width, one.ins) * min(how.width, one.outs) for one in opened.linears.values())
    return (
        own + 4 * params + models * params + (gradients if how.method == "dmm" and how.estimator == "gradients" else 0)
    )


def _run(job: Checked, out: Path, how: Unlearn, journal: Journal) -> dict[str, Any]:
    opened, work = job.opened, job.work(how, journal)
    before = opened.one()
    groups = groups_of(work, job.validation)
    report: dict[str, Any] = {
        "job": "unlearn", "method": how.method, "task": opened.task,
        "rows": {"train": len(job.train), "forget": len(job.forgotten)},
        "data": job.identity["data"], "quality_by_stage": {"before": figures(opened.task, before, groups)},
    }  # fmt: skip
    if len(job.forgotten):
        way = forgetting(work)
        after = way.apply(before, "moved")
        report |= way.facts
        if "moved" in journal:
            curve = journal.notes("moved")["curve"]
            names = dict.fromkeys(name for parts in curve for name in parts)  # a step may have only some
            report["curves"] = {name: [parts[name] for parts in curve if name in parts] for name in names}
        report["quality_by_stage"]["after"] = figures(opened.task, after, groups)
        models = {"before": before, "after": after}
        if any(not group["nats"] < float("inf") for group in report["quality_by_stage"]["after"].values()):
            raise Diverged("the model's answers are no numbers any more; lower the learning rate")
        if beside := asked_of(opened, models, job.asked, groups):
            if found := leaks(report["quality_by_stage"], beside.get("oracle", {})):
                beside["privacy_leak"] = found
            report["asked"] = beside
        if how.audit:
            report["audit"] = audit(work, way, job.validation)
    else:
        after = before
        report["quality_by_stage"]["after"] = report["quality_by_stage"]["before"]
    report["quality"] = {f"{g} {n}": v for g, f in report["quality_by_stage"]["after"].items() for n, v in f.items()}
    params = {name: p[0] for name, p in after.params.items()}
    with writing(out, sum(p.nbytes for p in params.values())) as scratch:
        if after is before:
            _copy(opened.folder, scratch)
        else:
            opened.write(scratch, params)
        own = {name: value for name, value in job.identity.items() if name != "before"}
        step = {"job": "unlearn", **own, "quality": report["quality"]}
        if job.opened.task == "causal-lm" and len(job.forgotten):
            step["forgotten"] = _known(report)
        after_bytes = sum(file.stat().st_size for file in scratch.glob("*.safetensors"))
        report["bytes"] = {"before": _stored(opened.folder), "after": after_bytes}
        write_described(scratch, report, [*job.identity["before"], step], unlearned_page)
    return report


def _known(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was known of the forgotten rows at each stage: by this a gate knows whether it came back."""
    stages = dict(report["quality_by_stage"])
    if "oracle" in report.get("asked", {}):
        stages["never saw it"] = report["asked"]["oracle"]
    return {stage: known(of["forget"]) for stage, of in stages.items()}


def _stored(model: Path) -> int:
    """Bytes of a folder's weights, or of a file."""
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _copy(model: Path, scratch: Path) -> None:
    """The model's own bytes."""
    if model.is_file():
        shutil.copyfile(model, scratch / "model.safetensors")
        return
    names = {"config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
    names |= {entry.file.name for entry in Weights(model).entries.values()}
    for name in sorted(names):
        if (model / name).is_file():
            shutil.copyfile(model / name, scratch / name)


@dataclass(frozen=True)
class Estimate:
    """What a job will cost: models to train, rows (of language models tokens) that pass through in training them and
    in moving the model, and seconds."""

    trainings: int
    tokens: int
    seconds: float


def estimate(model: str | Path, out: str | Path, how: Unlearn) -> Estimate:
    """From a few rows; nothing is written.  Raises BadInput like `unlearn`."""
    job = checked(model, Path(out), how)
    work = job.work(how, Journal(Path(out)))
    rows, each = work.rows, work.rows.labels[0].numel()
    trainings = _trainings(job, how)
    epochs = 0 if job.training is None else job.training.epochs
    moved = (1 + how.audit) * (0 if how.method in ("retrain", "exact") else how.epochs) * round(
        len(job.forgotten) * (how.forget_multiplier + how.retain_multiplier)
    )  # fmt: skip
    some = torch.arange(min(len(rows), 32))
    models = job.opened.many([job.opened.state] * min(trainings or 1, 100 if job.opened.stackable else 1))
    masks = torch.ones(len(models), len(some), dtype=torch.bool)
    began = time.perf_counter()
    train(models, rows[some], masks, range(len(models)), Training(epochs=2, batch=max(1, len(some) // 2), lr=1e-6))
    once = (time.perf_counter() - began) / (2 * len(some) * len(models))  # a row through one model and back
    passes = trainings * epochs * len(rows) + moved
    gradients = 3 * len(rows) if how.method == "dmm" and how.estimator == "gradients" else 0
    return Estimate(trainings, (passes + gradients) * each, (passes + gradients) * once)


def _parts(how: Unlearn) -> int:
    """Models that an estimator learns from, at most."""
    return how.folds if how.estimator == "folds" else how.subsets + how.subsets // PARTIAL


def _trainings(job: Checked, how: Unlearn) -> int:
    count = 0
    stacked = job.opened.stackable

    def compared(deletions: int) -> int:
        return deletions + (min(deletions, OTHERS) if stacked else 1)

    if how.method == "dmm":
        count += compared(_parts(how)) if how.estimator in TRAINED else 0
        count += compared(how.calibrate) if how.calibrate and how.multiplier is None else 0
    if how.method == "oracle-matching":
        count += how.oracles * (1 + how.audit)
    if how.method == "retrain":
        count += 1 + how.audit
    return count + 3 * how.audit
