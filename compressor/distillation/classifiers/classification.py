"""Distil a classifier on rows with labels: of texts, such as BERT with a head, which asks for classes, several labels
or numbers; of images, such as ResNet or ViT; or any module of the user's own that answers tensors with logits.

A row is one decision here, so everything is small: the teacher's logits on all rows are kept, and a set that Sinkhorn
compares is the batch, as SinKD has it (arXiv:2402.17110). Teacher and student may have tokenizers, or processors of
images, of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.labeled import LabeledRows, read_labeled
from calib.data.labeled_images import LabeledImages, check_classes, opened_image, read_image_folder, read_image_tensors
from calib.data.targets import SINGLE, classification_targets, problem_of
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import (
    TEACHER_FOLDER,
    atomic_folder,
    check_apart,
    check_destination,
    write_described,
    write_json,
)
from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model
from calib.model.config import RECIPE
from calib.model.factory import WEIGHTS_FILE, factory_of, weights_file
from calib.model.weights import Weights
from calib.runtime.device import pick_device
from calib.runtime.distributed import barrier, is_main_process, raise_together
from calib.runtime.precision import autocast_dtype
from calib.runtime.progress import stage
from calib.stats.classification import metrics_of
from compressor.distillation.classifiers.features import exit_widths, matching_modules, states_of
from compressor.distillation.classifiers.images import (
    ImageClassifier,
    check_images,
    described_factory,
    open_image_classifier,
    share_processor,
)
from compressor.distillation.classifiers.prune_classifier import (
    check_loads,
    choose_classifier_layers,
    cut_layers,
    stacks_of,
)
from compressor.distillation.classifiers.texts import check_rows, classifier_config, open_classifier
from compressor.distillation.classifiers.training import Classifier, TaughtRows, train_classifier
from compressor.distillation.loss_expression import check_problem, parse_loss
from compressor.distillation.options import IMAGES, Distill
from compressor.engine.damage import judge_training
from compressor.report.distillation import classified_page

HELD_OUT = 16  # rows, where nobody says how many
CLASSIFIER_SELECTION_ROWS = 256  # rows on which layers are chosen
FEW = 8  # rows on which a student is compared with itself, saved and loaded
UNLIKE = 8  # sizes of image files that processors are tried with, before anything is computed
USED = {
    "task", "base_model", "dequantize", "student", "layers", "data", "samples", "length", "held_out", "held_out_data",
    "loss", "temperature", "factory", "student_factory", "exits", "teacher_exits", "project", "teacher", "teacher_lr",
    "force", "steps", "batch", "lr", "warmup", "max_grad_norm", "decay", "ema", "optimizer", "seed", "device",
    "precision", "memory_budget",
}  # fmt: skip
ClassifiedRows = LabeledRows | LabeledImages


@dataclass(frozen=True)
class ClassifierDistillationJob:
    """A distillation of a classifier, checked: models (directories, or files of factories' weights; None: a student
    that is made here), problem type, training and held-out rows with their labels, and what its recipe records."""

    teacher: Path
    student: Path | None
    problem: str  # of calib.data.targets
    train: ClassifiedRows
    labels: Tensor
    held_out: ClassifiedRows
    held_out_labels: Tensor
    identity: dict[str, Any]


def check_classifier_options(options: Distill) -> Path:
    """-> the data.  Raises BadInput for an option that is for language models alone, or for another kind of rows."""
    for f in fields(options):
        default = f.default if f.default is not MISSING else None
        if f.name not in USED and getattr(options, f.name) != default:
            raise BadInput(f"{f.name.replace('_', '-')}: is for language models; leave it out")
    if options.teacher not in ("online", "together"):
        raise BadInput(f"teacher {options.teacher}: is for language models; leave it out, or give together")
    if options.data is None:
        what = "images with classes; give --data DIR or FILE.safetensors" if options.sees_images else (
            "texts with labels; give --data FILE.tsv or FILE.jsonl")  # fmt: skip
        raise BadInput(f"data: a classifier needs {what}")
    if options.sees_images and options.length is not None:
        raise BadInput("length: counts tokens, and images have none; leave it out")
    if options.factory is not None and (options.base_model is not None or options.dequantize or options.shape.layers):
        raise BadInput("factory: its module is taken as it is; leave out --base-model, --dequantize and --layers")
    if options.student is None and options.shape.layers is None and options.student_factory is None:
        raise BadInput("no student: give --student DIR, or --layers for one made from the teacher")
    return options.data


def distill_classifier(
    teacher: str | Path, out: Path, options: Distill, resume: bool | None, *, allow_damage: bool = False
) -> dict[str, Any]:
    """`distill` for classifiers, of texts, of images and of tensors."""
    with raise_together():
        job = validate_classifier_distillation(teacher, out, options)
        models = open_models(job, out, options)
    with journal_beside(out, job.identity, resume) as journal:
        return run_classifier_distillation(job, *models, out, options, journal, allow_damage=allow_damage)


def validate_classifier_distillation(teacher: str | Path, out: Path, options: Distill) -> ClassifierDistillationJob:
    """Check models, rows and destination before anything is computed.  Raises BadInput."""
    source = check_classifier_options(options)
    places = _places(teacher, options)
    config, problem = None, SINGLE
    for place, factory in zip(places, (options.factory, options.student_factory), strict=True):
        if config is None and place is not None and factory is None:
            config = classifier_config(place)
            problem = problem_of(config, place / "config.json")
            if options.sees_images and problem != SINGLE:
                raise BadInput(f"{place / 'config.json'}: is of {problem}; images have one class each here")
    check_problem(parse_loss(options.loss), problem, options.temperature)
    has = getattr(config, "num_hidden_layers", None)
    if options.shape.layers is not None and not (isinstance(has, int) and 1 <= options.shape.layers <= has):
        raise BadInput(f"layers: the teacher has {has}, {options.shape.layers} were asked for")

    def read(path: Path) -> tuple[ClassifiedRows, Tensor]:
        if options.sees_images:
            images = read_image_folder(path, _classes_by_name(config)) if path.is_dir() else read_image_tensors(path)
            return images, images.labels
        rows = read_labeled(path)
        return rows, classification_targets(rows, config.label2id, config.num_labels, problem)  # type: ignore[union-attr]

    train, targets, held_out, held_out_targets = _split(read, Path(source), options)
    for given in (options.data, options.held_out_data):
        if options.sees_images and given is not None:
            check_apart(out, Path(given), "what the job reads,")
    return ClassifierDistillationJob(
        places[0], places[1], problem, train, targets, held_out, held_out_targets,
        _identity(teacher, out, places, options)
        | {"problem_type": problem, "data": {"training": _described(train), "held_out": _described(held_out)}},
    )  # fmt: skip


def _places(teacher: str | Path, options: Distill) -> tuple[Path, Path | None]:
    """Where the models' weights are.  Raises BadInput."""
    if options.factory is None:
        folder = find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)
        Weights(folder)  # refuses what is incomplete, or leads outside the folder
    else:
        factory_of(options.factory)
        folder = weights_file(Path(teacher)).parent if Path(teacher).is_dir() else weights_file(Path(teacher))
    student = options.student
    if options.student_factory is not None:
        factory_of(options.student_factory)
        if student is not None:
            student = weights_file(student).parent if student.is_dir() else weights_file(student)
    elif student is not None:
        student = find_model(student)
        Weights(student)
    return folder, student


def _classes_by_name(config: Any) -> dict[str, int]:
    if config is None:
        raise BadInput("data: is a directory of images, and a factory's module takes tensors; give .safetensors")
    return {str(name): int(number) for name, number in config.label2id.items()}


def _split(
    read: Callable[[Path], tuple[ClassifiedRows, Tensor]], source: Path, options: Distill
) -> tuple[ClassifiedRows, Tensor, ClassifiedRows, Tensor]:
    """Training rows and held-out rows, each with their targets.  Raises BadInput where there are too few."""
    data, targets = read(source)
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed)).tolist()
    if options.held_out_data is not None:
        held_out, held_out_targets = read(Path(options.held_out_data))
        rows = shuffled[: options.samples] if options.samples is not None else range(len(data))
    else:
        apart = options.held_out or HELD_OUT
        held_out, held_out_targets = data[shuffled[:apart]], targets[shuffled[:apart]]
        rows = shuffled[apart:][: options.samples]
    train, targets = data[list(rows)], targets[list(rows)]
    if not len(train) or not len(held_out):
        raise BadInput(f"{data.source}: has {len(data)} rows, too few to train on and to hold out; give more")
    if options.samples is not None and options.samples > len(train):
        raise BadInput(f"{data.source}: gives {len(train)} rows, {options.samples} were asked for; ask for fewer")
    return train, targets, held_out, held_out_targets


def _identity(teacher: str | Path, out: Path, places: tuple[Path, Path | None], options: Distill) -> dict[str, Any]:
    """What a recipe records of the models, and a journal compares.  Raises BadInput where OUT must not be written."""
    given = [place for place in places if place is not None]
    for file in (place for place in given if place.is_file()):
        check_apart(out, file, "what the job reads,")
    folders = [place if place.is_dir() else place.parent for place in given]
    needed = 5 * sum(file.stat().st_size for file in weight_files(given[-1]))
    check_destination(out, [f for f, place in zip(folders, given, strict=True) if place.is_dir()], needed)
    device = pick_device(options.device)
    model = folder_identity(teacher, places[0], hash_of(weight_files(places[0])))
    identity = identity_of(options, model, device, autocast_dtype(options.precision, device))
    if places[1] is not None:
        identity["student"] = folder_identity(str(options.student), places[1], hash_of(weight_files(places[1])))
    return identity


def weight_files(place: Path) -> list[Path]:
    """List the safetensors files of a directory, or the file itself."""
    return [place] if place.is_file() else sorted(place.glob("*.safetensors"))


def _described(data: ClassifiedRows) -> dict[str, Any]:
    return {"source": Path(data.source).name, "rows": len(data), "sha256": data.fingerprint}


def with_layers_left(
    teacher: Classifier, keep: int, inputs: Sequence[Any], problem: str = SINGLE
) -> tuple[Classifier, list[list[int]]]:
    """A student of the `keep` layers, in each stack, that are missed most
    (compressor.distillation.classifiers.prune_classifier), on `inputs`."""
    model, left = choose_classifier_layers(
        teacher.model, keep, lambda model: replace(teacher, model=model).answers(inputs), problem
    )
    return replace(teacher, model=model), left


def open_models(job: ClassifierDistillationJob, out: Path, options: Distill) -> tuple[Classifier, Classifier | None]:
    """The teacher, and the student if it is not made of it.  Raises BadInput."""
    teacher, student = (_open_image_models if options.sees_images else _open_text_models)(job, options)
    heedless = not options.shape.layers and all(term.name == "ce" for term in parse_loss(options.loss))
    if teacher.headless and not heedless:
        raise BadInput(
            f"{job.teacher}: has no classification head, so it teaches nothing; fine-tune it first, with --student and "
            "--loss ce"
        )
    if student is None:
        stacks = stacks_of(teacher.model)  # whatever is chosen, a student of so many layers must load
        keep = options.shape.layers or 1
        some = replace(teacher, model=cut_layers(teacher.model, stacks, [range(min(keep, s.size)) for s in stacks]))
        if is_main_process():
            check_loads(some.model, _answers_of(some, job), out)
        _check_exits(teacher, some, job, options)
    else:
        _check_exits(teacher, student, job, options)
    return teacher, student


def _check_exits(teacher: Classifier, student: Classifier, job: ClassifierDistillationJob, options: Distill) -> None:
    """Raises BadInput where modules that losses read are not there, or cannot be compared."""
    if options.exits is None or not isinstance(student, ImageClassifier) or not isinstance(teacher, ImageClassifier):
        return
    rows, path = job.train.inputs[:2], Path(job.train.source)
    own = exit_widths(student, rows, options.exits, "exits", path)
    if options.teacher_exits is None:
        return
    theirs = exit_widths(teacher, rows, options.teacher_exits, "teacher-exits", path)
    if len(own) != len(theirs):
        raise BadInput(f"teacher-exits: names {len(theirs)} modules, --exits {len(own)}; name as many of both")
    by_width = any(term.name == "hidden" for term in parse_loss(options.loss)) and not options.project
    if by_width and own != theirs:
        widths = (", ".join(map(str, of)) for of in (own, theirs))
        raise BadInput(
            f"loss hidden: the student's states are {next(widths)} wide, the teacher's {next(widths)}; compare with "
            "cka, or add --project"
        )


def _open_text_models(job: ClassifierDistillationJob, options: Distill) -> tuple[Classifier, Classifier | None]:
    teacher = open_classifier(job.teacher, options)
    check_rows(teacher, job.train.inputs, job.teacher)
    if job.student is None:
        return teacher, None
    config = teacher.model.config
    student = open_classifier(job.student, options, num_labels=config.num_labels, label2id=config.label2id,
                     id2label=config.id2label, problem_type=job.problem)  # fmt: skip
    check_rows(student, job.train.inputs, job.student)
    return teacher, student


def _open_image_models(job: ClassifierDistillationJob, options: Distill) -> tuple[Classifier, Classifier | None]:
    assert isinstance(job.train, LabeledImages) and isinstance(job.held_out, LabeledImages)
    files = isinstance(job.train.images, list)
    if files != isinstance(job.held_out.images, list):
        raise BadInput("held-out-data: must be of the same kind as --data, a directory of images or tensors")
    teacher = open_image_classifier(job.teacher, options.factory, options, files=files)
    student = None
    if options.shape.layers is None:
        config = getattr(teacher.model, "config", None) if options.factory is None else None
        more = {} if config is None or options.student_factory else {
            "num_labels": config.num_labels, "label2id": config.label2id, "id2label": config.id2label}  # fmt: skip
        student = open_image_classifier(job.student, options.student_factory, options, files=files, **more)
        share_processor(teacher, student)
        share_processor(student, teacher)
    if files:
        by_size = {opened_image(file, 3).size: file for rows in (job.train, job.held_out) for file in rows.inputs}
        for one in (teacher, student):  # a few unlike images are met here, not in the middle of training
            if one is not None and one.read is not None:
                one.read(list(by_size.values())[:UNLIKE])
    classes = check_images(teacher, job.train, 0)
    learns = check_images(student or teacher, job.train, options.batch)
    if learns != classes:
        raise BadInput(f"student: chooses from {learns} classes, the teacher from {classes}; give one of as many")
    for rows in (job.train, job.held_out):
        check_classes(rows.labels, classes, Path(rows.source))
    check_images(teacher, job.held_out, 0)
    made = {"teacher": teacher, "student": student}
    if factories := {w: described_factory(one) for w, one in made.items() if one is not None and one.factory}:
        job.identity["factories"] = factories
    return teacher, student


def _answers_of(classifier: Classifier, job: ClassifierDistillationJob) -> Callable[[Any], Tensor]:
    """Of a model, on a few rows."""
    return lambda model: replace(classifier, model=model, products=None).answers(job.train.inputs[:FEW])


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
    answers = _teacher_answers(job, teacher, options, journal)
    if student is None:
        assert options.shape.layers is not None
        student, left = with_layers_left(
            teacher, options.shape.layers, job.train.inputs[:CLASSIFIER_SELECTION_ROWS], job.problem
        )
        with raise_together():
            if is_main_process():
                check_loads(student.model, _answers_of(student, job), out)

    def figures_of(logits: Tensor, reference: Tensor = answers["held_out"]) -> dict[str, Any]:
        return metrics_of(logits, job.held_out_labels, reference, job.problem)

    together = options.teacher == "together"
    figures = {"teacher": figures_of(answers["held_out"])} | ({"teacher after": {}} if together else {})
    figures["before"] = figures_of(student.answers(job.held_out.inputs))
    states = [answers[f"state {number}"] for number in range(len(answers) - 2)]
    rows = TaughtRows(job.train.inputs, job.labels, answers["train"], job.problem, states)
    curve = train_classifier(student, teacher, rows, options, CheckpointSlot(journal, "distil"))
    taught_by = teacher.answers(job.held_out.inputs) if options.moved_at else answers["held_out"]
    if together:
        figures["teacher after"] = figures_of(taught_by)
    figures["after"] = figures_of(student.answers(job.held_out.inputs), taught_by)
    before, after = figures["before"], figures["after"]
    damage = judge_training(options.loss, before, after, labels=options.learns_labels, allow=allow_damage)
    if not is_main_process():
        return {"quality": figures["after"], "quality_by_stage": figures}
    report = {
        "job": "classify",
        **({"task": "tensors" if options.student_factory else IMAGES[0]} if options.sees_images else {}),
        "student": _called(job, options),
        "problem_type": job.problem,
        "cut": left[0] if left and len(left) == 1 else left and dict(zip(("encoder", "decoder"), left, strict=True)),
        "quality": figures["after"],
        "quality_by_stage": figures,
        "damage": damage,
        "parameters": {"teacher": _parameters(teacher), "student": _parameters(student)},
        "data": {
            name: of | ({"cut_rows": cut} if (cut := student.cut(rows.inputs)) else {})
            for (name, of), rows in zip(job.identity["data"].items(), (job.train, job.held_out), strict=True)
        },
        "curves": {name: [parts[name] for parts in curve] for name in curve[0]},
    }
    _save(job, student, teacher if together else None, out, report, options)
    return report


def _called(job: ClassifierDistillationJob, options: Distill) -> str:
    """What a report calls the student."""
    if job.student is not None:
        return job.student.resolve().name
    made_by = options.student_factory
    return f"{options.shape.layers} layers" if made_by is None else made_by.rpartition(":")[2]


def _parameters(classifier: Classifier) -> int:
    return sum(p.numel() for p in classifier.model.parameters())


def _teacher_answers(
    job: ClassifierDistillationJob, teacher: Classifier, options: Distill, journal: Journal
) -> dict[str, Tensor]:
    """Of training and held-out rows, and states of training rows that losses compare; kept in the journal."""
    if "teacher" not in journal:
        inputs = {"train": job.train.inputs, "held_out": job.held_out.inputs}
        with stage("teacher", sum(map(len, inputs.values())), "rows") as done:
            answers = {name: teacher.answers(some, done) for name, some in inputs.items()}
        if options.teacher_exits is not None and isinstance(teacher, ImageClassifier):
            names = matching_modules(teacher.model, options.teacher_exits, "teacher-exits")
            states = states_of(teacher, job.train.inputs, names)
            answers |= {f"state {number}": state for number, state in enumerate(states)}
        journal.write("teacher", answers, {})
    barrier()
    return journal.read("teacher")[0]


def _save(
    job: ClassifierDistillationJob,
    student: Classifier,
    teacher: Classifier | None,
    out: Path,
    report: dict[str, Any],
    options: Distill,
) -> None:
    """Write the student with its recipe and report, which gets its bytes; and in a directory of its own the teacher, if
    that was trained, with the recipe alone."""
    parent = job.teacher if options.shape.layers is not None else job.student
    with atomic_folder(out, 4 * sum(report["parameters"].values())) as scratch:
        if teacher is not None:
            (scratch / TEACHER_FOLDER).mkdir()
            own = job.teacher if job.teacher.is_dir() else job.teacher.parent
            teacher.write(scratch / TEACHER_FOLDER, own)
            last = {"job": "distill", **job.identity, "quality": report["quality_by_stage"]["teacher after"],
                    "kept": TEACHER_FOLDER}  # fmt: skip
            write_json(scratch / TEACHER_FOLDER / RECIPE, {"recipe": [*_past(job.teacher), last]})
        student.write(scratch, parent or scratch)
        step = {"job": "distill", **job.identity, "quality": report["quality"]}
        if parent != job.teacher and (taught_by := _past(job.teacher)):
            step["teacher"] = taught_by
        report["bytes"] = {
            when: sum(file.stat().st_size for file in files)
            for when, files in (("before", weight_files(job.teacher)), ("after", weight_files(scratch)))
        }
        write_described(scratch, report, [*(_past(parent) if parent else []), step], classified_page)


def _past(place: Path) -> list[dict[str, Any]]:
    """The recipe of what lies in a directory, or of a factory's weights that do."""
    if place.is_dir():
        return past_of(place)
    return past_of(place.parent) if place.name == WEIGHTS_FILE else []
