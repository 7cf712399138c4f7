"""The whole job on tiny and on real checkpoints, loaded back by the real library."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib import BadInput, Diverged, embedded
from calib.blockwise.model import BlockwiseModel
from calib.data.load import load_corpus
from calib.model.checkpoint import read_tokenizer
from calib.model.weights import Weights
from calib.probe.find import block_kind, walk_of_config
from compressor import Distill, Evaluate, Quantize, distill, evaluate, load, quantize
from compressor.pruning.widths import PruningPlan, student_config
from tests import any_type, tiny
from tests.architectures import ARCHITECTURES
from tests.kills import digest, kill_and_resume

SMALL = Distill(
    layers=1, samples=8, held_out=3, length=16, steps=4, batch=4, lr=1e-2, precision="float32", device="cpu"
)


@pytest.fixture
def options(text_file: Path) -> Distill:
    return replace(SMALL, data=text_file)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_gives_a_student_that_the_library_loads(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    teacher = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "teacher")
    report = distill(teacher, tmp_path / "out", replace(SMALL, data=text_file))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1
    assert report["parameters"]["student"] == sum(p.numel() for p in student.parameters())
    figures = evaluate(tmp_path / "out", Evaluate(data=text_file, length=16, rows=4))
    assert figures.perplexity > 0


def test_what_was_measured_is_what_is_loaded(options: Distill, tiny_folder: Path, tmp_path: Path) -> None:
    """The figures of the report, from the folder alone, on the same rows."""
    rows = tmp_path / "rows.txt"
    rows.write_text("the lazy dog sleeps while the fox looks on\n" * 20)
    options = replace(options, held_out_data=rows)
    report = distill(tiny_folder, tmp_path / "out", options)
    again = evaluate(tmp_path / "out", Evaluate(data=rows, length=16, rows=3, reference=str(tiny_folder)))
    assert again.perplexity == pytest.approx(report["quality"]["perplexity"], rel=1e-5)
    assert again.kl == pytest.approx(report["quality"]["kl"], rel=1e-4)
    assert report["quality_by_stage"]["after"]["kl"] < report["quality_by_stage"]["before"]["kl"]


@pytest.mark.parametrize("scheme", ["w4a16-channel", "w4a8-channel", "w4a4kv4-asym", "w8a8", "w4a16-g8-asym"])
def test_a_quantized_student_is_stored_as_quantize_stores_and_answers_as_measured(
    scheme: str, options: Distill, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("the lazy dog sleeps while the fox looks on\n" * 20)
    options = replace(options, layers=None, student_scheme=scheme, held_out_data=rows, lr=1e-3)
    report = distill(tiny_folder, tmp_path / "out", options)
    again = evaluate(tmp_path / "out", Evaluate(data=rows, length=16, rows=3, reference=str(tiny_folder)))
    assert again.kl == pytest.approx(report["quality"]["kl"], rel=1e-3, abs=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if scheme in ("w4a16-channel", "w8a8"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.randint(3, tiny.VOCAB, (2, 9))
        with torch.no_grad():
            assert torch.allclose(plain(ids).logits, load(tmp_path / "out")(ids).logits, atol=1e-3)


def test_what_quantize_wrote_is_taken_further(
    options: Distill, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Online rotations, grids and recipe carry over; before the first step the student is the folder it came from."""
    first = Quantize(
        scheme="w4a4kv4-asym", data=text_file, samples=8, held_out=3, length=16, steps=2, batch=2, block_steps=0,
        tune_steps=0, device="cpu",
    )  # fmt: skip
    quantize(tiny_folder, tmp_path / "quantized", first)
    rows = tmp_path / "rows.txt"
    rows.write_text("the lazy dog sleeps while the fox looks on\n" * 20)
    options = replace(options, layers=None, student=tmp_path / "quantized", held_out_data=rows, lr=1e-3, steps=8)
    report = distill(tiny_folder, tmp_path / "out", options)
    on_rows = Evaluate(data=rows, length=16, rows=3, reference=str(tiny_folder))
    start = evaluate(tmp_path / "quantized", on_rows)
    assert report["quality_by_stage"]["before"]["kl"] == pytest.approx(start.kl, rel=1e-3)
    assert evaluate(tmp_path / "out", on_rows).kl == pytest.approx(report["quality"]["kl"], rel=1e-3)
    recipe = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert [step["job"] for step in recipe] == ["quantize", "distill"]
    # and a third time, from what distill wrote
    distill(tiny_folder, tmp_path / "again", replace(options, student=tmp_path / "out"))
    assert len(json.loads((tmp_path / "again/parewell.json").read_text())["recipe"]) == 3


def test_a_teacher_that_is_kept_whole_teaches_what_an_online_one_does(
    options: Distill, tiny_folder: Path, tmp_path: Path
) -> None:
    for name, change in (("online", {}), ("kept", {"teacher": "top-k", "top_k": tiny.VOCAB})):
        distill(tiny_folder, tmp_path / name, replace(options, **change))
    online, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("online", "kept"))
    for name in online:
        assert torch.allclose(online[name], kept[name], atol=1e-4), name


def test_a_cache_serves_other_jobs_and_no_other_teacher_or_text(
    options: Distill, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    options = replace(options, teacher="top-k", top_k=5, cache=cache)
    distill(tiny_folder, tmp_path / "one", options)
    before = digest(cache)
    per_token = sum(f.stat().st_size for f in cache.glob("teacher-*")) / (8 * 16)
    assert per_token < 5 * 8 + 4 + 20
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compressor.distillation.teacher_answers"], "top_k", None)  # no word is kept again
        patch.setattr(
            sys.modules["compressor.distillation.distill"], "Teacher", None
        )  # and no teacher held in memory whole
        distill(tiny_folder, tmp_path / "two", replace(options, steps=2))
    assert digest(cache) == before
    other = tiny.save(tiny.model_of(tiny.config_of("llama"), seed=5, dtype=torch.float32), tmp_path / "other")
    with pytest.raises(BadInput, match="keeps other words of a teacher: teacher"):
        distill(other, tmp_path / "three", options)
    with pytest.raises(BadInput, match="other words of a teacher: k was 5 and is now 6"):
        distill(tiny_folder, tmp_path / "three", replace(options, top_k=6))
    with pytest.raises(BadInput, match="other words of a teacher: text"):
        distill(tiny_folder, tmp_path / "three", replace(options, seed=1))
    wide = tiny.model_of(tiny.config_of("llama", vocab_size=tiny.VOCAB + 7), dtype=torch.float32)
    student = tiny.save(wide, tmp_path / "student")  # which shares fewer tokens with the teacher
    with pytest.raises(BadInput, match="other words of a teacher: vocabulary was 61 and is now 31"):
        distill(tiny_folder, tmp_path / "three", replace(options, layers=None, student=student))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(BadInput, match="keeps no words of a teacher"):
        distill(tiny_folder, tmp_path / "three", replace(options, cache=tmp_path / "mine"))
    assert not (tmp_path / "three").exists() and digest(cache) == before


def test_a_student_that_is_lost_is_no_result(options: Distill, tmp_path: Path) -> None:
    options = replace(options, data=None, lr=50.0, warmup=0, steps=8, max_grad_norm=1e9)
    with pytest.raises(Diverged, match="lower the learning rate"):
        distill(embedded.MODEL, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_no_utf8(options: Distill, tiny_folder: Path, tmp_path: Path) -> None:
    assert options.data is not None
    strange = tmp_path / os.fsdecode(b"text\xff.txt")
    shutil.copy(options.data, strange)
    distill(tiny_folder, tmp_path / "out", replace(options, data=strange, layers=1))
    assert json.loads((tmp_path / "out/report.json").read_text())["data"]["training"]


def test_vocabularies_that_differ_by_padding_are_cut(options: Distill, tiny_folder: Path, tmp_path: Path) -> None:
    """Rows of the head beyond the tokenizer carry no mass: with zero logits they would."""
    wide = tiny.model_of(tiny.config_of("llama", vocab_size=tiny.VOCAB + 7), seed=3, dtype=torch.float32)
    student = tiny.save(wide, tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tiny_folder / name).exists():
            shutil.copy(tiny_folder / name, student / name)
    narrow = tmp_path / "narrow"
    shutil.copytree(student, narrow)
    tensors = load_file(student / "model.safetensors")
    less = tiny.VOCAB + 2
    cut = {name: t[:less].clone() if len(t) == tiny.VOCAB + 7 else t for name, t in tensors.items()}
    save_file(cut, narrow / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((student / "config.json").read_text()) | {"vocab_size": less}
    (narrow / "config.json").write_text(json.dumps(config))
    options = replace(options, layers=None, student=student)
    report = distill(tiny_folder, tmp_path / "out", options)
    same = distill(tiny_folder, tmp_path / "same", replace(options, student=narrow))
    for stage in ("before", "after"):
        padded, plain = report["quality_by_stage"][stage]["kl"], same["quality_by_stage"][stage]["kl"]
        assert padded == pytest.approx(plain, rel=1e-4), stage
    # What either writes is within both vocabularies, also where the embedding has room for more.
    distill(tiny_folder, tmp_path / "own", replace(options, on_policy=1.0, loss="k3"))
    distill(student, tmp_path / "back", replace(options, student=tiny_folder, teacher_rows=16))
    stored = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"]
    assert len(stored) == tiny.VOCAB + 7
    assert report["quality"]["kl"] < report["quality_by_stage"]["before"]["kl"]


@pytest.mark.parametrize("merge", [False, True])
def test_adapters(merge: bool, options: Distill, tiny_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = replace(options, layers=None, student=tiny_folder, lora=2, merge=merge, lr=0.05, loss="ce")
    report = distill(tiny_folder, tmp_path / "out", options)
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        assert (tmp_path / "out/adapter_model.safetensors").exists()
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out")
    ids = torch.randint(3, tiny.VOCAB, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
    assert report["quality_by_stage"]["before"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"teacher": "drawn", "top_k": 6},
        {"on_policy": 0.5, "ema": 0.5},
        {"loss": "forward-kl+0.1*align(3)"},
        {"loss": "forward-kl+0.5*bico(0.3)"},
        {"teacher_rows": 5, "teacher": "top-k", "top_k": 7},
        {"layers": None, "student_scheme": "w4a8-channel"},
        {"layers": None, "heads": 2, "ffn": 20, "hidden": 16},
    ],
)
def test_the_same_job_twice_gives_the_same_bytes_also_when_it_was_interrupted(
    change: dict[str, Any], options: Distill, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, **change)
    distill(tiny_folder, tmp_path / "out", options)
    whole = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from calib.jobs import training_loop as fitting

        patch.setattr(fitting, "asked_to_stop", iter([False, True, True, True]).__next__)
        distill(tiny_folder, tmp_path / "out", options)
    assert {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    distill(tiny_folder, tmp_path / "out", options, resume=True)
    assert digest(tmp_path / "out") == whole
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_stories(data: Path, tmp_path: Path) -> None:
    """Three of five blocks: a few steps close a good part of the KL gap that cutting opened."""
    model, text = data / "stories260k", data / "text/tinystories-a-clean.txt"
    options = Distill(layers=3, data=text, samples=120, held_out=16, length=128, steps=40, batch=8, lr=4e-3)
    report = distill(model, tmp_path / "out", options)
    before, after = (report["quality_by_stage"][when]["kl"] for when in ("before", "after"))
    assert report["cut"]["layers"][0] == 0 and after < 0.5 * before
    tokenizer = read_tokenizer(tmp_path / "out")
    corpus = load_corpus(text, tokenizer, vocab=512, length=64)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert loaded(corpus.ids[:1]).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_from_outside_in_every_stage_and_resumed(tmp_path: Path) -> None:
    options = Distill(layers=3, samples=8, held_out=2, length=32, steps=12, batch=2, teacher="top-k", top_k=8)
    kill_and_resume(partial(distill, embedded.MODEL, options=options), tmp_path, ("teacher-3", "cut", "distil"))


def test_prompts_alone_are_answered_by_the_student(tiny_folder: Path, tmp_path: Path) -> None:
    """With --on-policy 1; figures are of answers that the teacher writes to prompts held out."""
    prompts = [{"prompt": f"{'abcdefgh'[i % 8] * (1 + i % 5)} "} for i in range(24)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, prompts)))
    options = Distill(
        layers=1, data=data, length=12, held_out=4, steps=2, batch=3, loss="reverse-kl", on_policy=1.0, device="cpu"
    )
    report = distill(tiny_folder, tmp_path / "out", options, allow_damage=True)
    assert report["data"]["training"]["prompts_only"] and report["data"]["training"]["rows"] == 20
    assert 4 <= report["quality"]["tokens"] <= 4 * 11  # of answers, and no prompt among them
    for wrong in ({"on_policy": 0.0, "loss": "forward-kl"}, {"on_policy": 0.5}, {"answers_only": True}):
        with pytest.raises(BadInput, match=r"has prompts alone, which the student answers with --on-policy 1"):
            distill(tiny_folder, tmp_path / "other", replace(options, **wrong))
    with pytest.raises(BadInput, match=r"prompts fill all 4 tokens of a row; raise --length"):
        distill(tiny_folder, tmp_path / "other", replace(options, length=4))
    data.write_text("\n".join(map(json.dumps, [*prompts, {"prompt": "a", "completion": "b"}])))
    with pytest.raises(BadInput, match="prompts with answers and prompts alone"):
        distill(tiny_folder, tmp_path / "other", options)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "phi", "bloom", "deepseek_v3", "lfm2", "mamba"])
def test_teachers_and_students_of_any_type(model_type: str, tmp_path: Path) -> None:
    """Cut in depth and of themselves, with states compared, and a student of another type."""
    teacher, llama = (any_type.model_of(name).float() for name in (model_type, "llama"))
    teacher.save_pretrained(tmp_path / "teacher")
    llama.save_pretrained(tmp_path / "llama")
    ids = torch.randint(3, any_type.VOCAB - 4, (16, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    rows: dict[str, Any] = {"data": tmp_path / "ids.safetensors", "length": 16, "held_out": 3, "batch": 4, "steps": 2}
    for name, more in (
        ("cut", {"layers": 2}),
        ("same", {"student": tmp_path / "teacher", "loss": "forward-kl+0.1*hidden"}),
        ("other", {"student": tmp_path / "llama", "teacher": "top-k"}),
    ):
        report = distill(tmp_path / "teacher", tmp_path / name, Distill(**rows, **more), allow_damage=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, output_loading_info=True
        )
        assert not any(found.values()) and report["quality"]["kl"] >= -1e-6
        if name == "same":
            assert report["quality_by_stage"]["before"]["kl"] == pytest.approx(0, abs=1e-5)
        if name == "cut":
            assert model.config.num_hidden_layers == 2


def test_a_cut_keeps_each_block_of_its_kind(tmp_path: Path) -> None:
    """Experts begin with the second block of DeepSeek's, attention comes at numbered blocks of Bamba's."""
    for model_type in ("deepseek_v3", "bamba", "smollm3", "lfm2"):
        model: Any = any_type.model_of(model_type)
        stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path / model_type)), torch.device("cpu"))
        for layers in ([0, 1, 3], [1, 2], [0, 3]):
            walk = walk_of_config(student_config(stream.config, PruningPlan(layers)))
            kinds = [block_kind(module) for module in walk.modules]
            assert kinds == [block_kind(stream.blocks[i]) for i in layers], (model_type, layers)


def test_what_stands_behind_the_head_is_known_or_refused(tmp_path: Path) -> None:
    """BERT's head normalizes again."""
    any_type.model_of("bert").float().save_pretrained(tmp_path / "bert")
    save_file({"input_ids": torch.arange(3, 131).view(8, 16)}, tmp_path / "ids.safetensors")
    with pytest.raises(BadInput, match="bert is no teacher or student here, as what stands between"):
        distill(tmp_path / "bert", tmp_path / "out", Distill(layers=2, data=tmp_path / "ids.safetensors", length=16))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 1024),
        ({"steps": 10, "batch": 6}, 60),
        ({"teacher_rows": 0}, 0),
        ({"teacher_rows": 7, "data": Path("a.txt")}, 7),
        ({"data": Path("a.txt")}, 0),
        ({"loss": "ce"}, 0),
        ({"on_policy": 0.5}, 0),
        ({"task": "seq2seq"}, 0),
    ],
)
def test_without_data_the_teacher_writes_as_many_rows_as_training_takes(options: dict[str, Any], rows: int) -> None:
    assert Distill(layers=2, **options).written == rows
