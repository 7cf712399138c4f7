"""Distil a sequence classifier: an encoder with a head, such as BERT's, on texts with labels.

A row is one decision here, so everything is small: the teacher's logits on all rows are kept, and a set that Sinkhorn
compares is the batch, as SinKD has it (arXiv:2402.17110). Teacher and student may have tokenizers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from calib import BadInput
from calib.checkpoint import find_model, past_of, read_json, read_tokenizer
from calib.companions import copy_companions
from calib.conversion import pretrained
from calib.corpus import order
from calib.divergence import cross_entropy, dense, forward_kl
from calib.evaluate import standard_error
from calib.fit import Descent, Diverged, Group, Parts, fit
from calib.job import folder_identity, hash_of, identity_of, pick_device
from calib.journal import Journal, Page, journal_beside
from calib.labelled import Labelled, numbers_of, read_labelled, skill
from calib.parallel import add_up, all_or_none, barrier, is_first, processes, rank
from calib.precision import products_of
from calib.progress import stage
from calib.rows import positions_of, row_length
from calib.weights import Weights
from calib.writing import check_destination, write_described, writing
from compressor.aside import beside, errors_of
from compressor.damage import judged_training
from compressor.pages import classified_page
from compressor.terms import SETS, of_sets, parse, pointwise
from compressor.wanted import Distill

AT_ONCE = 64  # rows that pass through a model together where nothing is trained
HELD_OUT = 16  # rows, where nobody says how many
CHOSEN_ON = 256  # rows on which blocks are chosen
USED = {
    "task", "base_model", "dequantize", "student", "layers", "data", "samples", "length", "held_out", "held_out_data",
    "loss", "temperature",
    "force", "steps", "batch", "lr", "warmup", "clip", "decay", "average", "eight_bit", "seed", "device", "precision",
    "memory_budget",
}  # fmt: skip


@dataclass
class Classifier:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    products: torch.dtype | None
    length: int
    headless: bool = False  # some of its weights, as a head has, were drawn, not read

    def logits(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """(n, C)."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        device = self.model.device
        coded = self.tokenizer(*columns, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        with torch.autocast(device.type, self.products, enabled=self.products is not None):
            logits: Tensor = self.model(**coded.to(device)).logits
        return logits.float()

    @torch.no_grad()
    def answers(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """(n, C), on the CPU."""
        self.model.eval()
        by_length = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))  # to pad little
        some = [by_length[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        answers = torch.cat([self.logits([texts[row] for row in rows]).cpu() for rows in some])
        return answers[torch.tensor(by_length).argsort()]


@dataclass(frozen=True)
class Checked:
    teacher: Path
    student: Path | None
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
        models = models_of(job, how)
    with journal_beside(out, job.identity, resume) as journal:
        return run_job(job, *models, out, how, journal, allow_damage=allow_damage)


def checked(teacher: str | Path, out: Path, how: Distill) -> Checked:
    source = check_options(how)
    folder = find_model(teacher, base_model=how.base_model, dequantize=how.dequantize)
    student = None if how.student is None else find_model(how.student)
    config = read_json(folder / "config.json")
    has = config.get("num_hidden_layers")
    if how.layers is not None and not (isinstance(has, int) and 1 <= how.layers <= has):
        raise BadInput(f"layers: the teacher has {config.get('num_hidden_layers')}, {how.layers} were asked for")
    label2id = config.get("label2id")
    if not isinstance(label2id, dict):
        label2id = {f"LABEL_{i}": i for i in range(2)}
    data = read_labelled(Path(source))
    if how.held_out_data is not None:
        train, held_out = data, read_labelled(Path(how.held_out_data))
        if how.samples is not None:
            shuffled = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(how.seed)).tolist()
            train = train[shuffled[: how.samples]]
    else:
        shuffled = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(how.seed)).tolist()
        apart = how.held_out or HELD_OUT
        held_out = data[shuffled[:apart]]
        train = data[shuffled[apart:][: how.samples]]
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
    identity["data"] = {"training": _described(train), "held_out": _described(held_out)}
    if student is not None:
        identity["student"] = folder_identity(str(how.student), student, hash_of(student.glob("*.safetensors")))
    return Checked(
        folder, student, train, numbers_of(train, label2id), held_out, numbers_of(held_out, label2id), identity
    )


def _described(data: Labelled) -> dict[str, Any]:
    return {"source": Path(data.source).name, "rows": len(data.texts), "sha256": data.fingerprint}


def opened(folder: Path, how: Distill, **more: Any) -> Classifier:
    """A folder's model and tokenizer; where it has no classification head, one drawn with the job's seed."""
    device = pick_device(how.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model, info = pretrained(AutoModelForSequenceClassification, folder, dtype=torch.float32, **more)
        tokenizer = read_tokenizer(folder)
    body = f"{model.base_model_prefix}."
    for name in info["missing_keys"]:
        if name.startswith(body) and "pooler" not in name:
            raise BadInput(f"{folder}: lacks '{name}'; copy the model again")
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise BadInput(f"{folder}: '{name}' holds NaN or Inf; this model is broken")
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise BadInput(f"{folder}: has no tokenizer that pads; copy its files beside config.json")
    length = row_length(how.length, positions_of(model.config))
    products = products_of(how.precision, device)
    return Classifier(model.to(device), tokenizer, products, length, bool(info["missing_keys"]))


def without_blocks(teacher: Classifier, keep: int, texts: Sequence[tuple[str, ...]]) -> tuple[Classifier, list[int]]:
    """Leave out the block without which mean KL(teacher || what is left) is least, until `keep` are left."""
    reference = teacher.answers(texts).log_softmax(-1)
    student = Classifier(deepcopy(teacher.model), teacher.tokenizer, teacher.products, teacher.length)
    parent, name, blocks = _blocks(student.model)
    left = list(range(len(blocks)))
    with stage("choose blocks", sum(range(keep + 1, len(left) + 1)), "candidates") as done:
        while len(left) > keep:
            losses = []
            for without in left:
                setattr(parent, name, nn.ModuleList(blocks[i] for i in left if i != without))
                answers = student.answers(texts).log_softmax(-1)
                losses.append(float((reference.exp() * (reference - answers)).sum(-1).mean()))
                done(f"without block {without}: KL {losses[-1]:.3g}")
            del left[losses.index(min(losses))]
    setattr(parent, name, nn.ModuleList(blocks[i] for i in left))
    student.model.config.num_hidden_layers = keep
    return student, left


def _blocks(model: Any) -> tuple[nn.Module, str, list[nn.Module]]:
    """The module that holds the list of blocks, the list's name in it, and the blocks."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            parent, _, name = path.rpartition(".")
            return model.get_submodule(parent), name, list(module)
    raise BadInput(f"config.json: the blocks of a {model.config.model_type} are not to be found; give --student DIR")


def models_of(job: Checked, how: Distill) -> tuple[Classifier, Classifier | None]:
    """The teacher, and the student if it is not made of it."""
    teacher, student = opened(job.teacher, how), None
    heedless = job.student is not None and all(term.name == "ce" for term in parse(how.loss))
    if teacher.headless and not heedless:
        raise BadInput(
            f"{job.teacher}: has no classification head, so it teaches nothing; fine-tune it first, with --student and "
            "--loss ce"
        )
    if job.student is not None:
        config = teacher.model.config
        student = opened(job.student, how, num_labels=config.num_labels, label2id=config.label2id,
                         id2label=config.id2label)  # fmt: skip
    return teacher, student


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
    left: list[int] | None = None
    if "teacher" not in journal:
        said = {"train": teacher.answers(job.train.texts), "held_out": teacher.answers(job.held_out.texts)}
        journal.write("teacher", said, {})
    barrier()
    said, _ = journal.read("teacher")
    if student is None:
        assert how.layers is not None
        student, left = without_blocks(teacher, how.layers, job.train.texts[:CHOSEN_ON])

    def measured(logits: Tensor) -> dict[str, Any]:
        apart = dense(forward_kl, said["held_out"], logits).double()
        error = {"kl_error": standard_error(apart, torch.ones_like(apart))}
        return skill(logits, job.held_out_labels, said["held_out"]).asdict() | error

    figures = {"teacher": measured(said["held_out"])}
    figures["before"] = measured(student.answers(job.held_out.texts))
    curve = _trained(student, job, said["train"], how, Page(journal, "distil"))
    figures["after"] = measured(student.answers(job.held_out.texts))
    damage = judged_training(how, figures["before"], figures["after"], allow=allow_damage)
    if not is_first():
        return {"quality": figures["after"], "quality_by_stage": figures}
    counts = {"teacher": teacher.model.num_parameters(), "student": student.model.num_parameters()}
    report = {
        "job": "classify",
        "student": job.student.resolve().name if job.student else f"{how.layers} layers",
        "cut": left,
        "quality": figures["after"],
        "quality_by_stage": figures,
        "damage": damage,
        "parameters": counts,
        "data": job.identity["data"],
        "curves": {name: [parts[name] for parts in curve] for name in curve[0]},
    }
    with writing(out, 4 * counts["student"]) as scratch:
        student.model.save_pretrained(scratch)
        student.tokenizer.save_pretrained(scratch)
        copy_companions(job.student or job.teacher, scratch)
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
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(how.seed + 1_000_003 * step + rank())  # of dropout
            student.model.train()
            q = student.logits([job.train.texts[row] for row in rows])
        p, target = said[rows].to(device), job.labels[rows].to(device)
        level = (-2 * cross_entropy(target, q.detach())).exp().sum() / how.batch
        if own_measure:
            add_up([level])
        parts: dict[str, Tensor] = {}
        for term in terms:
            if term.name in SETS:
                values, error = of_sets(term, p[None], q[None], how.temperature)
                value, aside.errors[term.label] = values[0] * len(rows), float(error) * len(rows) / how.batch
            else:
                if term.name == "uskd":
                    term = replace(term, loss=partial(term.loss, level=level))
                value = pointwise(term, p, q, target, how.temperature).sum()
            parts[term.label] = term.weight * value / how.batch
        torch.stack(list(parts.values())).sum().backward()
        return {name: float(value.detach()) for name, value in parts.items()} | errors_of(aside)

    def after(step: int, parts: Parts) -> None:
        for kept, p in zip(mean, params, strict=False):
            kept.lerp_(p.detach(), max(1 - how.average, 1 / (step + 1)))
        done(", ".join(f"{name} {value:.4f}" for name, value in parts.items()))

    descent = Descent(steps=how.steps, warmup=how.warmup, clip=how.clip, decay=how.decay, eight_bit=how.eight_bit)
    keep = {f"mean.{i}": kept for i, kept in enumerate(mean)}
    with stage("distil", how.steps, "steps") as done:
        try:
            curve = fit([Group(params, how.lr)], gradients, descent, after_step=after, keep=keep, page=page)
        except Diverged as error:
            raise Diverged(f"{error} (rows {', '.join(map(str, rows_of_step[at]))})") from error
    with torch.no_grad():
        for kept, p in zip(mean, params, strict=False):
            p.copy_(kept)
    return curve
