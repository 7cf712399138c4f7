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

from calib import BadInput, Diverged
from calib.data.corpus import order
from calib.data.labeled import Labelled, read_labelled
from calib.data.targets import SINGLE, problem_of, targets_of
from calib.jobs.journal import Journal, Page, journal_beside
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import check_destination, write_described, writing
from calib.jobs.recipe import past_of
from calib.jobs.training_loop import Descent, Group, Parts, fit, steps_done
from calib.losses.divergences import cross_entropy
from calib.model.checkpoint import find_model
from calib.model.companions import copy_companions
from calib.model.padding import keep_padding
from calib.model.weights import Weights
from calib.runtime.device import pick_device, seeded
from calib.runtime.distributed import add_up, all_or_none, barrier, is_first, processes, rank
from calib.runtime.precision import products_of
from calib.runtime.progress import stage
from calib.stats.classification import measured
from compressor.distillation.auxiliary_modules import beside, errors_of
from compressor.distillation.classifier import Classifier, check_rows, classifier_config, opened
from compressor.distillation.loss_expression import SETS, check_problem, of_problem, of_sets, parse
from compressor.distillation.options import Distill
from compressor.distillation.prune_classifier import check_loads, choose_layers, cut, stacks_of
from compressor.engine.damage import judged_training
from compressor.report.distillation import classified_page

HELD_OUT = 16  # rows, where nobody says how many
CHOSEN_ON = 256  # rows on which layers are chosen
FEW = 8  # rows on which a student is compared with itself, saved and loaded
USED = {
    "task", "base_model", "dequantize", "student", "layers", "data", "samples", "length", "held_out", "held_out_data",
    "loss", "temperature",
    "force", "steps", "batch", "lr", "warmup", "clip", "decay", "average", "eight_bit", "seed", "device", "precision",
    "memory_budget",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    teacher: Path
    student: Path | None
    problem: str  # of calib.data.targets
    train: Labelled
    labels: Tensor
    held_out: Labelled
    held_out_labels: Tensor
    identity: dict[str, Any]


def check_options(how: Distill) -> Path:
    """-> the data.  Raises BadInput for an option that is for language models alone."""
    for f in fields(how):
        default = f.default if f.default is not MISSING else None
        if f.name not in USED and getattr(how, f.name) != default:
            raise BadInput(f"{f.name.replace('_', '-')}: is for language models; leave it out")
    if how.data is None:
        raise BadInput("data: a classifier needs texts with labels; give --data FILE.tsv or FILE.jsonl")
    if how.student is None and how.layers is None:
        raise BadInput("no student: give --student DIR, or --layers for one made from the teacher")
    return how.data


def classify(
    teacher: str | Path, out: Path, how: Distill, resume: bool | None, *, allow_damage: bool = False
) -> dict[str, Any]:
    """`distill` for `--task sequence-classification`."""
    with all_or_none():
        job = checked(teacher, out, how)
        models = models_of(job, out, how)
    with journal_beside(out, job.identity, resume) as journal:
        return run_job(job, *models, out, how, journal, allow_damage=allow_damage)


def checked(teacher: str | Path, out: Path, how: Distill) -> Checked:
    source = check_options(how)
    folder = find_model(teacher, base_model=how.base_model, dequantize=how.dequantize)
    student = None if how.student is None else find_model(how.student)
    config = classifier_config(folder)
    problem = problem_of(config, folder / "config.json")
    check_problem(parse(how.loss), problem, how.temperature)
    has = getattr(config, "num_hidden_layers", None)
    if how.layers is not None and not (isinstance(has, int) and 1 <= how.layers <= has):
        raise BadInput(f"layers: the teacher has {has}, {how.layers} were asked for")

    def read(path: Path) -> tuple[Labelled, Tensor]:
        rows = read_labelled(path)
        return rows, targets_of(rows, config.label2id, config.num_labels, problem)

    data, targets = read(Path(source))
    shuffled = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(how.seed)).tolist()
    if how.held_out_data is not None:
        held_out, held_out_targets = read(Path(how.held_out_data))
        rows = shuffled[: how.samples] if how.samples is not None else range(len(data.texts))
    else:
        apart = how.held_out or HELD_OUT
        held_out, held_out_targets = data[shuffled[:apart]], targets[shuffled[:apart]]
        rows = shuffled[apart:][: how.samples]
    train, targets = data[list(rows)], targets[list(rows)]
    if not train.texts or not held_out.texts:
        raise BadInput(f"{data.source}: has {len(data.texts)} rows, too few to train on and to hold out; give more")
    if how.samples is not None and how.samples > len(train.texts):
        raise BadInput(f"{data.source}: gives {len(train.texts)} rows, {how.samples} were asked for; ask for fewer")
    folders = [f for f in (folder, student) if f is not None]
    for one in folders:
        Weights(one)  # refuses what is incomplete, or leads outside the folder
    check_destination(out, folders, 5 * sum(f.stat().st_size for f in folders[-1].glob("*.safetensors")))
    device = pick_device(how.device)
    model = folder_identity(teacher, folder, hash_of(folder.glob("*.safetensors")))
    identity = identity_of(how, model, device, products_of(how.precision, device))
    identity["problem_type"] = problem
    identity["data"] = {"training": _described(train), "held_out": _described(held_out)}
    if student is not None:
        identity["student"] = folder_identity(str(how.student), student, hash_of(student.glob("*.safetensors")))
    return Checked(folder, student, problem, train, targets, held_out, held_out_targets, identity)


def _described(data: Labelled) -> dict[str, Any]:
    return {"source": Path(data.source).name, "rows": len(data.texts), "sha256": data.fingerprint}


def with_layers_left(
    teacher: Classifier, keep: int, texts: Sequence[tuple[str, ...]], problem: str = SINGLE
) -> tuple[Classifier, list[list[int]]]:
    """A student of the `keep` layers, in each stack, that are missed most (compressor.distillation.prune_classifier),
    on `texts`."""
    model, left = choose_layers(
        teacher.model, keep, lambda model: replace(teacher, model=model).answers(texts), problem
    )
    return replace(teacher, model=model), left


def models_of(job: Checked, out: Path, how: Distill) -> tuple[Classifier, Classifier | None]:
    """The teacher, and the student if it is not made of it."""
    teacher, student = opened(job.teacher, how), None
    heedless = job.student is not None and all(term.name == "ce" for term in parse(how.loss))
    if teacher.headless and not heedless:
        raise BadInput(
            f"{job.teacher}: has no classification head, so it teaches nothing; fine-tune it first, with --student and "
            "--loss ce"
        )
    check_rows(teacher, job.train.texts, job.teacher)
    if job.student is None:
        stacks = stacks_of(teacher.model)  # whatever is chosen, a student of so many layers must load
        keep = how.layers or 1
        some = replace(teacher, model=cut(teacher.model, stacks, [range(min(keep, s.size)) for s in stacks]))
        if is_first():
            check_loads(some.model, _answers_of(some, job), out)
        return teacher, None
    config = teacher.model.config
    student = opened(job.student, how, num_labels=config.num_labels, label2id=config.label2id,
                     id2label=config.id2label, problem_type=job.problem)  # fmt: skip
    check_rows(student, job.train.texts, job.student)
    return teacher, student


def _answers_of(classifier: Classifier, job: Checked) -> Callable[[Any], Tensor]:
    """Of a model, on a few rows."""
    return lambda model: replace(classifier, model=model, products=None).answers(job.train.texts[:FEW])


def run_job(
    job: Checked,
    teacher: Classifier,
    student: Classifier | None,
    out: Path,
    how: Distill,
    journal: Journal,
    *,
    allow_damage: bool,
) -> dict[str, Any]:
    left: list[list[int]] | None = None
    if "teacher" not in journal:
        texts = {"train": job.train.texts, "held_out": job.held_out.texts}
        with stage("teacher", sum(map(len, texts.values())), "rows") as done:
            said = {name: teacher.answers(some, done) for name, some in texts.items()}
        journal.write("teacher", said, {})
    barrier()
    said, _ = journal.read("teacher")
    if student is None:
        assert how.layers is not None
        student, left = with_layers_left(teacher, how.layers, job.train.texts[:CHOSEN_ON], job.problem)
        with all_or_none():
            if is_first():
                check_loads(student.model, _answers_of(student, job), out)

    def figures_of(logits: Tensor) -> dict[str, Any]:
        return measured(logits, job.held_out_labels, said["held_out"], job.problem)

    figures = {"teacher": figures_of(said["held_out"])}
    figures["before"] = figures_of(student.answers(job.held_out.texts))
    curve = _trained(student, job, said["train"], how, Page(journal, "distil"))
    figures["after"] = figures_of(student.answers(job.held_out.texts))
    before, after = figures["before"], figures["after"]
    damage = judged_training(how.loss, before, after, labels=how.learns_labels, allow=allow_damage)
    if not is_first():
        return {"quality": figures["after"], "quality_by_stage": figures}
    counts = {"teacher": teacher.model.num_parameters(), "student": student.model.num_parameters()}
    report = {
        "job": "classify",
        "student": job.student.resolve().name if job.student else f"{how.layers} layers",
        "problem_type": job.problem,
        "cut": left[0] if left and len(left) == 1 else left and dict(zip(("encoder", "decoder"), left, strict=True)),
        "quality": figures["after"],
        "quality_by_stage": figures,
        "damage": damage,
        "parameters": counts,
        "data": {
            name: of | ({"cut_rows": cut} if (cut := student.cut(rows.texts)) else {})
            for (name, of), rows in zip(job.identity["data"].items(), (job.train, job.held_out), strict=True)
        },
        "curves": {name: [parts[name] for parts in curve] for name in curve[0]},
    }
    with writing(out, 4 * counts["student"]) as scratch:
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
    return report


def _trained(student: Classifier, job: Checked, said: Tensor, how: Distill, page: Page) -> list[dict[str, float]]:
    device = student.model.device
    aside = beside(parse(how.loss), layers=0, ours=0, theirs=0, seed=how.seed, device=device)
    terms, params = aside.terms, [*(p for p in student.model.parameters() if p.requires_grad), *aside.params]
    rows_of_step = order(len(job.train.texts), how.steps, how.batch, how.seed)
    mean = [p.detach().clone() for p in params] if how.average else []
    own_measure = any(term.name == "uskd" for term in terms)  # the whole batch, of which this process has some rows

    at = 0

    def gradients(step: int) -> Parts:
        nonlocal at
        at = step
        aside.errors.clear()
        rows = rows_of_step[step][rank() :: processes()]
        if not rows:
            if own_measure:
                add_up([torch.zeros((), device=device)])
            return {term.label: 0.0 for term in terms} | errors_of(aside)
        with seeded(device, how.seed + 1_000_003 * step + rank()):  # of dropout
            student.model.train()
            q = student.logits([job.train.texts[row] for row in rows])
        p, target = said[rows].to(device), job.labels[rows].to(device)
        if own_measure:
            level = (-2 * cross_entropy(target, q.detach())).exp().sum() / how.batch
            add_up([level])
        parts: dict[str, Tensor] = {}
        for term in terms:
            if term.name in SETS:
                values, error = of_sets(term, p[None], q[None], how.temperature)
                value, aside.errors[term.label] = values[0] * len(rows), float(error) * len(rows) / how.batch
            else:
                if term.name == "uskd":
                    term = replace(term, loss=partial(term.loss, level=level))
                value = of_problem(term, job.problem, p, q, target, how.temperature).sum()
            parts[term.label] = term.weight * value / how.batch
        torch.stack(list(parts.values())).sum().backward()
        return {name: float(value.detach()) for name, value in parts.items()} | errors_of(aside)

    def after(step: int, parts: Parts) -> None:
        for kept, p in zip(mean, params, strict=False):
            kept.lerp_(p.detach(), max(1 - how.average, 1 / (step + 1)))
        done(", ".join(f"{name} {value:.4f}" for name, value in parts.items()))

    descent = Descent(steps=how.steps, warmup=how.warmup, clip=how.clip, decay=how.decay, eight_bit=how.eight_bit)
    keep = {f"mean.{i}": kept for i, kept in enumerate(mean)}
    with stage("distil", how.steps, "steps", steps_done(page)) as done:
        try:
            curve = fit([Group(params, how.lr)], gradients, descent, after_step=after, keep=keep, page=page)
        except Diverged as error:
            raise Diverged(f"{error} (rows {', '.join(map(str, rows_of_step[at]))})") from error
    with torch.no_grad():
        for kept, p in zip(mean, params, strict=False):
            p.copy_(kept)
    return curve
