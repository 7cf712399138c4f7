"""Run by torchrun (and by the tests, alone): learn a few steps in double precision and save what came out.

torchrun --nproc-per-node 2 -m tests.two_processes FOLDER RESULT
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.records import Row
from calib.data.teacher_cache import TeacherCache
from calib.jobs import training_loop
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal
from calib.jobs.training_loop import OptimizerConfig
from calib.model.weights import Weights
from calib.quant.scheme import Scheme
from calib.runtime.distributed import (
    barrier,
    full_tensor,
    is_main_process,
    is_sharded,
    local_share,
    process_group,
    rank,
    world_size,
)
from compressor.distillation.batches import TrainingConfig
from compressor.distillation.loss_expression import parse_loss
from compressor.distillation.models import Student, Teacher, shard_student
from compressor.distillation.sharded_student import sharded_student, stored_tensors
from compressor.distillation.train import train_student, training_targets
from compressor.engine.load import load
from compressor.on_policy.completions import RewardedPrompts
from compressor.on_policy.options import OnPolicyOptions
from compressor.on_policy.policy import Policy
from compressor.on_policy.rewards import Prompt
from compressor.quantization.calibrate import (
    calibration_pass,
    profiled_rows,
    quantization_pass,
    transformed_outer,
)
from compressor.quantization.learn_transforms import Transforms, initial_transforms, learn_transforms
from compressor.quantization.objective import CalibrationData, Objective
from compressor.quantization.quantized_model import QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlocks, Rounder
from compressor.quantization.tuning.block_tuning import BlockTuning
from compressor.quantization.tuning.tune import TuningRates, tune
from tests import exact, tiny

BUILT = ("llama", "gemma3_text", "mixtral", "phi3")


def run(folder: Path, result: Path) -> None:
    with exact.keeping_double():
        learned = in_double(folder, Journal(result.parent))
    learned |= built_students(folder.parent)
    if is_main_process():
        save_file({name: t for name, t in learned.items() if t is not None}, result)


def in_double(folder: Path, journal: Journal) -> dict[str, torch.Tensor | None]:
    # Not the symmetric activations: there -max|x| lies on the edge between two codes, and a last digit decides.
    scheme = Scheme.parse("w3a8kv4-asym")
    stream = BlockwiseModel(tiny.config_of("llama"), Weights(folder), torch.device("cpu"), torch.float64)
    ids = torch.randint(tiny.VOCAB, (7, 12), generator=torch.Generator().manual_seed(0))
    rows = Corpus(ids, torch.arange(12) < torch.tensor([12, 3, 12, 9, 12, 5, 12])[:, None], "random", None)
    context = RunContext(journal, 10**9)
    profiles, _ = calibration_pass(stream, Splits(rows, rows[:3]), 16, context)
    barrier()  # all have read what is taken away now
    # One process was killed before it wrote its last pages: both take the sums again, or would wait for ever.
    if rank() == world_size() - 1:
        for page in (f"float-1-{rank()}", f"float-states-{rank()}"):
            (journal.folder / f"{page}.page").unlink()
    barrier()
    again, _ = calibration_pass(stream, Splits(rows, rows[:3]), 16, context)
    assert again == profiles
    start = initial_transforms(stream, "hadamard", scheme, online=True, seed=0)
    options = Objective(steps=4, batch=5, loss="tail", cross_entropy=0.1, seed=0)
    transforms, matched = learn_transforms(
        stream, CalibrationData(rows, TeacherCache(journal)), start, scheme, options, context,
        lr_rotation=0.05, lr_scale=0.02,
    )  # fmt: skip
    rounded = tuned_codes(stream, Splits(rows, rows[:3]), scheme, transforms, context)
    rounded |= aimed_codes(stream, Splits(rows, rows[:3]), scheme, transforms, context)
    rounded |= codes_beside_profiles(stream, Splits(rows, rows[:3]), scheme, transforms, context)
    rounded |= block_codes(stream, Splits(rows, rows[:3]), scheme, transforms, context)
    student = Student(tiny.model_of(tiny.config_of("llama"), seed=1).requires_grad_(True), None, tiny.VOCAB, {})
    lesson = TrainingConfig(
        terms=parse_loss("forward-kl+0.5*ce+0.1*sinkhorn-sequence(0.5)+hidden"),
        descent=OptimizerConfig(steps=4, clip=1.0),
        lr=1e-3,
        batch=5,
        seed=0,
        on_policy=0.2,
        ema=0.5,
        layers=[(1, 1), (2, 2)],
    )
    teacher = Teacher(tiny.model_of(tiny.config_of("llama"), seed=2), None, tiny.VOCAB)
    taught = train_student(student, teacher, rows, training_targets(rows, answers_only=False), lesson)
    rewarded = Student(tiny.model_of(tiny.config_of("llama"), seed=3).requires_grad_(True), None, tiny.VOCAB, {})
    prompts = RewardedPrompts(
        tuple(ids[:, :3]), tuple(Prompt("", None, Row(f"row {i}", i, {}, 0)) for i in range(7)), 9, SECOND, SECOND
    )  # fmt: skip
    given = OnPolicyOptions(on_policy=1.0, reward="exact", group=3)
    policy = Policy("f-dpg", "js", given, prompts, steps=4, at_once=4096)
    answered = replace(lesson, terms=parse_loss("f-dpg(js)+0.1*k2"), layers=[], policy=policy, batch=2)
    judged = train_student(rewarded, teacher, rows, training_targets(rows, answers_only=False), answered)
    model = shared_student(rows, lesson, teacher, journal).model
    shared = {name: full_tensor(p) for name, p in model.named_parameters()}
    learned: dict[str, torch.Tensor | None] = {
        "residual": transforms.residual,
        "curve": torch.tensor(matched.curve, dtype=torch.float64),
    }
    learned |= rounded
    for i, block in enumerate(transforms.blocks):
        learned |= {f"{i}.{kind}.{n}": t.contiguous() for kind, of in block.kinds.items() for n, t in of.items()}
    for i, profile in enumerate(profiles):
        figures = [part[kind][of] for part in profile.values() for kind in part for of in ("qsur", "ratio")]
        learned[f"{i}.profile"] = torch.tensor(figures, dtype=torch.float64)
    learned |= {f"student.{i}": p.detach() for i, p in enumerate(student.params)}
    learned |= {f"shared.{name}": p for name, p in shared.items()}
    learned |= {f"rewarded.{i}": p.detach() for i, p in enumerate(rewarded.params)}
    learned["judged"] = torch.tensor([list(parts.values()) for parts in judged], dtype=torch.float64)
    learned["taught"] = torch.tensor([list(parts.values()) for parts in taught], dtype=torch.float64)
    return learned


def tuned_codes(
    stream: BlockwiseModel, rows: Splits, scheme: Scheme, transforms: Transforms, context: RunContext
) -> dict[str, torch.Tensor]:
    """Codes and scales after a few steps of tuning, of one row each: all but one process have none."""
    outer = transformed_outer(stream, transforms)
    model = QuantizedModel(stream, scheme, outer, transforms, transforms.online)
    blocks = RoundedBlocks(context.journal, scheme, stream)
    quantization_pass(model, rows, blocks, Rounder("gptq", 0.01, offsets=True), context)
    data = CalibrationData(rows.calibration, TeacherCache(context.journal))
    options = Objective(steps=3, batch=1, loss="tail", cross_entropy=0.0, seed=0)
    tuned, _ = tune(model, data, blocks, options, context, TuningRates(factors=0.01, rounding=0.2))
    found = dict[str, torch.Tensor]()
    for i in range(stream.layers):
        for name, linear in tuned.read(i).linears.items():
            found |= {f"{name}.codes": linear.codes.double(), f"{name}.scale": linear.scale.double()}
    return found


def aimed_codes(
    stream: BlockwiseModel, rows: Splits, scheme: Scheme, transforms: Transforms, context: RunContext
) -> dict[str, torch.Tensor]:
    """Codes that aim at the float model: each process rounds some linears, and all need those before theirs."""
    model = QuantizedModel(stream, scheme, transformed_outer(stream, transforms), transforms, transforms.online)
    blocks = RoundedBlocks(Journal(context.journal.folder, "aimed-"), scheme, stream)
    quantization_pass(model, rows, blocks, Rounder("gptq", 0.01, float_target=True), context)
    linears = (blocks.read(i).linears.items() for i in range(stream.layers))
    return {f"{name}.aimed": linear.codes.double() for some in linears for name, linear in some}


def codes_beside_profiles(
    stream: BlockwiseModel, rows: Splits, scheme: Scheme, transforms: Transforms, context: RunContext
) -> dict[str, torch.Tensor]:
    """Codes where profiles are of the first rows alone; of two processes the first has one more, the second none."""
    model = QuantizedModel(stream, scheme, transformed_outer(stream, transforms), transforms, transforms.online)
    blocks, found = RoundedBlocks(Journal(context.journal.folder, "profiled-"), scheme, stream), {}
    with (
        mock.patch("calib.blockwise.model.TOKENS_AT_ONCE", 12),  # a row at a time
        mock.patch("compressor.quantization.calibrate.TOKENS_A_CHANNEL", 50 / 40),  # of widest inputs: six rows' tokens
    ):
        assert profiled_rows(stream, rows.calibration) * world_size() == 6 < len(rows.calibration.ids)
        quantization_pass(model, rows, blocks, Rounder("gptq", 0.01), context)
    for i in range(stream.layers):
        for name, linear in blocks.read(i).linears.items():
            note = blocks.notes(i)[name]
            assert note["tokens"] == rows.calibration.tokens
            ratio = note["activations"]["ratio"]
            found[f"{name}.profiled"] = torch.tensor([note["output_error"], ratio], dtype=torch.float64)
            found[f"{name}.profiled.codes"] = linear.codes.double()
    return found


def block_codes(
    stream: BlockwiseModel, rows: Splits, scheme: Scheme, transforms: Transforms, context: RunContext
) -> dict[str, torch.Tensor]:
    """Codes and scales of blocks that are tuned on their own outputs, in steps of all rows, of which each process has
    some."""
    model = QuantizedModel(stream, scheme, transformed_outer(stream, transforms), transforms, transforms.online)
    blocks = RoundedBlocks(Journal(context.journal.folder, "blocks-"), scheme, stream)
    how = BlockTuning(steps=4, batch=len(rows.calibration.ids), factors=0.001, rounding=0.05, seed=0)
    quantization_pass(model, rows, blocks, Rounder("gptq", 0.01), context, how)
    found = dict[str, torch.Tensor]()
    for i in range(stream.layers):
        notes = next(iter(blocks.notes(i).values()))["block"]
        found[f"{i}.block"] = torch.tensor([notes["before"], notes["after"]], dtype=torch.float64)
        for name, linear in blocks.read(i).linears.items():
            found |= {f"{name}.block.codes": linear.codes.double(), f"{name}.block.scale": linear.scale.double()}
    return found


class _OddTokens:
    """A reward and a tokenizer: how many of an answer's tokens have odd numbers."""

    def __call__(self, prompt: Prompt, written: str) -> float:
        return sum(int(number) % 2 for number in written.split()) / 6

    def decode(self, ids: torch.Tensor, **_: object) -> str:
        return " ".join(map(str, ids.tolist()))


SECOND: Any = _OddTokens()


def built_students(models: Path) -> dict[str, torch.Tensor]:
    """Weights of students that come from a folder, and what they make of some tokens; among several processes none has
    them whole."""
    found = dict[str, torch.Tensor]()
    ids = torch.arange(2, 20)[None]
    for model_type in BUILT:
        if world_size() > 1:
            model = sharded_student(*stored_tensors(models / model_type), torch.device("cpu"))
            assert any(is_sharded(p) and local_share(p).numel() < p.numel() for p in model.parameters())
        else:
            model = load(models / model_type)
        for name, p in model.named_parameters():
            found[f"built.{model_type}.{name}"] = full_tensor(p).double()
        with torch.no_grad():
            found[f"built.{model_type}"] = Student(model.float(), None, tiny.VOCAB, {}).hidden(ids).double()
    return found


def shared_student(rows: Corpus, lesson: TrainingConfig, teacher: Teacher, journal: Journal) -> Student:
    """Stopped before its first step, taken up, stopped again, taken up again; of several processes each has a share."""
    for stops in ([True], [False, True], [False] * 4):
        page = CheckpointSlot(journal, "distil")  # as another run would open it
        model = tiny.model_of(tiny.config_of("llama"), seed=1).requires_grad_(True)
        if world_size() > 1:
            model = shard_student(model, torch.device("cpu"))
        student = Student(model, None, tiny.VOCAB, {})
        asked = iter(stops if rank() == 0 else [False] * 4).__next__  # one of them is asked, all stop
        with mock.patch.object(training_loop, "asked_to_stop", asked), contextlib.suppress(KeyboardInterrupt):
            train_student(student, teacher, rows, training_targets(rows, answers_only=False), lesson, page)
        barrier()  # the first has written the page
    return student


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu"):
        run(Path(sys.argv[1]), Path(sys.argv[2]))
