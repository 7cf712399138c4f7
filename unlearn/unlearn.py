"""Make a model forget rows that it was trained on, and prove it.

Datamodel matching (arXiv:2410.23232) predicts what the model would say had it never seen them, and moves it there;
other ways to forget stand beside it, under the same options and the same proof.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib import BadInput, Diverged, Failed
from calib.jobs.journal import Journal, check_journal, journal_beside
from calib.jobs.output_folder import atomic_folder, write_described
from calib.model.companions import copy_companions
from calib.model.weights import Weights
from calib.runtime.distributed import is_main_process, raise_together, replicated
from unlearn.audit.evaluate import asked_of, figures, groups_of, leaks, run_audit
from unlearn.audit.quantized_recovery import knowledge_of
from unlearn.methods.dispatch import method_of
from unlearn.options.unlearning import Unlearn
from unlearn.report.unlearning import unlearned_page
from unlearn.report.verdict import figures_of, losses, lost, retain_loss_bound
from unlearn.validate import UnlearningRequest, validate

Confirm = Callable[[str], bool]


def unlearn(
    model: str | Path, out: str | Path, options: Unlearn, *, resume: bool | None = None, confirm: Confirm | None = None,
    allow_damage: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Make a model forget rows that it was trained on, and write it to a directory.

    Args:
        model: a directory with safetensors, a name on the hub, or with `options.factory` a safetensors file.
        out: the output directory; complete or absent. With nothing to forget it is the model, byte for byte.
        options: the rows, the method and what is measured.
        resume: what becomes of an interrupted run's journal beside `out`: True continues it, False discards it, None
            refuses to start.
        confirm: called with a sentence on the rows that were chosen; False stops the job before anything is computed.
        allow_damage: write the output even if retained rows lose more than `options.max_retain_loss` allows.

    Started by torchrun, processes share the models that are trained beside it, the rows whose gradients are taken and
    the models of an audit; the move itself is made by all alike, so that one process and several write the same bytes.

    Rows that earlier steps of the model's recipe forgot are not retained, and no model is trained on them; the recipe
    knows them by keyed digests.

    Returns:
        The report, as in report.json: figures before and after for the forget set, the retained and the validation
        rows.

    Raises:
        BadInput: model, rows, options or output will not do, or were not confirmed; nothing was written.
        Failed: retained or validation rows got worse than allowed; nothing was written.
        Diverged: the model answers in numbers no more; lower the learning rate and start anew.
    """
    out = Path(out)
    with raise_together():
        job = validate(model, out, options)
        options = job.options
        if is_main_process():
            goes_on = check_journal(out, job.identity, resume)
            if confirm is not None and not goes_on:
                for question in (job.summary(), job.doubtful()):
                    if question is not None and not confirm(question):
                        raise BadInput("not confirmed; nothing was done")
    with journal_beside(out, job.identity, resume) as journal, replicated():
        return _run(job, out, options, journal, allow_damage)


def _run(job: UnlearningRequest, out: Path, options: Unlearn, journal: Journal, allow_damage: bool) -> dict[str, Any]:
    trainable, work = job.trainable, job.work(options, journal)
    before = trainable.one()
    groups = groups_of(work, job.validation, job.train.examples[job.earlier.rows])
    report: dict[str, Any] = {
        "job": "unlearn", "method": options.method, "task": trainable.task,
        "rows": {"train": job.identity["data"]["train"]["rows"], "forget": job.identity["data"]["forget"]["rows"]},
        "data": job.identity["data"], "quality_by_stage": {"before": figures(trainable.task, before, groups)},
    }  # fmt: skip
    if len(job.earlier.rows):
        report["rows"]["earlier"] = job.train.lines(job.earlier.rows.tolist())
    if job.why is not None:
        report["chosen"] = job.why
    if job.earlier.notes:
        report["notes"] = list(job.earlier.notes)
    if len(job.forgotten):
        way = method_of(options).prepare(work)
        after = way.apply(before, "moved")
        report |= way.facts
        if "moved" in journal:
            curve = journal.notes("moved")["curve"]
            names = dict.fromkeys(name for parts in curve for name in parts)  # a step may have only some
            report["curves"] = {name: [parts[name] for parts in curve if name in parts] for name in names}
        report["quality_by_stage"]["after"] = figures(trainable.task, after, groups)
        models = {"before": before, "after": after}
        if any(not group["nats"] < float("inf") for group in report["quality_by_stage"]["after"].values()):
            raise Diverged("the model's answers are no numbers any more; lower the learning rate")
        report |= _damage(report, options, allow_damage)
        if beside := asked_of(trainable, models, job.asked, groups):
            if found := leaks(report["quality_by_stage"], beside.get("oracle", {})):
                beside["privacy_leak"] = found
            report["asked"] = beside
        if options.audit:
            report["audit"] = run_audit(work, way, job.validation)
            for shown in report["audit"]["shown"]:
                shown["row"] = int(job.left[shown["row"]])
    else:
        after = before
        report["quality_by_stage"]["after"] = report["quality_by_stage"]["before"]
    if not is_main_process():
        return report
    report["quality"] = {f"{g} {n}": v for g, f in report["quality_by_stage"]["after"].items() for n, v in f.items()}
    params = {name: p[0] for name, p in after.params.items()}
    with atomic_folder(out, sum(p.nbytes for p in params.values())) as scratch:
        if after is before:
            _copy(trainable.folder, scratch)
        else:
            trainable.write(scratch, params)
        own = {name: value for name, value in job.identity.items() if name != "before"}
        step = {"job": "unlearn", **own, "quality": report["quality"]}
        if job.trainable.task == "causal-lm" and len(job.forgotten):
            step["forgotten"] = _known(report)
        after_bytes = sum(file.stat().st_size for file in scratch.glob("*.safetensors"))
        report["bytes"] = {"before": _stored(trainable.folder), "after": after_bytes}
        write_described(scratch, report, [*job.identity["before"], step], unlearned_page)
    return report


def _damage(report: dict[str, Any], options: Unlearn, allowed: bool) -> dict[str, Any]:
    """What a report says of rows that got worse than they may.  Raises Failed where that is not allowed."""
    task, bound = report["task"], retain_loss_bound(report["task"], options.max_retain_loss)
    found = losses(task, report["quality_by_stage"], bound)
    if not found:
        return {}
    if not allowed:
        less = "a lower --lr, fewer --epochs" if options.entry.by_steps else "another --method"
        raise Failed(
            f"{lost(task, found, bound)} (--max-retain-loss), and nothing was written. {figures_of(report)} Use "
            f"{less}, or write it all the same with --allow-damage"
        )
    return {"damage": {"lost": found, "bound": bound}}


def _known(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the model knew of the forget set at each stage, by which a gate knows how much is recovered later."""
    stages = dict(report["quality_by_stage"])
    if "oracle" in report.get("asked", {}):
        stages["oracle"] = report["asked"]["oracle"]
    return {stage: knowledge_of(of["forget"]) for stage, of in stages.items()}


def _stored(model: Path) -> int:
    """Bytes of a folder's weights, or of a file."""
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _copy(model: Path, scratch: Path) -> None:
    """The model's own bytes."""
    if model.is_file():
        shutil.copyfile(model, scratch / "model.safetensors")
        return
    names = {"config.json", "model.safetensors.index.json"}
    names |= {entry.file.name for entry in Weights(model).entries.values()}
    for name in sorted(names):
        if (model / name).is_file():
            shutil.copyfile(model / name, scratch / name)
    copy_companions(model, scratch)
