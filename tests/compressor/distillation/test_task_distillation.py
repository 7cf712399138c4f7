"""Distillation of encoder-decoders and masked language models, against the library's own losses and gradients."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from calib.data.corpus import Corpus
from calib.data.load import load_corpus
from calib.data.task_rows import Masking, TaskRows
from calib.jobs.training_loop import OptimizerConfig
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config
from calib.model.task import Task
from compressor import Distill, distill
from compressor.distillation.auxiliary_modules import auxiliary_modules
from compressor.distillation.batches import Batch, TrainingConfig, step_batch
from compressor.distillation.classifiers.prune_classifier import cut_layers, stacks_of
from compressor.distillation.cost import estimate_distillation
from compressor.distillation.loss_expression import parse_loss
from compressor.distillation.losses.relations import attention_relations, watched_projections
from compressor.distillation.models import Student, Teacher, given_of, states_before_head
from compressor.distillation.task_models import compared_relations, with_own_beginnings
from compressor.distillation.train import _step
from tests import tasks
from tests.kills import kill_and_resume

SEQ2SEQ, MASKED = Task.SEQ_TO_SEQ_LM, Task.MASKED_LM
KINDS = [("t5", SEQ2SEQ), ("bart", SEQ2SEQ), ("mbart", SEQ2SEQ), ("m2m_100", SEQ2SEQ), ("bert", MASKED),
         ("roberta", MASKED)]  # fmt: skip
SMALL = Distill(task="seq2seq", layers="3,5", samples=12, held_out=8, length=16, steps=3, batch=4, lr=3e-3)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[0])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Corpus]:
    """A model in double precision, in evaluation mode, and rows for it."""
    kind, task = request.param
    folder = tmp_path_factory.mktemp(kind)
    model = tasks.save(kind, task, folder).double()
    config, tokenizer = read_config(folder, {task}), read_tokenizer(folder)
    corpus = load_corpus(
        tasks.rows_file(folder, pairs=task is SEQ2SEQ), tokenizer, vocab=config.vocab_size, length=16, by_document=True,
        task=TaskRows.of(task, config, tokenizer),
    )  # fmt: skip
    return model, with_own_beginnings(corpus, config) if task is SEQ2SEQ else corpus


def labels_of(corpus: Corpus) -> Tensor:
    """As the library is given them: -100 where nothing is asked for."""
    if corpus.hidden is not None:
        return corpus.ids.where(corpus.hidden, -100)
    return corpus.ids[:, 1:].where(corpus.mask[:, 1:], -100)


def asked(corpus: Corpus) -> dict[str, Tensor]:
    """A forward's arguments but for the decoder's, which the library makes of the labels."""
    return {name: value for name, value in corpus.inputs.items() if name != "decoder_input_ids"}


def lesson(loss: str, layers: list[tuple[int, int]], **more: Any) -> TrainingConfig:
    made = TrainingConfig(terms=parse_loss(loss), descent=OptimizerConfig(steps=1), lr=1e-2, batch=6, seed=0)
    return replace(made, layers=layers, at_once=64, **more)


def stepped(student: Student, teacher: Teacher | None, batch: Batch, config: TrainingConfig) -> list[float]:
    auxiliary = auxiliary_modules(
        config.terms, layers=len(config.layers), student_width=student.width, teacher_width=student.width, seed=0,
        device=student.device,
    )  # fmt: skip
    return _step(student, teacher, batch, config, torch.ones(len(config.terms)), 0, auxiliary)[0]


def test_states_and_head_are_the_librarys_logits(opened: tuple[Any, Corpus]) -> None:
    """Past T5's scaling where embeddings are tied, BART's bias of logits and BERT's transform."""
    model, corpus = opened
    given = given_of(corpus)
    assert not isinstance(given, Tensor)
    logits = model(**given).logits
    torch.testing.assert_close(
        Student(model, None, logits.shape[-1], {}, []).head(states_before_head(model, given)), logits, rtol=0, atol=1e-9
    )


def test_a_step_of_cross_entropy_is_the_librarys_own_loss_and_gradient(opened: tuple[Any, Corpus]) -> None:
    """Decoder rows are the library's, which of mBART begin with the language; rows pass in several parts."""
    model, corpus = opened
    corpus = corpus[:6]
    student = Student(model.requires_grad_(True), None, model.config.vocab_size, {}, [])
    counted = (corpus.mask if corpus.hidden is None else corpus.hidden)[:, 1:]
    batch = Batch(
        corpus.ids, counted, list(range(6)), int(counted.sum()), inputs=corpus.inputs, ahead=corpus.hidden is None
    )
    try:
        loss = model(**asked(corpus), labels=labels_of(corpus)).loss
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        [found] = stepped(student, None, batch, lesson("ce", []))
        assert math.isclose(found, float(loss.detach()), rel_tol=1e-9)
        for name, gradient in expected.items():
            own = model.get_parameter(name).grad
            assert own is not None, name
            torch.testing.assert_close(own, gradient, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}")  # noqa: B023
    finally:
        model.zero_grad()
        model.requires_grad_(False)


def test_a_teacher_and_its_twin_agree_in_every_loss(opened: tuple[Any, Corpus]) -> None:
    model, corpus = opened
    masking = None if corpus.hidden is None else Masking((0, 1, 2), 3, model.config.vocab_size)
    student = Student(deepcopy(model).requires_grad_(True), None, model.config.vocab_size, {}, [])
    losses = "forward-kl+reverse-kl+sinkhorn+sinkhorn-sequence+sinkhorn-hidden"
    if masking is not None:
        losses += "+attention-relations"
    relations = compared_relations(model, student.model, {}) if masking is not None else None
    config = lesson(losses, [], masking=masking, relations=relations)
    batch = step_batch(student, None, corpus, corpus.mask[:, 1:], [0, 1, 2, 3, 4, 5], 3, config)
    student.model.eval()
    values = stepped(student, Teacher(model, None, model.config.vocab_size), batch, config)
    assert all(abs(value) < 1e-12 for value in values[:2]) and all(abs(value) < 1e-5 for value in values), values
    if relations is not None:
        assert abs(values[-1]) < 1e-12 and relations.heads == model.config.num_attention_heads
        with torch.no_grad():
            relations.student[1].weight.mul_(1.5)
        student.model.zero_grad()
        value = stepped(student, Teacher(model, None, model.config.vocab_size), batch, config)[-1]
        given, mask = batch.given(slice(None), student.device), corpus.mask[:6]
        assert not isinstance(given, Tensor)
        heard = []
        for one, linears in ((model, relations.teacher), (student.model, relations.student)):
            with watched_projections(linears) as found:
                one(**given)
            heard.append([found[part] for part in range(3)])
        expected = attention_relations(heard[0], heard[1], mask, relations.heads).mean()
        assert value > 1e-6 and math.isclose(value, float(expected.detach()), rel_tol=1e-9)


def test_hidden_tokens_are_drawn_by_row_and_step_80_10_10() -> None:
    masking = Masking((0, 1, 2), 3, 1000)
    ids = torch.randint(10, 1000, (64, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 39] = 1, 2
    corpus = Corpus(ids, torch.arange(40) < 10 + torch.arange(64)[:, None] % 31, "random")
    hidden, given = masking.drawn(corpus, list(range(64)), 7)
    some, alone = masking.drawn(corpus, [5, 3], 7)
    assert torch.equal(some, hidden[[5, 3]]) and torch.equal(alone["input_ids"], given["input_ids"][[5, 3]])
    assert not torch.equal(hidden, masking.drawn(corpus, list(range(64)), 8)[0])
    may = corpus.mask & (ids > 2)
    may[:, 0] = False
    assert not (hidden & ~may[:, 1:]).any()
    torch.testing.assert_close(hidden.sum(1), (0.15 * may.sum(1)).round().clamp(min=1).long(), atol=1, rtol=0)
    read, was = given["input_ids"][:, 1:], ids[:, 1:]
    assert torch.equal(read[~hidden], was[~hidden])
    kinds: list[Tensor] = []
    for seed in range(40):
        hidden, given = masking.drawn(corpus, list(range(64)), 100 + seed)
        read = given["input_ids"][:, 1:][hidden]
        kept = read == was[hidden]
        kinds.append(torch.stack([read == 3, (read != 3) & ~kept, kept]).double().mean(1))
    shares = torch.stack(kinds).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.8, 0.1, 0.1]).double(), atol=0.02, rtol=0)


def saved_with_rows(kind: str, task: Task, folder: Path) -> Path:
    """A teacher T and rows for its task."""
    tasks.save(kind, task, folder / "T")
    tasks.rows_file(folder, **({"pairs": True} if task is SEQ2SEQ else {"rows": 60}))
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_rows("t5", SEQ2SEQ, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_rows("bart", SEQ2SEQ, tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def bert_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_rows("bert", MASKED, tmp_path_factory.mktemp("masked"))


def test_both_stacks_are_cut_and_the_library_loads_them(t5: Path, tmp_path: Path) -> None:
    """The relative positions of the first layers stay, and the student in memory is the one that is loaded."""
    losses = "forward-kl+0.1*sinkhorn+0.1*cka+0.1*hidden+0.1*align(2)"
    options = replace(SMALL, data=t5 / "rows.jsonl", loss=losses, steps=4)
    report = distill(t5 / "T", tmp_path / "out", options)
    kept = report["cut"]
    assert [len(kept[part]) for part in ("encoder", "decoder")] == [3, 5] and report["task"] == "seq2seq"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 5)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]["student"]
    whole = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5 / "T").state_dict()
    table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert (model.state_dict()[table] - whole[table]).abs().max() < 0.1 < whole[table].abs().max()
    again = distill(
        t5 / "T", tmp_path / "again",
        replace(options, layers=None, student=tmp_path / "out", loss="forward-kl", lr=1e-9, steps=1),
    )["quality_by_stage"]["before"]  # fmt: skip
    after = report["quality_by_stage"]["after"]
    assert math.isclose(again["kl"], after["kl"], rel_tol=1e-5) and again["tokens"] == after["tokens"]
    page = (tmp_path / "out/report.html").read_text(), (tmp_path / "out/README.md").read_text()
    assert all("AutoModelForSeq2SeqLM" in text and "AutoModelForCausalLM" not in text for text in page)
    cost = estimate_distillation(t5 / "T", tmp_path / "none", options)
    assert cost.out_bytes > 0 and not (tmp_path / "none").exists()


def test_a_cut_model_generates_as_its_teacher_does(bart: Path, tmp_path: Path) -> None:
    """Also where that is said in config.json alone, as by checkpoints of old."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(bart / "T")
    model.generation_config.num_beams, model.generation_config.max_length = 4, 9
    cut_layers(model, stacks_of(model), [[0], [1]]).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config
    assert (loaded.num_beams, loaded.max_length) == (4, 9)


def test_training_brings_students_to_their_teachers(bart: Path, bert_mlm: Path, tmp_path: Path) -> None:
    for folder, task, layers in ((bart, "seq2seq", "2,3"), (bert_mlm, "masked-lm", 2)):
        options = replace(SMALL, task=task, layers=layers, data=folder / "rows.jsonl", steps=40, warmup=2)
        before, after = distill(folder / "T", tmp_path / task, options)["quality_by_stage"].values()
        assert after["kl"] < before["kl"] / 1.5 and after["tell_apart"] < before["tell_apart"]
        assert ("accuracy" in after) == (task == "masked-lm")
    options = replace(SMALL, task="masked-lm", layers=2, data=bert_mlm / "rows.jsonl", steps=24, warmup=2)
    curves = distill(bert_mlm / "T", tmp_path / "relations", replace(options, loss="ce+10*attention-relations(2,3)"))
    [relations] = [curve for name, curve in curves["curves"].items() if "relations" in name]
    assert sum(relations[-8:]) < 0.9 * sum(relations[:8])
    twin = replace(SMALL, task="masked-lm", layers=None, student=bert_mlm / "T", data=bert_mlm / "rows.jsonl", steps=1)
    report = distill(bert_mlm / "T", tmp_path / "twin", replace(twin, loss="forward-kl+attention-relations"))
    figures = report["quality_by_stage"]["before"]
    assert abs(figures["kl"]) < 1e-7 and abs(figures["tell_apart"] - 0.5) < 1e-6
    assert figures["accuracy"] == figures["reference_accuracy"] and figures["top1_agreement"] == 1
    assert json.loads((tmp_path / "masked-lm/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("task", ["seq2seq", "masked-lm"])
def test_a_killed_job_ends_with_the_same_bytes(task: str, bart: Path, bert_mlm: Path, tmp_path: Path) -> None:
    folder = bart if task == "seq2seq" else bert_mlm
    options = replace(SMALL, task=task, layers=3, data=folder / "rows.jsonl", steps=6, ema=0.5)

    def job(out: Path, resume: bool | None) -> None:
        distill(folder / "T", out, options, resume=resume)

    kill_and_resume(partial(job), tmp_path, ("cut", "distil"))
