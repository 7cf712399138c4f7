"""A teacher with another tokenizer, beside a job of one tokenizer and loops over whole distributions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from calib import BadInput
from calib.data.corpus import Corpus
from calib.data.token_bytes import TokenAligner
from calib.losses.divergences import forward_kl
from calib.losses.top_k import with_tail_bucket
from compressor import Distill, distill
from compressor.distillation.cross_tokenizer import CrossTokenizerTeacher
from compressor.distillation.losses.matched import MatchedTokens, sorted_distance
from compressor.distillation.models import Teacher
from tests import tiny
from tests.calib.data.test_token_bytes import EVERY, byte_level
from tests.kills import digest

SENTENCES = [f"the {a} fox {b} over the {c} dog" for a in ("quick", "brown", "lazy") for b in ("jumps", "runs") for c in
             ("lazy", "old", "red")]  # fmt: skip


def model_of(tokenizer: Any, seed: int) -> nn.Module:
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 0}
    return tiny.model_of(tiny.config_of("llama", **ids, attention_bias=False, mlp_bias=False), seed, torch.float32)


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student; its teacher; the same teacher under other numbers for the same tokens; and one of other tokens."""
    place, own = tmp_path_factory.mktemp("models"), byte_level(300, True)
    order = torch.cat([torch.arange(2), 2 + torch.randperm(len(own) - 2, generator=torch.Generator().manual_seed(0))])
    made = json.loads(own.backend_tokenizer.to_str())
    made["model"]["vocab"] = {token: int(order[i]) for token, i in made["model"]["vocab"].items()}
    renumbered = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<|end|>", bos_token="<|begin|>"
    )
    teacher, other = model_of(own, 1), model_of(own, 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        other.get_parameter(name).data[order] = teacher.get_parameter(name).data.clone()
    other.model.embed_tokens.weight = other.lm_head.weight  # type: ignore[union-attr, assignment]
    return {
        "student": saved(place / "student", model_of(own, 2), own),
        "teacher": saved(place / "teacher", teacher, own),
        "renumbered": saved(place / "renumbered", other, renumbered),
        "pieces": saved(place / "pieces", model_of(EVERY["pieces"], 3), EVERY["pieces"]),
    }


@pytest.fixture
def options(folders: dict[str, Path], tmp_path: Path) -> Distill:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return Distill(
        student=folders["student"], data=tmp_path / "rows.jsonl", by_document=True, length=48, held_out=4, steps=3,
        batch=3, device="cpu", lr=1e-2, warmup=1,
    )  # fmt: skip


def test_other_numbers_for_the_same_tokens_change_nothing(
    folders: dict[str, Path], options: Distill, tmp_path: Path
) -> None:
    """All positions meet and all tokens match: figures and weights of the job with one tokenizer."""
    plain = distill(folders["teacher"], tmp_path / "plain", options, allow_damage=True)
    across = distill(folders["renumbered"], tmp_path / "across", replace(options, align_tokens=True), allow_damage=True)
    for when in ("before", "after"):
        one, two = (report["quality_by_stage"][when] for report in (plain, across))
        for name in ("tokens", "perplexity", "reference_perplexity", "bits_per_byte", "reference_bits_per_byte"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert across["curves"]["forward-kl"] == pytest.approx(plain["curves"]["forward-kl"], rel=1e-3)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "across"))
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_what_is_compared_against_loops_over_whole_distributions(folders: dict[str, Path]) -> None:
    from calib.model.checkpoint import read_tokenizer
    from compressor.engine.load import load

    ours, theirs = (read_tokenizer(folders[name]) for name in ("student", "pieces"))
    assert ours is not None and theirs is not None
    aligner = TokenAligner(ours, theirs, (len(ours), len(theirs)), ("student", "teacher"))
    model = load(folders["pieces"], device=torch.device("cpu"))
    teacher = CrossTokenizerTeacher(Teacher(model, None, len(theirs)), aligner, 64)
    ids = torch.tensor([[*ours(SENTENCES[0]).input_ids, 0, 0, 0]])
    counted = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)
    counted[:, -2:] = False
    states, heard = teacher.states(ids, counted)
    row = aligner.aligned(ids[0, : counted.sum() + 1], 64)
    assert heard.tolist() == (row.positions >= 0).tolist() and 0 < heard.sum() < len(heard)
    with torch.no_grad():
        p = model(row.ids[None]).logits[0, row.positions[heard]].double().softmax(-1)
    q_logits = torch.randn(int(heard.sum()), len(ours))
    q = q_logits.double().softmax(-1)
    signal = teacher.signal(states[heard])
    a, b = aligner.matched.unbind(-1)
    rest = [torch.cat([x[:, of], 1 - x[:, of].sum(-1, keepdim=True)], -1) for x, of in ((p, b), (q, a))]
    expected = (rest[0] * (rest[0] / rest[1]).log()).sum(-1)
    assert torch.allclose(with_tail_bucket(forward_kl, signal, q_logits).double(), expected, atol=1e-5)
    for i, value in enumerate(sorted_distance(signal, q_logits).tolist()):
        mine = sorted((float(x) for n, x in enumerate(q[i]) if n not in a.tolist()), reverse=True)
        other = sorted((float(x) for n, x in enumerate(p[i]) if n not in b.tolist()), reverse=True)
        width = max(len(mine), len(other))
        mine, other = ([*x, *[0.0] * (width - len(x))] for x in (mine, other))
        assert value == pytest.approx(sum(abs(x - y) for x, y in zip(mine, other, strict=True)), abs=1e-5)


def test_only_positions_where_both_have_read_as_much_are_learned(folders: dict[str, Path]) -> None:
    """One step against a loop: forward KL on common tokens there, over all tokens that count; nothing elsewhere."""
    from calib.jobs.training_loop import OptimizerConfig
    from compressor.distillation.auxiliary_modules import auxiliary_modules
    from compressor.distillation.batches import Batch, TrainingConfig
    from compressor.distillation.loss_expression import parse_loss
    from compressor.distillation.models import Student
    from compressor.distillation.train import _step

    a, b = EVERY["byte-level with a first token"], EVERY["pieces"]
    aligner = TokenAligner(a, b, (len(a), len(b)), ("student", "teacher"))
    teacher = CrossTokenizerTeacher(Teacher(model_of(b, 3), None, len(b)), aligner, 64)
    student = Student(model_of(a, 2).requires_grad_(True), None, len(a), {})
    ids = torch.tensor([a(SENTENCES[0]).input_ids])
    counted = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)
    config = TrainingConfig(terms=parse_loss("forward-kl"), descent=OptimizerConfig(steps=1), lr=1e-3, batch=1, seed=0)
    width = student.width
    auxiliary = auxiliary_modules(
        config.terms, layers=0, student_width=width, teacher_width=width, seed=0, device=student.device
    )
    words = Batch(ids, counted, [0], int(counted.sum()))
    values, _ = _step(student, teacher, words, config, torch.ones(1), 1, auxiliary)
    plain: Any = model_of(a, 2).requires_grad_(True)
    q = plain(ids).logits[0].softmax(-1)
    row, total = aligner.aligned(ids[0], 64), torch.zeros(())
    p = teacher.teacher.model(row.ids[None]).logits[0].softmax(-1)
    ours, theirs = aligner.matched.unbind(-1)
    for i, j in enumerate(row.positions.tolist()):
        if j >= 0:
            one, two = (torch.cat([x[of], 1 - x[of].sum()[None]]) for x, of in ((p[j], theirs), (q[i], ours)))
            total = total + (one * (one / two).log()).sum()
    (total / counted.sum()).backward()
    assert values[0] == pytest.approx(float(total.detach() / counted.sum()), rel=1e-3)
    for mine, other in zip(student.params, plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)  # type: ignore[arg-type]


def test_the_distance_is_that_of_sorted_probabilities() -> None:
    """Between models of one vocabulary with nothing matched but one token: invariant to how the others are named."""
    g = torch.Generator().manual_seed(0)
    q_logits, index = torch.randn(3, 9, generator=g), torch.zeros(3, 1, dtype=torch.int64)
    q = q_logits.softmax(-1)
    others = q[:, 1:][:, torch.randperm(8, generator=g)].sort(-1, descending=True).values
    same = MatchedTokens(index, q[:, :1].log(), (1 - q[:, 0]).log(), others)
    assert torch.allclose(sorted_distance(same, q_logits), torch.zeros(3), atol=1e-6)
    assert (sorted_distance(replace(same, others=others.flip(0)), q_logits) >= 0).all()
    assert torch.equal(same[1:].others, others[1:])


def test_students_of_other_tokens_learn_and_resume(
    folders: dict[str, Path], options: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.jobs import training_loop

    given = replace(options, align_tokens=True, loss="0.5*ce+forward-kl+0.1*uld+js(0.5)", on_policy=0.5)
    report = distill(folders["pieces"], tmp_path / "out", given, allow_damage=True)
    assert set(report["curves"]) == {"ce", "forward-kl", "uld", "js(0.5)"}
    assert 0 <= report["quality"]["top1_agreement"] <= 1 and report["quality"]["kl"] > 0
    whole = digest(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop, "asked_to_stop", iter([False, True]).__next__)
        distill(folders["pieces"], tmp_path / "again", given, allow_damage=True)
    distill(folders["pieces"], tmp_path / "again", given, resume=True, allow_damage=True)
    assert digest(tmp_path / "again") == whole


def test_rows_in_a_teacher_s_tokens_have_the_bytes_of_the_student_s(folders: dict[str, Path]) -> None:
    a, b = EVERY["byte-level with a first token"], EVERY["pieces"]
    aligner = TokenAligner(a, b, (len(a), len(b)), ("student", "teacher"))
    teacher = CrossTokenizerTeacher(Teacher(model_of(b, 3), None, len(b)), aligner, 64)
    coded = [a(text).input_ids for text in SENTENCES[:3]]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in coded], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in coded])[:, None]
    rows = teacher.rows(Corpus(ids, mask, "here"))
    assert rows.token_bytes is not None
    assert rows.token_bytes.sum(-1).tolist() == [len(text) for text in SENTENCES[:3]]
    assert [b.decode(row[real], skip_special_tokens=True) for row, real in zip(rows.ids, rows.mask, strict=True)] == (
        SENTENCES[:3]
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"align_tokens": False}, "has another tokenizer than"),
        ({"align_tokens": False, "loss": "ce+uld"}, "uld: is of tokens that one of two vocabularies has"),
        ({"loss": "forward-kl+hidden"}, "loss hidden: compares what only models of one tokenizer have alike"),
        ({"loss": "k2", "on_policy": 1.0}, "loss k2: compares what only models of one tokenizer"),
        ({"teacher": "top-k"}, "the teacher answers online"),
        ({"answers_only": True}, "answers-only: wants one tokenizer"),
        ({"student": None, "layers": 1}, "align-tokens: changes nothing without --student"),
    ],
)
def test_what_other_tokens_do_not_allow(
    change: dict[str, Any], word: str, folders: dict[str, Path], options: Distill, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=word):
        distill(folders["pieces"], tmp_path / "out", replace(options, **{"align_tokens": True, **change}))
    with pytest.raises(BadInput, match="has the teacher's tokenizer; leave it out"):
        distill(folders["teacher"], tmp_path / "out", replace(options, align_tokens=True))
    assert not (tmp_path / "out").exists()
