"""Distil a sequence classifier, such as BERT with a head, on texts with labels: classes, several labels, or numbers.

A row is one decision here, so everything is small: the teacher's logits on all rows are kept, and a set that Sinkhorn
compares is the batch, as SinKD has it (arXiv:2402.17110). Teacher and student may have tokenizers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.corpus import batch_order
from calib.data.labeled import LabeledRows, read_labeled
from calib.data.targets import SINGLE, classification_targets, problem_of
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import atomic_folder, check_destination, write_described
from calib.jobs.recipe import past_of
from calib.jobs.training_loop import Group, MovingAverage, Parts, naming_rows, optimize, steps_done
from calib.losses.divergences import cross_entropy
from calib.model.checkpoint import find_model
from calib.model.companions import copy_companions
from calib.model.padding import keep_padding
from calib.model.weights import Weights
from calib.runtime.device import fork_rng, pick_device
from calib.runtime.distributed import all_reduce_sum_, barrier, is_main_process, raise_together, rank, world_size
from calib.runtime.precision import autocast_dtype
from calib.runtime.progress import stage
from calib.stats.classification import metrics_of
from compressor.distillation.auxiliary_modules import AuxiliaryModules, auxiliary_modules, errors_of
from compressor.distillation.classifier import Classifier, check_rows, classifier_config, open_classifier
from compressor.distillation.loss_expression import SETS_LOSSES, check_problem, of_problem, of_sets, parse_loss
from compressor.distillation.options import Distill
from compressor.distillation.prune_classifier import check_loads, choose_classifier_layers, cut_layers, stacks_of
from compressor.distillation.train import optimizer_of
from compressor.engine.damage import judge_training
from compressor.report.distillation import classified_page

HELD_OUT = 16  # rows, where nobody says how many
CLASSIFIER_SELECTION_ROWS = 256  # rows on which layers are chosen
FEW = 8  # rows on which a student is compared with itself, saved and loaded
USED = {
    "task", "base_model", "dequantize", "student", "layers", "data", "samples", "length", "held_out", "held_out_data",
    "loss", "temperature",
    "force", "steps", "batch", "lr", "warmup", "max_grad_norm", "decay", "ema", "optimizer", "seed", "device",
    "precision", "memory_budget",
}  # fmt: skip


@dataclass(frozen=True)
class ClassifierDistillationJob:
    """A distillation of a classifier, checked: models, problem type, training and held-out rows with their labels, and
    what its recipe records."""

    teacher: Path
    student: Path | None
    problem: str  # of calib.data.targets
    train: LabeledRows
    labels: Tensor
    held_out: LabeledRows
    held_out_labels: Tensor
    identity: dict[str, Any]


def check_classifier_options(options: Distill) -> Path:
    """-> the data.  Raises BadInput for an option that is for language models alone."""
    for f in fields(options):
        default = f.default if f.default is not MISSING else None
        if f.name not in USED and getattr(options, f.name) != default:
            raise BadInput(f"{f.name.replace('_', '-')}: is for language models; leave it out")
    if options.data is None:
        raise BadInput("data: a classifier needs texts with labels; give --data FILE.tsv or FILE.jsonl")
    if options.student is None and options.layers is None:
        raise BadInput("no student: give --student DIR, or --layers for one made from the teacher")
    return options.data


def distill_classifier(
    teacher: str | Path, out: Path, options: Distill, resume: bool | None, *, allow_damage: bool = False
) -> dict[str, Any]:
    """`distill` for `--task sequence-classification`."""
    with raise_together():
        job = validate_classifier_distillation(teacher, out, options)
        models = open_models(job, out, options)
    with journal_beside(out, job.identity, resume) as journal:
        return run_classifier_distillation(job, *models, out, options, journal, allow_damage=allow_damage)


def validate_classifier_distillation(teacher: str | Path, out: Path, options: Distill) -> ClassifierDistillationJob:
    """Check models, rows and destination before anything is computed.  Raises BadInput."""
    source = check_classifier_options(options)
    folder = find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)
    student = None if options.student is None else find_model(options.student)
    config = classifier_config(folder)
    problem = problem_of(config, folder / "config.json")
    check_problem(parse_loss(options.loss), problem, options.temperature)
    has = getattr(config, "num_hidden_layers", None)
    if options.layers is not None and not (isinstance(has, int) and 1 <= options.layers <= has):
        raise BadInput(f"layers: the teacher has {has}, {options.layers} were asked for")

    def read(path: Path) -> tuple[LabeledRows, Tensor]:
        rows = read_labeled(path)
        return rows, classification_targets(rows, config.label2id, config.num_labels, problem)

    data, targets = read(Path(source))
    shuffled = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(options.seed)).tolist()
    if options.held_out_data is not None:
        held_out, held_out_targets = read(Path(options.held_out_data))
        rows = shuffled[: options.samples] if options.samples is not None else range(len(data.texts))
    else:
        apart = options.held_out or HELD_OUT
        held_out, held_out_targets = data[shuffled[:apart]], targets[shuffled[:apart]]
        rows = shuffled[apart:][: options.samples]
    train, targets = data[list(rows)], targets[list(rows)]
    if not train.texts or not held_out.texts:
        raise BadInput(f"{data.source}: has {len(data.texts)} rows, too few to train on and to hold out; give more")
    if options.samples is not None and options.samples > len(train.texts):
        raise BadInput(f"{data.source}: gives {len(train.texts)} rows, {options.samples} were asked for; ask for fewer")
    folders = [f for f in (folder, student) if f is not None]
    for one in folders:
        Weights(one)  # refuses what is incomplete, or leads outside the folder
    check_destination(out, folders, 5 * sum(f.stat().st_size for f in folders[-1].glob("*.safetensors")))
    device = pick_device(options.device)
    model = folder_identity(teacher, folder, hash_of(folder.glob("*.safetensors")))
    identity = identity_of(options, model, device, autocast_dtype(options.precision, device))
    identity["problem_type"] = problem
    identity["data"] = {"training": _described(train), "held_out": _described(held_out)}
    if student is not None:
        identity["student"] = folder_identity(str(options.student), student, hash_of(student.glob("*.safetensors")))
    return ClassifierDistillationJob(folder, student, problem, train, targets, held_out, held_out_targets, identity)


def _described(data: LabeledRows) -> dict[str, Any]:
    return {"source": Path(data.source).name, "rows": len(data.texts), "sha256": data.fingerprint}


def with_layers_left(
    teacher: Classifier, keep: int, texts: Sequence[tuple[str, ...]], problem: str = SINGLE
) -> tuple[Classifier, list[list[int]]]:
    """A student of the `keep` layers, in each stack, that are missed most (compressor.distillation.prune_classifier),
    on `texts`."""
    model, left = choose_classifier_layers(
        teacher.model, keep, lambda model: replace(teacher, model=model).answers(texts), problem
    )
    return replace(teacher, model=model), left


def open_models(job: ClassifierDistillationJob, out: Path, options: Distill) -> tuple[Classifier, Classifier | None]:
    """The teacher, and the student if it is not made of it."""
    teacher, student = open_classifier(job.teacher, options), None
    heedless = job.student is not None and all(term.name == "ce" for term in parse_loss(options.loss))
    if teacher.headless and not heedless:
        raise BadInput(
            f"{job.teacher}: has no classification head, so it teaches nothing; fine-tune it first, with --student and "
            "--loss ce"
        )
    check_rows(teacher, job.train.texts, job.teacher)
    if job.student is None:
        stacks = stacks_of(teacher.model)  # whatever is chosen, a student of so many layers must load
        keep = options.layers or 1
        some = replace(teacher, model=cut_layers(teacher.model, stacks, [range(min(keep, s.size)) for s in stacks]))
        if is_main_process():
            check_loads(some.model, _answers_of(some, job), out)
        return teacher, None
    config = teacher.model.config
    student = open_classifier(job.student, options, num_labels=config.num_labels, label2id=config.label2id,
                     id2label=config.id2label, problem_type=job.problem)  # fmt: skip
    check_rows(student, job.train.texts, job.student)
    return teacher, student


def _answers_of(classifier: Classifier, job: ClassifierDistillationJob) -> Callable[[Any], Tensor]:
    """Of a model, on a few rows."""
    return lambda model: replace(classifier, model=model, products=None).answers(job.train.texts[:FEW])


def run_classifier_distillation(
    job: ClassifierDistillationJob,
    teacher: Classifier,
    student: Classifier | None,
    out: Path,
    options: Distill,
    journal: Journal,
    *,
    allow_damage: bool,
) -> dict[str, Any]:
    """-> the report, as in report.json; of a process that is not the main one, its figures."""
    left: list[list[int]] | None = None
    answers = _teacher_answers(job, teacher, journal)
    if student is None:
        assert options.layers is not None
        student, left = with_layers_left(
            teacher, options.layers, job.train.texts[:CLASSIFIER_SELECTION_ROWS], job.problem
        )
        with raise_together():
            if is_main_process():
                check_loads(student.model, _answers_of(student, job), out)

    def figures_of(logits: Tensor) -> dict[str, Any]:
        return metrics_of(logits, job.held_out_labels, answers["held_out"], job.problem)

    figures = {"teacher": figures_of(answers["held_out"])}
    figures["before"] = figures_of(student.answers(job.held_out.texts))
    curve = _trained(student, job, answers["train"], options, CheckpointSlot(journal, "distil"))
    figures["after"] = figures_of(student.answers(job.held_out.texts))
    before, after = figures["before"], figures["after"]
    damage = judge_training(options.loss, before, after, labels=options.learns_labels, allow=allow_damage)
    if not is_main_process():
        return {"quality": figures["after"], "quality_by_stage": figures}
    report = {
        "job": "classify",
        "student": job.student.resolve().name if job.student else f"{options.layers} layers",
        "problem_type": job.problem,
        "cut": left[0] if left and len(left) == 1 else left and dict(zip(("encoder", "decoder"), left, strict=True)),
        "quality": figures["after"],
        "quality_by_stage": figures,
        "damage": damage,
        "parameters": {"teacher": teacher.model.num_parameters(), "student": student.model.num_parameters()},
        "data": {
            name: of | ({"cut_rows": cut} if (cut := student.cut(rows.texts)) else {})
            for (name, of), rows in zip(job.identity["data"].items(), (job.train, job.held_out), strict=True)
        },
        "curves": {name: [parts[name] for parts in curve] for name in curve[0]},
    }
    _save(job, student, out, report)
    return report


def _teacher_answers(job: ClassifierDistillationJob, teacher: Classifier, journal: Journal) -> dict[str, Tensor]:
    """Of training and held-out rows, kept in the journal."""
    if "teacher" not in journal:
        texts = {"train": job.train.texts, "held_out": job.held_out.texts}
        with stage("teacher", sum(map(len, texts.values())), "rows") as done:
            answers = {name: teacher.answers(some, done) for name, some in texts.items()}
        journal.write("teacher", answers, {})
    barrier()
    return journal.read("teacher")[0]


def _save(job: ClassifierDistillationJob, student: Classifier, out: Path, report: dict[str, Any]) -> None:
    """Write the student with its recipe and report, which gets its bytes."""
    with atomic_folder(out, 4 * report["parameters"]["student"]) as scratch:
        student.model.save_pretrained(scratch)
        student.tokenizer.save_pretrained(scratch)
        copy_companions(job.student or job.teacher, scratch)
        keep_padding(student.tokenizer, scratch)
        step = {"job": "distill", **job.identity, "quality": report["quality"]}
        report["bytes"] = {
            when: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for when, folder in (("before", job.teacher), ("after", scratch))
        }
        write_described(scratch, report, [*past_of(job.student or job.teacher), step], classified_page)


def _trained(
    student: Classifier, job: ClassifierDistillationJob, answers: Tensor, options: Distill, page: CheckpointSlot
) -> list[dict[str, float]]:
    """Train the student on the teacher's `answers`.  -> each loss of every step."""
    auxiliary = auxiliary_modules(
        parse_loss(options.loss), layers=0, student_width=0, teacher_width=0, seed=options.seed,
        device=student.model.device,
    )  # fmt: skip
    params = [*(p for p in student.model.parameters() if p.requires_grad), *auxiliary.params]
    rows_of_step = batch_order(len(job.train.texts), options.steps, options.batch, options.seed)
    average, at = MovingAverage(params, options.ema), 0

    def gradients(step: int) -> Parts:
        nonlocal at
        at = step
        auxiliary.errors.clear()
        parts = _step(student, job, answers, options, auxiliary, rows_of_step[step][rank() :: world_size()], step)
        return parts | errors_of(auxiliary)

    def after(step: int, parts: Parts) -> None:
        average.update(step)
        done(", ".join(f"{name} {value:.4f}" for name, value in parts.items()))

    with (
        stage("distil", options.steps, "steps", steps_done(page)) as done,
        naming_rows(rows_of_step, lambda: at),
    ):
        curve = optimize(
            [Group(params, options.lr)], gradients, optimizer_of(options), after_step=after, keep=average.kept,
            page=page,
        )  # fmt: skip
    average.write_back()
    return curve


def _step(
    student: Classifier, job: ClassifierDistillationJob, answers: Tensor, options: Distill,
    auxiliary: AuxiliaryModules, rows: list[int], step: int,
) -> dict[str, float]:  # fmt: skip
    """Add up this process's gradients of a step's rows.  -> its share of every loss."""
    device, terms = student.model.device, auxiliary.terms
    own_measure = any(term.name == "uskd" for term in terms)  # the whole batch, of which this process has some rows
    if not rows:
        if own_measure:
            all_reduce_sum_([torch.zeros((), device=device)])
        return {term.label: 0.0 for term in terms}
    with fork_rng(device, options.seed + 1_000_003 * step + rank()):  # of dropout
        student.model.train()
        q = student.logits([job.train.texts[row] for row in rows])
    p, target = answers[rows].to(device), job.labels[rows].to(device)
    if own_measure:
        level = (-2 * cross_entropy(target, q.detach())).exp().sum() / options.batch
        all_reduce_sum_([level])
    parts: dict[str, Tensor] = {}
    for term in terms:
        if term.name in SETS_LOSSES:
            values, error = of_sets(term, p[None], q[None], options.temperature)
            value, auxiliary.errors[term.label] = values[0] * len(rows), float(error) * len(rows) / options.batch
        else:
            if term.name == "uskd":
                term = replace(term, loss=partial(term.loss, level=level))
            value = of_problem(term, job.problem, p, q, target, options.temperature).sum()
        parts[term.label] = term.weight * value / options.batch
    torch.stack(list(parts.values())).sum().backward()
    return {name: float(value.detach()) for name, value in parts.items()}
