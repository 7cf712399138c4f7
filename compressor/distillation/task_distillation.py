"""Distil a language model that is not causal: an encoder-decoder such as T5 or BART on prompts and their responses, or
a masked language model such as BERT on the tokens that are hidden from it.

Both models are held in memory whole, the teacher answers while the student learns, and what is trained and measured is
what `compressor.distillation.train` and `calib.stats.perplexity` do for causal models: the label tokens of a decoder
count, or the hidden ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput, Diverged
from calib.data.corpus import Corpus, describe
from calib.data.rows import draw_rows, positions_of
from calib.data.task_rows import Masking, TaskRows
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import flag_name, folder_identity, identity_of
from calib.jobs.output_folder import atomic_folder, check_destination
from calib.jobs.recipe import past_of
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import read_config
from calib.model.task import Task
from calib.model.weights import Weights
from calib.runtime.device import pick_device
from calib.runtime.distributed import barrier, is_main_process, raise_together
from calib.runtime.precision import autocast_dtype
from calib.stats.perplexity import compare
from compressor.distillation.batches import Relations
from compressor.distillation.cross_tokenizer import check_same_vocabulary
from compressor.distillation.loss_expression import RELATIONS_LOSSES, STATES_LOSSES, parse_loss
from compressor.distillation.models import Student, Teacher, logits_by_row
from compressor.distillation.options import TASKS_OF_TEXT, Distill
from compressor.distillation.search.learning_rate import with_lr, with_rate
from compressor.distillation.task_models import (
    answers_on,
    check_cut,
    check_states,
    compared_relations,
    cut_model,
    layers_compared,
    with_own_beginnings,
)
from compressor.distillation.train import train_student, training_config
from compressor.distillation.write import Origin, checkpoint_bytes, save
from compressor.engine.damage import judge_training
from compressor.engine.load import load

TASK_OPTIONS = {
    "task", "base_model", "dequantize", "student", "layers", "data", "samples", "length", "prompt_format", "held_out",
    "held_out_data", "loss", "temperature", "force", "balance", "project", "steps", "batch", "micro_batch_tokens", "lr",
    "warmup", "max_grad_norm", "decay", "ema", "optimizer", "gradient_checkpointing", "seed", "device", "precision",
}  # fmt: skip
MASKED_ALONE = {"by_document"}
NOT_HERE = {"spans", "attention", "ofa-exits", "bico", "uld", "k2", "k3"}  # losses of causal models
SELECTED_ROWS = 16  # on which layers are chosen


@dataclass(frozen=True)
class TaskDistillationJob:
    """A distillation of models of another task, checked: directories (no student: it is cut out of the teacher), rows,
    the models, how many ids both know, and what its recipe records."""

    folder: Path
    student_folder: Path | None
    task: Task
    train: Corpus
    held_out: Corpus
    masking: Masking | None
    vocab: int
    dtype: torch.dtype  # in which the student is stored
    products: torch.dtype | None
    teacher: Any  # as the library opened it
    student: Any
    identity: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device that models are on."""
        return pick_device(self.identity["options"]["device"])

    @property
    def targets(self) -> Tensor:
        """Label tokens (N, T - 1) that count; of a masked language model those that are hidden in some rows."""
        return (self.train.mask if self.train.hidden is None else self.train.hidden)[:, 1:]


def check_task_options(options: Distill) -> None:
    """Raises BadInput for an option or a loss that is for other models than those of the task."""
    used = TASK_OPTIONS | (MASKED_ALONE if options.task == "masked-lm" else set())
    for f in fields(options):
        default = f.default if f.default is not MISSING else None
        if f.name not in used and getattr(options, f.name) != default:
            raise BadInput(f"{flag_name(f.name)}: is not for --task {options.task}; leave it out")
    names = {term.name for term in parse_loss(options.loss)}
    if beyond := sorted(names & NOT_HERE):
        raise BadInput(f"loss {beyond[0]}: is not for --task {options.task}; leave it out")
    if options.task == "seq2seq" and options.data is None:
        raise BadInput("data: an encoder-decoder learns from prompts and responses; give --data FILE.jsonl with both")
    if options.task == "masked-lm" and isinstance(options.layers, str):
        raise BadInput(f"layers {options.layers}: a masked language model has one stack of layers; give one number")


def distill_task(
    teacher: str | Path, out: Path, options: Distill, resume: bool | None, *, allow_damage: bool = False
) -> dict[str, Any]:
    """`distill` for encoder-decoders and masked language models."""
    with raise_together():
        job = validate_task_distillation(teacher, out, options)
    with journal_beside(out, job.identity, resume) as journal:
        return run_task_distillation(job, out, options, journal, allow_damage=allow_damage)


def validate_task_distillation(teacher: str | Path, out: Path, options: Distill) -> TaskDistillationJob:
    """Check models, rows, options and destination before anything is computed; weights are read.  Raises BadInput."""
    check_task_options(options)
    task, device = TASKS_OF_TEXT[options.task], pick_device(options.device)
    folders = [find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)]
    folders += [] if options.student is None else [find_model(options.student)]
    configs = [_config(place, task) for place in folders]
    vocab = _shared_vocabulary(folders, configs)
    rows = TaskRows.of(task, configs[0], read_tokenizer(folders[0]), folders[0])
    train, held_out = _rows(folders, configs, rows, vocab, options)
    for given in folders:
        past_of(given)  # which the output's begins with, or which is no recipe
    weights = [Weights(place) for place in folders]
    check_destination(out, folders, 5 * sum(entry.bytes for entry in weights[-1].entries.values()))
    digests = [of.verify(of.entries) for of in weights]
    products = autocast_dtype(options.precision, device)
    identity = identity_of(options, folder_identity(teacher, folders[0], digests[0]), device, products)
    if options.student is not None:
        identity["student"] = folder_identity(str(options.student), folders[1], digests[1])
    identity["data"] = {"training": describe(train), "held_out": describe(held_out)}
    models = [load(place, device=device) for place in folders]
    job = TaskDistillationJob(
        folders[0], folders[1] if len(folders) > 1 else None, task, train, held_out,
        Masking(rows.special, rows.mask_token, vocab) if task is Task.MASKED_LM else None, vocab,
        next(entry.dtype for entry in weights[0].entries.values() if entry.dtype.is_floating_point), products,
        models[0], models[1] if len(models) > 1 else None, identity,
    )  # fmt: skip
    _check_models(job, out, options)
    return job


def _shared_vocabulary(folders: Sequence[Path], configs: Sequence[PretrainedConfig]) -> int:
    """How many ids all models know.  Raises BadInput where their tokens, or starts of their decoders, differ."""
    vocab = min(config.vocab_size for config in configs)
    if len(folders) == 1:
        return vocab
    tokenizers = [read_tokenizer(place) for place in folders]
    check_same_vocabulary(tokenizers[0], tokenizers[1], folders[0], folders[1])
    starts = [getattr(config, "decoder_start_token_id", None) for config in configs]
    if configs[0].is_encoder_decoder and starts[0] != starts[1]:
        raise BadInput(
            f"{folders[1]}: its decoder starts with token {starts[1]}, the teacher's with {starts[0]}; give a student "
            "of the same decoder_start_token_id"
        )
    if configs[0].vocab_size != configs[1].vocab_size and tokenizers[0] is not None:
        vocab = min(vocab, len(tokenizers[0]))
    return vocab


def _rows(
    folders: Sequence[Path], configs: Sequence[PretrainedConfig], rows: TaskRows, vocab: int, options: Distill
) -> tuple[Corpus, Corpus]:
    """Training and held-out rows.  Raises BadInput where there are too few, or some ask for nothing."""
    positions = min((p for config in configs if (p := positions_of(config)) is not None), default=None)
    corpora = draw_rows(
        folders[0], read_tokenizer(folders[0]), vocab, options, positions=positions, task=replace(rows, pieces=False)
    )
    for corpus in corpora:
        _check_asked(corpus, rows.task)
    if rows.task is not Task.SEQ_TO_SEQ_LM:
        return corpora
    own = [[with_own_beginnings(corpus, config) for corpus in corpora] for config in configs]
    if not all(torch.equal(a.ids, b.ids) for a, b in zip(own[0], own[-1], strict=True)):
        raise BadInput(f"{folders[-1]}: begins its decoder's rows otherwise than the teacher; give another model")
    return _trimmed(own[0][0]), _trimmed(own[0][1])


def _config(folder: Path, task: Task) -> PretrainedConfig:
    """The config of a float model of the task.  Raises BadInput."""
    config = read_config(folder, {task})
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise BadInput(f"{folder / 'config.json'}: has no vocab_size; give another model")
    return config


def _check_asked(corpus: Corpus, task: Task) -> None:
    """Raises BadInput where a row asks for nothing, has an empty prompt, or labels that are not in one piece."""
    counted = corpus.mask[:, 1:] if corpus.hidden is None else corpus.hidden[:, 1:]
    if not counted.any(1).all():
        lacking = int((~counted.any(1)).sum())
        what = "no label" if task is Task.SEQ_TO_SEQ_LM else "no token that could be hidden"
        raise BadInput(f"{corpus.source}: {lacking} rows have {what}, so nothing is learned there; remove them")
    if corpus.source_mask is not None and not corpus.source_mask.any(1).all():
        lacking = int((~corpus.source_mask.any(1)).sum())
        raise BadInput(f"{corpus.source}: {lacking} rows have a prompt of no tokens; remove them")
    if task is Task.SEQ_TO_SEQ_LM and (corpus.mask[:, 1:] & ~corpus.mask[:, :-1]).any():
        raise BadInput(f"{corpus.source}: 'labels' must have -100 on the right only; move it to the end of its row")


def _trimmed(corpus: Corpus) -> Corpus:
    """Rows of an encoder-decoder without columns that are padding everywhere."""
    assert corpus.sources is not None and corpus.source_mask is not None
    read, made = (int(mask.any(0).sum()) for mask in (corpus.source_mask, corpus.mask))
    return replace(
        corpus, ids=corpus.ids[:, :made], mask=corpus.mask[:, :made], sources=corpus.sources[:, :read],
        source_mask=corpus.source_mask[:, :read],
    )  # fmt: skip


def _wrapped(job: TaskDistillationJob, model: Any) -> Student:
    return Student(model, job.products, job.vocab, {}, layers_compared(model) or [])


def _check_models(job: TaskDistillationJob, out: Path, options: Distill) -> None:
    """Raises BadInput where a model, or what is cut out of it, does not compute what the losses read."""
    exact = replace(job, products=None)
    ahead = job.task is Task.SEQ_TO_SEQ_LM
    read = check_states(_wrapped(exact, job.teacher), job.train, job.folder, ahead=ahead)
    if job.student is not None and job.student_folder is not None:
        own = check_states(_wrapped(exact, job.student), job.train, job.student_folder, ahead=ahead)
    else:
        own, keep = read, options.stacks(2 if ahead else 1)
        with raise_together():
            if is_main_process():
                check_cut(job.teacher, keep, answers_on(job.train[:SELECTED_ROWS], job.device, job.vocab), out)
    names = {term.name for term in parse_loss(options.loss)}
    if "sinkhorn-hidden" in names and own != read:
        raise BadInput(
            f"loss sinkhorn-hidden: the student's head reads {own} numbers, the teacher's {read}; compare with cka"
        )
    _relations(job.teacher, job.student or job.teacher, options)
    if not names & STATES_LOSSES.keys():
        return
    models = [job.teacher, job.student or job.teacher]
    loss = min(names & STATES_LOSSES.keys())
    if any(layers_compared(model) is None for model in models):
        raise BadInput(f"loss {loss}: the layers of {models[-1].config.model_type} are not found; leave it out")
    widths = [model.config.hidden_size for model in models]
    if [read, own] != widths:
        raise BadInput(
            f"loss {loss}: the head of this type reads states of another width than its layers; leave it out"
        )
    if "hidden" in names and not options.project and widths[0] != widths[1]:
        raise BadInput(
            f"loss hidden: the student is {widths[1]} wide, the teacher {widths[0]}; compare with cka, or hidden and "
            "add --project"
        )


def run_task_distillation(
    job: TaskDistillationJob, out: Path, options: Distill, journal: Journal, *, allow_damage: bool
) -> dict[str, Any]:
    """-> the report, as in report.json; of a process that is not the main one, its figures."""
    model, cut = _student(job, options, journal)
    teacher = Teacher(job.teacher, job.products, job.vocab, layers_compared(job.teacher) or [])
    student = _wrapped(job, model.requires_grad_(True))
    count = sum(p.numel() for p in teacher.model.parameters())

    def measured() -> dict[str, Any]:
        with student.answering():
            return compare(
                job.held_out, job.vocab, logits_by_row(student, job.held_out), logits_by_row(teacher, job.held_out)
            ).asdict()

    figures = {"before": measured()}
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    compared = any(term.name in STATES_LOSSES for term in parse_loss(options.loss))
    config = training_config(options, _pairs(teacher, student, cut) if compared else [])
    config = replace(config, masking=job.masking, relations=_relations(job.teacher, model, options))
    config, rate = with_rate(options, config, student, teacher, job.train, job.targets, journal)
    curve = train_student(student, teacher, job.train, job.targets, config, CheckpointSlot(journal, "distil"))
    model.eval()
    student.keep_stored(job.dtype)
    figures["after"] = measured()
    before, after = figures["before"], figures["after"]
    if not math.isfinite(after["perplexity"] or math.inf):
        raise Diverged("the student's answers on the held-out rows are useless; lower the learning rate")
    damage = judge_training(options.loss, before, after, labels=options.learns_labels, allow=allow_damage)
    if not is_main_process():
        return {"quality": after, "quality_by_stage": figures}
    report = {
        "job": "distill",
        "task": options.task,
        "student": _called(job, options, cut),
        "cut": cut,
        "quality": after,
        "quality_by_stage": figures,
        "damage": damage,
        "rate": rate,
        "parameters": {"teacher": count, "student": sum(p.numel() for p in model.parameters())},
        "bytes": {"before": sum(entry.bytes for entry in Weights(job.folder).entries.values())},
        "data": job.identity["data"],
        "curves": {name: [parts[name] for parts in curve] for name in curve[0]},
    }
    origin = Origin(job.folder, job.student_folder, None, job.dtype, with_lr(job.identity, config.lr))
    with atomic_folder(out, checkpoint_bytes(student)) as scratch:
        return save(scratch, student, report, origin, sharded=False, merge=False)


def _student(job: TaskDistillationJob, options: Distill, journal: Journal) -> tuple[Any, dict[str, Any] | None]:
    """-> the model as it is before it learns anything, and which layers of which stack were kept, where it is made."""
    if job.student is not None:
        return job.student, None
    answers = answers_on(job.train[:SELECTED_ROWS], job.device, job.vocab)
    keep = options.stacks(2 if job.task is Task.SEQ_TO_SEQ_LM else 1)
    known = list(journal.notes("cut").values()) if "cut" in journal else None
    model, left = cut_model(job.teacher, keep, answers, known)
    cut = dict(zip(("encoder", "decoder") if len(left) == 2 else ("layers",), left, strict=True))
    if known is None:
        barrier()
        journal.write("cut", {}, cut)
        barrier()
    return model, cut


def _relations(teacher: Any, student: Any, options: Distill) -> Relations | None:
    """What `attention-relations` compares, where that is a loss.  Raises BadInput."""
    term = next((term for term in parse_loss(options.loss) if term.name in RELATIONS_LOSSES), None)
    return None if term is None else compared_relations(teacher, student, term.arguments)


def _pairs(teacher: Teacher, student: Student, cut: dict[str, Any] | None) -> list[tuple[int, int]]:
    """Each state after a layer of the student's, beside the teacher's where the student's next layer begins."""
    theirs, own = len(teacher.blocks), len(student.blocks)
    if cut is not None:
        ends = [*list(cut.values())[-1][1:], theirs]
    else:
        ends = [round(theirs * (i + 1) / own) for i in range(own)]
    return [(end, i + 1) for i, end in enumerate(ends)]


def _called(job: TaskDistillationJob, options: Distill, cut: dict[str, Any] | None) -> str:
    """The student, in a few words."""
    if job.student_folder is not None:
        return job.student_folder.resolve().name
    return f"{options.layers} layers" if cut is None or len(cut) < 2 else (
        " and ".join(f"{len(left)} {part} layers" for part, left in cut.items()))  # fmt: skip
