"""Distil a teacher into a smaller student, which learns to say what the teacher says (arXiv:1503.02531).

The student is a folder, or cut out of the teacher, or either of them on the grids of a scheme. The teacher answers
while the student learns, or once before, block by block, and what it said is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from calib import BadInput, Diverged
from calib.blockwise.in_memory import block_parts
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import empty_model
from calib.data.corpus import Corpus, describe, pad_to
from calib.data.rows import draw_rows, positions_of, row_length
from calib.data.teacher_cache import TeacherCache, shared_cache
from calib.data.token_bytes import TokenAligner
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal, journal_beside
from calib.jobs.options import folder_identity, hash_of, identity_of, stream_identity
from calib.jobs.output_folder import atomic_folder, check_cache, check_destination, write_described
from calib.jobs.recipe import forgettings, past_of, read_recipe
from calib.model.bidirectional import bidirectional_logits
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import RECIPE, config_for, is_quantized, read_config, read_json
from calib.model.task import WRITERS, task_of_checkpoint
from calib.model.weights import Weights
from calib.quant.scheme import Scheme
from calib.runtime.device import check_budget, memory_budget_bytes, pick_device
from calib.runtime.distributed import barrier, is_main_process, local_indices, raise_together, world_size
from calib.runtime.memory import limit_malloc_cache
from calib.runtime.precision import autocast_dtype
from calib.stats.perplexity import Logits, Quality, compare
from compressor.distillation.batches import Speaking
from compressor.distillation.classifiers.classification import distill_classifier
from compressor.distillation.cross_tokenizer import CrossTokenizerTeacher, check_same_vocabulary, compare_across
from compressor.distillation.fake_quant import FakeQuantizer, fake_quantizers, read_fake_quantizers
from compressor.distillation.loss_expression import (
    BIDIRECTIONAL_LOSSES,
    EXITS_LOSSES,
    SPANS_LOSSES,
    STATES_LOSSES,
    parse_loss,
)
from compressor.distillation.loss_syntax import read_terms, rewarded_term
from compressor.distillation.models import Student, Teacher, check_head, load_quantized, logits_by_row
from compressor.distillation.options import TASKS_OF_TEXT, Distill
from compressor.distillation.prune import check_student_size, choose, leading, student_tensors
from compressor.distillation.search.learning_rate import with_lr, with_rate
from compressor.distillation.sharded_student import sharded_student, stored_tensors, write_sharded
from compressor.distillation.task_distillation import distill_task
from compressor.distillation.teacher_answers import answered_by, keep, walked, written_rows
from compressor.distillation.train import to_be_answered, train_student, training_config, training_targets
from compressor.distillation.write import Origin, checkpoint_bytes, save
from compressor.engine.damage import judge_training
from compressor.engine.forgetting_gate import Gate, check_unforgetting
from compressor.engine.load import load, open_checkpoint
from compressor.engine.runtime_transforms import RuntimeTransforms, install
from compressor.on_policy.completions import RewardedPrompts, rewarded_prompts
from compressor.on_policy.trial import COMPLETION_CURVES, PolicyTrial
from compressor.pruning.widths import PruningPlan, student_config
from compressor.report.distillation import distilled_page

LONGEST = 2**17  # tokens of a row that a teacher without a limit of its own reads
CLASSIFIERS = {"ForSequenceClassification": "sequence-classification", "ForImageClassification": "image-classification"}
SELECTION_ROWS = 16  # rows on which a student's parts are chosen


@dataclass(frozen=True)
class DistillationJob:
    """A job whose input and destination will do."""

    folder: Path  # the teacher's
    student: Path | None
    stream: BlockwiseModel  # the teacher's
    train: Corpus
    targets: Tensor
    held_out: Corpus
    rewarded: tuple[RewardedPrompts, RewardedPrompts] | None  # of training and held-out rows, where there is a reward
    aligner: TokenAligner | None  # of tokenizers that differ
    vocab: int  # ids beyond it are padding of one vocabulary or the other
    scheme: Scheme | None  # of a student that is trained fake-quantized
    identity: dict[str, Any]

    @property
    def teacher_vocab(self) -> int:
        """How many ids the teacher speaks of."""
        return self.vocab if self.aligner is None else self.stream.vocab

    @property
    def parameters(self) -> int:
        """Count the teacher's parameters."""
        return sum(torch.Size(shape).numel() for shape in self.stream.expected.values())


def distill(
    teacher: str | Path,
    out: str | Path,
    options: Distill,
    *,
    resume: bool | None = None,
    gate: Gate | None = None,
    allow_recovery: bool = False,
    allow_damage: bool = False,
) -> dict[str, Any]:
    """Train a student from a teacher (knowledge distillation, arXiv:1503.02531), and write it to a directory.

    Args:
        teacher: a directory with safetensors, or a name on the hub; also an output of `quantize`.
        out: the output directory; complete or absent when this returns or raises.
        options: the student, the loss and how long it is trained.
        resume: what becomes of an interrupted run's journal beside `out`: True continues it, False discards it, None
            refuses to start.
        gate: as for `quantize`, for a student that is quantized, where it or its teacher was made to forget.
        allow_recovery: train such a student without a gate.
        allow_damage: write the student even if it is worse than it was before training; the report says so.

    Returns:
        The report, as in report.json: figures before and after, losses of every step, sizes in parameters and bytes.

    Raises:
        BadInput: teacher, student, data, options or output will not do; nothing was written.
        Damaged: the student is worse than it was before training; the journal stays.
        Failed, NoSpace: the job cannot go on; the journal stays.
    """
    out = Path(out)
    with raise_together():
        limit_malloc_cache(memory_budget_bytes(options.memory_budget, pick_device(options.device)))
        check_installed(options)
        if options.shard and world_size() == 1:
            raise BadInput("shard: there is one process; start several with torchrun --nproc-per-node N -m cli distill")
    if options.classifies:
        return distill_classifier(teacher, out, options, resume, allow_damage=allow_damage)
    if options.task in TASKS_OF_TEXT:
        return distill_task(teacher, out, options, resume, allow_damage=allow_damage)
    with raise_together():
        if gate is None and not allow_recovery:
            for forgetful in must_last(teacher, options):
                check_unforgetting(forgetful)
        job = validate_distillation(teacher, out, options)
    with journal_beside(out, job.identity, resume) as journal:
        return run_distillation(job, out, options, journal, gate, allow_damage=allow_damage)


def must_last(teacher: str | Path, options: Distill) -> list[Path]:
    """Directories of student and teacher that were made to forget, where the student is rounded."""
    if options.classifies or options.task in TASKS_OF_TEXT:
        return []  # of these none is rounded
    student = None if options.student is None else find_model(options.student)
    if options.student_scheme is None and (student is None or not is_quantized(read_json(student / "config.json"))):
        return []
    folder = find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)
    return [place for place in (student, folder) if place is not None and forgettings(place)]


def check_installed(options: Distill) -> None:
    """Raises BadInput where an option needs a package that is not there."""
    needed = {
        "bitsandbytes": options.optimizer == "adamw8bit" or options.teacher_bits != "none",
        "peft": options.lora > 0,
    }
    extras = {"bitsandbytes": "eight-bit", "peft": "lora"}
    for package, packages in needed.items():
        if packages and find_spec(package) is None:
            raise BadInput(f"{package}: is not installed; pip install 'parewell[{extras[package]}]'")


def validate_distillation(teacher: str | Path, out: Path, options: Distill) -> DistillationJob:
    """Check models, rows, options and destination before anything is computed; weights are read once.  Raises
    BadInput."""
    folder = find_model(teacher, base_model=options.base_model, dequantize=options.dequantize)
    device = pick_device(options.device)
    stream = _teacher_stream(folder, options, device)
    read = check_head(stream.config, folder)
    tokenizer = read_tokenizer(folder)
    scheme = Scheme.parse(options.student_scheme) if options.student_scheme else None
    if scheme is not None:
        _check_trained(scheme)
    student, raw, vocab, aligner = None, dict[str, Any](), stream.vocab, None
    if options.student is not None:
        student = find_model(options.student)
        raw = read_json(student / "config.json")
        own = config_for(student, raw)
        read = check_head(own, student)
        scheme = _scheme_of(student, raw, scheme, options)
        vocab = own.get_text_config().vocab_size
        own_tokenizer = read_tokenizer(student)
        if options.align_tokens:
            aligner = _aligner((student, folder), (own_tokenizer, tokenizer), (vocab, stream.vocab))
        else:
            check_same_vocabulary(tokenizer, own_tokenizer, folder, student)
    else:
        check_student_size(options.shape, stream)
        own = student_config(stream.config, leading(options.shape, stream.config, stream.layers))
        if scheme is not None:
            linears = [one for block in block_parts(own) for one in block.linears]
            scheme.check_widths((one.name.rpartition(".")[2], one.shape[1]) for one in linears)
    common = vocab if aligner else min(stream.vocab, vocab)
    if aligner is None and stream.vocab != vocab and tokenizer is not None:
        common = min(common, len(tokenizer))
    _check_compared(stream, own.get_text_config(), read, options)
    if aligner is not None and student is not None:
        train, held_out = _rows(student, own_tokenizer, common, options, positions_of(own))
        for corpus in (train, held_out):
            _check_plain(corpus)
    else:
        train, held_out = _rows(folder, tokenizer, common, options, positions_of(stream.config))
    check_budget(options.memory_budget, train.ids.shape[1], stream.hidden, stream.dtype)
    rewarded = None
    if options.reward is not None:
        rewarded = (rewarded_prompts(train, tokenizer, options.reward),
                    rewarded_prompts(held_out, tokenizer, options.reward))  # fmt: skip
    targets = _targets(train, options)
    folders = [f for f in (folder, student) if f is not None]
    for given in folders:
        past_of(given)  # which the output's begins with, or which is no recipe
    if options.cache is not None:
        check_cache(Path(options.cache), out, folders)
    weights = sum(entry.bytes for entry in stream.weights.entries.values())
    check_destination(out, folders, 5 * weights)  # the student, and in the journal its training's state
    identity = _identity(teacher, folder, stream, student, scheme, options)
    identity["data"] = {"training": describe(train), "held_out": describe(held_out)}
    if rewarded is not None:
        identity["data"]["rewarded"] = {"sha256": _fingerprint(rewarded)}
    return DistillationJob(
        folder, student, stream, train, targets, held_out, rewarded, aligner, common, scheme, identity
    )


def _fingerprint(rewarded: Sequence[RewardedPrompts]) -> str:
    """SHA-256 of the rows that a reward is given, in hexadecimal."""
    digest = hashlib.sha256()
    for prompts in rewarded:
        for prompt in prompts.about:
            digest.update(json.dumps(prompt.row.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _check_task(folder: Path) -> None:
    """Raises BadInput, which names the task, for a model of another one that `--task` has."""
    config = read_json(folder / "config.json")
    named = [str(name) for name in config.get("architectures") or ()]
    kind = task_of_checkpoint(str(config.get("model_type")), named)
    tasks = [name for name, of in TASKS_OF_TEXT.items() if of is kind]
    tasks += [task for end, task in CLASSIFIERS.items() if any(name.endswith(end) for name in named)]
    if tasks:
        raise BadInput(f"{folder}: is no causal language model ({', '.join(named)}); add --task {tasks[0]}")


def _teacher_stream(folder: Path, options: Distill, device: torch.device) -> BlockwiseModel:
    _check_task(folder)
    products = autocast_dtype(options.precision, device)
    if is_quantized(read_json(folder / "config.json")):
        _check_quantized(folder, options)
        return open_checkpoint(folder, device, products=products, tasks=WRITERS).stream
    return BlockwiseModel(read_config(folder), Weights(folder), device, products=products)


_LEFT_BEHIND = "scales of keys and values are found by calibration, and training would leave them behind"


def _check_trained(scheme: Scheme) -> None:
    """Raises BadInput where no student is trained on such grids."""
    if not scheme.weights.is_even:
        raise BadInput(f"scheme {scheme.name}: students are trained on even grids; take another, such as w4a16-g64")
    if scheme.has_fixed_keys:
        raise BadInput(f"scheme {scheme.name}: {_LEFT_BEHIND}; take one without kvfp8, and quantize the student")


def _scheme_of(student: Path, raw: dict[str, Any], asked: Scheme | None, options: Distill) -> Scheme | None:
    """The scheme that a given student is trained on: its own, the one that was asked for, or none.  Raises BadInput."""
    if not is_quantized(raw):
        return asked
    if asked is not None:
        raise BadInput(f"{student}: is quantized already, so it has a scheme; leave out --student-scheme")
    scheme = _scheme_in(student)
    if scheme.tables or scheme.ignored:
        raise BadInput(
            f"{student}: has its embedding or head quantized, or linears ignored, and training knows students of one "
            "scheme alone; give one without --embedding, --lm-head and --ignore"
        )
    if not scheme.weights.is_even:
        raise BadInput(
            f"{student}: is {scheme.name}, and students are trained on even grids; give one quantized to another "
            "scheme, such as w4a16-g64"
        )
    if scheme.has_fixed_keys:
        raise BadInput(f"{student}: is {scheme.name}, and {_LEFT_BEHIND}; give one without kvfp8")
    if options.shard or options.lora:
        raise BadInput(
            f"{student}: is quantized, so it is trained whole and by one process; leave out --shard and --lora"
        )
    return scheme


def _check_compared(stream: BlockwiseModel, student: PretrainedConfig, read: int, options: Distill) -> None:
    """Raises BadInput where a loss compares states that teacher and student, whose text config this is, do not both
    have, or one of which its head, that reads `read` numbers, makes no answers."""
    names = {term.name for term in parse_loss(options.loss)}
    same_width = names & {"sinkhorn-hidden"} | (names & {"hidden"} if not options.project else set())
    if same_width and student.hidden_size != stream.hidden:
        raise BadInput(
            f"loss {min(same_width)}: the student is {student.hidden_size} wide, the teacher {stream.hidden}; compare "
            "with cka, or hidden and add --project"
        )
    if student.num_hidden_layers < 2 and names & EXITS_LOSSES.keys():
        raise BadInput("loss ofa-exits: a student of one block has no exit before its last; leave it out")
    if student.hidden_size != read and names & EXITS_LOSSES.keys():
        raise BadInput(
            "loss ofa-exits: this student's head reads states of another width than its blocks; leave it out"
        )
    if "attention" in names and not all(map(stream.attention, range(stream.layers))):
        raise BadInput(
            f"loss attention: not every block of {stream.config.model_type} shows how it attends; leave it out"
        )


def _targets(train: Corpus, options: Distill) -> Tensor:
    """What counts in the rows (N, T - 1).  Raises BadInput where a loss needs spans that they do not have."""
    on_spans = any(term.name in SPANS_LOSSES for term in parse_loss(options.loss))
    if train.spans is None and on_spans:
        raise BadInput(f'{train.source}: has no spans; give JSON lines such as {{"text": ..., "spans": [[0, 12]]}}')
    if on_spans and options.on_policy == 1:
        raise BadInput("loss spans: what the student writes has none; leave out --on-policy 1")
    if train.about.get("prompts_only"):
        return to_be_answered(train)
    return training_targets(train, answers_only=options.answers_only or options.reward is not None)


def _identity(
    teacher: str | Path, folder: Path, stream: BlockwiseModel, student: Path | None, scheme: Scheme | None,
    options: Distill,
) -> dict[str, Any]:  # fmt: skip
    """What a recipe records of the models, and a journal compares; weights are read once, and refused where they are no
    numbers."""
    if is_quantized(read_json(folder / "config.json")):
        named = folder_identity(teacher, folder, hash_of(folder.glob("*.safetensors")))
        identity = identity_of(options, named, stream.device, stream.products)
    else:
        identity = stream_identity(options, teacher, folder, stream)
    if student is not None:
        own = open_checkpoint(student, torch.device("cpu"), tasks=WRITERS).stream
        packed = options.student_scheme is None and scheme is not None  # its tensors are checked as they are read
        digest = hash_of(student.glob("*.safetensors")) if packed else own.verify()
        identity["student"] = folder_identity(str(options.student), student, digest)
    identity["options"]["teacher_rows"] = options.written
    return identity


def _rows(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, vocab: int, options: Distill, positions: int | None
) -> tuple[Corpus, Corpus]:
    """Training and held-out rows.  Prompts alone come one a row, with room for what the student answers."""
    whole = options.reward is not None or options.align_tokens
    given = replace(options, by_document=True) if whole else options
    train, held_out = draw_rows(folder, tokenizer, vocab, given, positions=positions)
    if not train.about.get("prompts_only"):
        length = train.ids.shape[1] if options.reward is None else row_length(options.length, positions)
        return pad_to(train, length), pad_to(held_out, length)
    if options.on_policy != 1 or options.answers_only or options.teacher_rows:
        raise BadInput(
            f"{train.source}: has prompts alone, which the student answers with --on-policy 1 and nothing else does; "
            "add it, leave out --answers-only and --teacher-rows, or give rows that have answers"
        )
    train, held_out = draw_rows(folder, tokenizer, vocab, replace(options, by_document=True), positions=positions)
    length = row_length(options.length, positions)
    return pad_to(train, length), pad_to(held_out, length)


def _aligner(
    folders: tuple[Path, Path], tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    vocab: tuple[int, int],
) -> TokenAligner:  # fmt: skip
    """Align the tokens of a student's tokenizer and a teacher's.  Raises BadInput where one has none, or they are the
    same."""
    ours, theirs = tokenizers
    if ours is None or theirs is None:
        raise BadInput(f"{folders[ours is not None]}: has no tokenizer, whose tokens could be aligned; add it")
    if ours.get_vocab() == theirs.get_vocab():
        raise BadInput(f"align-tokens: {folders[0]} has the teacher's tokenizer; leave it out")
    return TokenAligner(ours, theirs, vocab, (str(folders[0]), str(folders[1])))


def _check_plain(corpus: Corpus) -> None:
    """Raises BadInput for rows that one model's own template was put around, which the other reads as text."""
    if (form := corpus.about.get("prompt_format", "plain")) != "plain":
        raise BadInput(
            f"{corpus.source}: is put into the {form}, which the teacher does not know; add --prompt-format plain"
        )


def _check_quantized(teacher: Path, options: Distill) -> None:
    """Raises BadInput where a teacher that is quantized is asked for what only float weights can give."""
    if options.student is None:
        raise BadInput(f"{teacher}: is quantized; nothing is cut out of that, give --student DIR, or its float model")
    if options.teacher != "online":
        raise BadInput(f"{teacher}: is quantized, and answers while the student learns; leave out --teacher")
    if options.teacher_bits != "none":
        raise BadInput(f"{teacher}: is quantized already; leave out --teacher-bits")


def _scheme_in(folder: Path) -> Scheme:
    try:
        return Scheme.read(read_json(folder / RECIPE)["recipe"][-1])
    except (BadInput, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder}: was quantized by another tool; give what parewell quantize wrote") from error


def run_distillation(
    job: DistillationJob, out: Path, options: Distill, journal: Journal, gate: Gate | None, *, allow_damage: bool
) -> dict[str, Any]:
    """-> the report, as in report.json; of a process that is not the main one, its figures."""
    context = RunContext(journal, memory_budget_bytes(options.memory_budget, job.stream.device))
    job, teacher, reference = _with_answers(job, options, context)
    student = _student(job, options, journal)
    figures = {"before": _measured(student, reference, job.held_out, options).asdict()}
    trial = _trial(job, options, teacher)
    policies = dict[str, dict[str, Any]]()
    if trial is not None:
        policies = {"teacher": trial.teacher(), "before": trial.student(student)}
        options = replace(options, beta=trial.beta, target_reward=None)
    student.train(checkpointing=options.gradient_checkpointing)
    compared = any(term.name in STATES_LOSSES | EXITS_LOSSES for term in parse_loss(options.loss))
    config = training_config(
        options, _compared(job, journal, student) if compared else [], job.rewarded[0] if job.rewarded else None
    )
    config, rate = with_rate(options, config, student, teacher, job.train, job.targets, journal)
    curve = train_student(student, teacher, job.train, job.targets, config, CheckpointSlot(journal, "distil"))
    student.model.eval()
    student.keep_stored(_stored_dtype(job))
    figures["after"] = _measured(student, reference, job.held_out, options).asdict()
    before, after = figures["before"], figures["after"]
    if not math.isfinite(after["perplexity"] or math.inf):
        raise Diverged("the student's answers on the held-out rows are useless; lower the learning rate")
    policies |= {} if trial is None else {"after": trial.student(student)}
    damage = judge_training(
        options.loss, before, after, labels=options.learns_labels, allow=allow_damage,
        policies=policies if rewarded_term(read_terms(options.loss)) else {},
    )  # fmt: skip
    if not is_main_process():
        if options.shard:
            write_sharded(student.model, None, _stored_dtype(job))
        return {"quality": after, "quality_by_stage": figures}
    curves = {name: [parts[name] for parts in curve] for name in curve[0]}
    report = {
        "job": "distill",
        "student": _called(job, options),
        "cut": journal.notes("cut") if "cut" in journal else None,
        "quality": after,
        "quality_by_stage": figures,
        "damage": damage,
        "rate": rate,
        "parameters": {"teacher": job.parameters, "student": _count(student.model)},
        "bytes": {"before": sum(entry.bytes for entry in job.stream.weights.entries.values())},
        "data": job.identity["data"],
        "written_rows": options.written,
        "curves": {name: values for name, values in curves.items() if name not in COMPLETION_CURVES},
    }
    if policies:
        report["on_policy"] = _rewarded(options, policies, curves)
    origin = Origin(job.folder, job.student, job.scheme, _stored_dtype(job), with_lr(job.identity, config.lr))
    with atomic_folder(out, checkpoint_bytes(student)) as scratch:
        report = save(scratch, student, report, origin, sharded=options.shard, merge=options.merge)
        if gate is not None:
            report["recovery"] = gate(scratch)
            write_described(scratch, report, read_recipe(scratch), distilled_page)
    return report


def _with_answers(
    job: DistillationJob, options: Distill, context: RunContext
) -> tuple[DistillationJob, Speaking, Logits | CrossTokenizerTeacher]:
    """-> the job with the rows that its teacher has still to write; what answers while the student learns; and the
    teacher's logits on held-out rows."""
    journal = context.journal
    if options.written:
        write = partial(_answering, job, options)
        rows, mask = written_rows(write, job.train, options.written, options.seed, job.stream.device, journal)
        job = replace(job, train=rows, targets=torch.cat([job.targets, mask[:, 1:]]))
    if options.teacher == "online":
        teacher = _answering(job, options)
        if job.aligner is not None:
            across = CrossTokenizerTeacher(teacher, job.aligner, positions_of(job.stream.config) or LONGEST)
            return job, across, across
        if job.held_out.about.get("prompts_only"):
            job = replace(job, held_out=answered_by(teacher, job.held_out, options.seed, journal))
        return job, teacher, logits_by_row(teacher, job.held_out)
    cache = TeacherCache(journal) if options.cache is None else shared_cache(options.cache, _of_cache(job, options))
    keep(
        job.stream, job.train, cache, kind=options.teacher, k=options.top_k, vocab=job.vocab, seed=options.seed,
        context=context,
    )  # fmt: skip
    return job, cache, walked(job.stream, job.held_out, job.vocab, context)


def _check_both_ways(student: Student, train: Corpus) -> None:
    """Raises BadInput where a student's attention cannot look both ways."""
    with student.answering() as model:
        ids = train.ids[:1, :2].to(student.device)
        bidirectional_logits(model, ids, torch.ones_like(ids, dtype=torch.bool))


def _trial(job: DistillationJob, options: Distill, teacher: Speaking) -> PolicyTrial | None:
    """The held-out prompts of a job that has a reward, answered by its teacher."""
    if job.rewarded is None or not isinstance(teacher, Teacher):
        return None
    term = rewarded_term(read_terms(options.loss))
    name = None if term is None else term.name
    return PolicyTrial(job.rewarded, options, name, teacher, seed=options.seed, at_once=options.micro_batch_tokens)


def _rewarded(options: Distill, policies: Mapping[str, Any], curves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What a report says of a student's own answers."""
    by_step = {name: values for name, values in curves.items() if name in COMPLETION_CURVES}
    term = rewarded_term(read_terms(options.loss))
    tilted = term is not None and (term.name == "kdrl" or (term.name == "f-dpg" and options.target == "tilted"))
    settings = {"reward": options.reward, "group": options.group, "beta": options.beta if tilted else None}
    return {**settings, "figures": policies, "curves": by_step}


def _called(job: DistillationJob, options: Distill) -> str:
    """The student, in a few words."""
    if job.student is not None:
        name = job.student.resolve().name
    else:
        asked = {"layers": options.layers, "heads": options.heads, "ffn": options.ffn, "hidden": options.hidden}
        name = ", ".join(f"{value} {part}" for part, value in asked.items() if value is not None) or "the teacher"
    return name + (f" at {job.scheme.name}" if job.scheme else "") + (f", LoRA {options.lora}" if options.lora else "")


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _of_cache(job: DistillationJob, options: Distill) -> dict[str, Any]:
    """What a folder of a teacher's words must be of, to be used by this job."""
    kept: dict[str, Any] = {"kind": options.teacher, "k": options.top_k, "vocabulary": job.vocab}
    if options.teacher == "drawn":
        kept |= {"seed": options.seed}
    if options.written:
        kept |= {"written": describe(job.train)["sha256"]}
    identity = job.identity
    return kept | {"teacher": identity["model"], "text": identity["data"]["training"], "runs_on": identity["runs_on"]}


def _student(job: DistillationJob, options: Distill, journal: Journal) -> Student:
    """As it is before it learns anything."""
    device, fakes = job.stream.device, dict[str, FakeQuantizer]()
    if options.shard:
        return Student(_shared_model(job, options, journal), job.stream.products, job.vocab, fakes)
    if job.student is not None:
        model = load(job.student, device=device)
        if job.scheme is not None and options.student_scheme is None:
            fakes = read_fake_quantizers(job.student, model, job.scheme)
    else:
        model = _cut(job, options, journal).to(device)
    if options.student_scheme is not None and job.scheme is not None:
        online = RuntimeTransforms(job.scheme.activations, job.scheme.kv)
        for block in block_parts(model.config):
            install(model.get_submodule(block.name), online, block.linears, block.attention)
        fakes = fake_quantizers(model, job.scheme, _stored_dtype(job))
    model.requires_grad_(True)
    if options.lora:
        from peft import LoraConfig, get_peft_model  # not everyone has it

        parts = block_parts(model.config)
        targets = sorted({linear.module.rpartition(".")[2] for block in parts for linear in block.linears})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = get_peft_model(
                model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=targets)
            )
    student = Student(model, job.stream.products, job.vocab, fakes)
    if any(term.name in BIDIRECTIONAL_LOSSES for term in parse_loss(options.loss)):
        _check_both_ways(student, job.train)
    return student


def _shared_model(job: DistillationJob, options: Distill, journal: Journal) -> Any:
    """The student, its blocks sharded over processes from the start."""
    device = job.stream.device
    if job.student is not None:
        config, tensors = stored_tensors(job.student)
        return sharded_student(config, tensors, device)
    cut = _plan(job, options, journal)
    return sharded_student(student_config(job.stream.config, cut), student_tensors(job.stream, cut), device)


def _plan(job: DistillationJob, options: Distill, journal: Journal) -> PruningPlan:
    """Which parts of the teacher are kept."""
    if "cut" not in journal:
        some = job.train[:SELECTION_ROWS]
        context = RunContext(journal, memory_budget_bytes(options.memory_budget, job.stream.device))
        found = choose(job.stream, some, options.shape, context)
        barrier()
        journal.write("cut", {}, vars(found))
        barrier()
    return PruningPlan(**journal.notes("cut"))


def _cut(job: DistillationJob, options: Distill, journal: Journal) -> Any:
    """A model made of parts of the teacher."""
    cut = _plan(job, options, journal)
    config = student_config(job.stream.config, cut)
    model: Any = empty_model(config)
    return type(model).from_pretrained(
        None, config=model.config, state_dict=dict(student_tensors(job.stream, cut)), dtype=torch.float32
    )


def _compared(job: DistillationJob, journal: Journal, student: Student) -> list[tuple[int, int]]:
    """Each state after a block of the student's, beside the teacher's where the student's next block begins."""
    teacher_vocab, student_vocab = job.stream.layers, len(student.blocks)
    if "cut" in journal:
        ends = [*journal.notes("cut")["layers"][1:], teacher_vocab]
    else:
        ends = [round(teacher_vocab * (i + 1) / student_vocab) for i in range(student_vocab)]
    return [(end, i + 1) for i, end in enumerate(ends)]


def _answering(job: DistillationJob, options: Distill) -> Teacher:
    device = job.stream.device
    if options.teacher_bits == "none":
        return Teacher(load(job.folder, device=device), job.stream.products, job.teacher_vocab)
    teacher = Teacher(load_quantized(job.folder, device, options.teacher_bits), job.stream.products, job.teacher_vocab)
    try:
        teacher.hidden(job.train.ids[:1, :2].to(device))
    except Exception as error:  # its kernels want certain widths, and say so in several ways
        raise BadInput(
            f"teacher-bits {options.teacher_bits}: bitsandbytes cannot run this model here "
            f"({str(error).splitlines()[0]}); leave it out"
        ) from error
    return teacher


def _stored_dtype(job: DistillationJob) -> torch.dtype:
    return job.stream.entry(job.stream.walk.entering[0]).dtype


def _measured(student: Student, reference: Logits | CrossTokenizerTeacher, corpus: Corpus, options: Distill) -> Quality:
    if isinstance(reference, CrossTokenizerTeacher):
        with student.answering():
            return compare_across(student, reference, corpus, logits_by_row)
    with torch.no_grad():
        student.begin()
        logits = (_in_step if options.shard else logits_by_row)(student, corpus)
        vocab = student.head.vocab or 0
        quality = compare(
            corpus, vocab, logits, reference,
            answers_only=options.answers_only or options.reward is not None or "prompts_only" in corpus.about,
        )  # fmt: skip
        student.end()
    return quality


def _in_step(student: Student, corpus: Corpus) -> Logits:
    """The same of a sharded student, which all processes must run equally often."""
    own, states = local_indices(len(corpus.ids)), dict[int, Tensor]()
    for turn in range(-(-len(corpus.ids) // world_size())):
        row = own[turn] if turn < len(own) else 0
        states[row] = student.hidden(corpus.ids[row : row + 1].to(student.device))[0].cpu()
    return lambda row, positions: student.head(states[row][positions].to(student.device))
