"""Whole jobs that repair a student on answers of its own: one-digit additions, which a program checks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib import BadInput, Damaged, Failed
from compressor import Distill, Quantize, distill, quantize
from compressor.on_policy.options import F_DIVERGENCES
from tests.additions import adder, share_right, write_rows
from tests.kills import digest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that adds digits."""
    folder = adder(tmp_path_factory.mktemp("adder") / "model", 1, width=32, steps=350, batch=64)
    assert share_right(folder, 1) > 0.95
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 1, slice(0, 100))


@pytest.fixture(scope="module")
def rounded(teacher: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in two bits, which adds badly."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    plain: dict[str, Any] = {"learn": False, "init": "none", "rounding": "rtn"}
    options = Quantize(scheme="w2a8-g32", data=rows, by_document=True, held_out=8, **plain)
    quantize(teacher, out, options, allow_damage=True)
    return out


@pytest.fixture
def options(rows: Path, rounded: Path) -> Distill:
    return Distill(
        student=rounded, data=rows, held_out=20, length=9, on_policy=1.0, reward="exact", group=4, loss="kdrl",
        steps=3, batch=4, lr=1e-3, warmup=2, device="cpu",
    )  # fmt: skip


def test_a_quantized_student_learns_to_add_again(options: Distill, teacher: Path, tmp_path: Path) -> None:
    """KDRL, f-DPG and k2 with the same tokens each: more answers are right than before, and the report says so."""
    for loss in ("kdrl", "f-dpg(js)", "k2"):
        given = replace(options, loss=loss, steps=40, batch=8)
        report = distill(teacher, tmp_path / loss[:4], given, allow_damage=True)
        figures = report["on_policy"]["figures"]
        assert figures["after"]["reward"] > figures["before"]["reward"] + 0.1, loss
        assert (
            figures["after"]["pass_at"]["4"]
            >= figures["after"]["pass_at"]["1"]
            == pytest.approx(figures["after"]["reward"])
        )
        assert figures["teacher"]["reward"] > 0.8 and figures["teacher"]["draws"] == 8
        assert len(report["on_policy"]["curves"]["reward"]) == 40
        assert (figures["after"]["target_kl"] is not None) == (loss == "f-dpg(js)")
        assert report["on_policy"]["beta"] == (None if loss == "k2" else 0.1)
        page = (tmp_path / loss[:4] / "report.html").read_text()
        assert "pass@4" in page and "mean reward of its answers" in page


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "f-dpg(reverse-kl)", "ema": 0.5},
        {"loss": "kdrl", "beta_end": 0.01, "kl_mask": "group"},
        {"loss": "forward-kl", "correct": 1.0, "corrections": 2},
    ],
)
def test_stopped_and_continued_it_ends_with_the_same_bytes(
    change: dict[str, Any], options: Distill, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, **change)
    distill(teacher, tmp_path / "out", options, allow_damage=True)
    whole = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from calib.jobs import training_loop

        patch.setattr(training_loop, "asked_to_stop", iter([False, True]).__next__)
        distill(teacher, tmp_path / "out", options, allow_damage=True)
    distill(teacher, tmp_path / "out", options, resume=True, allow_damage=True)
    assert digest(tmp_path / "out") == whole


def test_students_of_every_kind(options: Distill, teacher: Path, tmp_path: Path) -> None:
    """Cut out of the teacher, float on the grids of a scheme, and with adapters; each is loaded by transformers."""
    pytest.importorskip("peft")
    every = {
        "cut": {"student": None, "layers": 1, "loss": "grpo+0.1*forward-kl"},
        "grids": {"student": None, "student_scheme": "w4a8-g8", "loss": "f-dpg(total-variation)"},
        "adapters": {"student": teacher, "lora": 2, "merge": True, "loss": "kdrl", "kl_by_difficulty": True},
    }
    for name, change in every.items():
        distill(teacher, tmp_path / name, replace(options, **change), allow_damage=True)
        if name != "grids":
            made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert made(torch.tensor([[0, 3, 12]])).logits.isfinite().all()
            assert made.generation_config.top_k in (None, 50), "how it wrote while it learned is no setting of its own"


def test_a_threshold_that_nothing_reaches_changes_nothing(options: Distill, teacher: Path, tmp_path: Path) -> None:
    plain = replace(options, loss="reverse-kl", reward=None, group=8)
    for name, given in (("plain", plain), ("never", replace(plain, correct=1e6))):
        distill(teacher, tmp_path / name, given, allow_damage=True)
    assert digest(tmp_path / "plain")["model.safetensors"] == digest(tmp_path / "never")["model.safetensors"]


def test_beta_for_a_mean_reward_and_targets_without_mass(
    options: Distill, teacher: Path, rounded: Path, tmp_path: Path
) -> None:
    given = replace(options, loss="f-dpg(forward-kl)", target_reward=0.999, student=teacher)
    report = distill(rounded, tmp_path / "tilted", given, allow_damage=True)
    assert 0 < report["on_policy"]["beta"] < 1
    for loss in [f"f-dpg({name})" for name in F_DIVERGENCES]:
        distill(
            teacher, tmp_path / loss[6:9], replace(options, loss=loss, target="verified", steps=1), allow_damage=True
        )
        shutil.rmtree(tmp_path / loss[6:9])
    never = replace(options, loss="f-dpg(js)", target="verified", reward="regex:pattern", data=_rows(tmp_path, "x{9}"))
    with pytest.raises(BadInput, match="the target gives every one zero mass"):
        distill(teacher, tmp_path / "never", never)


def _rows(folder: Path, pattern: str) -> Path:
    rows = [
        {"prompt": f"{a}+{b}=", "completion": f"{a + b:02}", "pattern": pattern} for a in range(5) for b in range(6)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_student_whose_reward_falls_has_failed(options: Distill, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="the mean reward fell from"):
        distill(teacher, tmp_path / "out", replace(options, student=teacher, loss="grpo", lr=0.3, steps=5))
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_later_names_the_row(
    options: Distill, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brittle_reward.py").write_text(
        "def judge(prompt, written, row):\n    return 1.0 if written == row['completion'] else 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        Failed, match=r"reward brittle_reward:judge: .*, line \d+: ZeroDivisionError: .*; mend the function"
    ):
        distill(teacher, tmp_path / "out", replace(options, reward="brittle_reward:judge"))


def test_prompts_alone_end_where_the_answer_begins(options: Distill, teacher: Path, tmp_path: Path) -> None:
    """Whatever the tokenizer puts at the end of a text: the teacher answers them as it does prompts with answers."""
    rows = [{"prompt": f"{a}+{b}=", "pattern": f"^{a + b:02}$"} for a in range(10) for b in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = replace(options, data=tmp_path / "rows.jsonl", reward="regex:pattern", steps=1)
    figures = distill(teacher, tmp_path / "out", given, allow_damage=True)["on_policy"]["figures"]
    assert figures["teacher"]["reward"] > 0.7


def test_conversations_are_answered_from_their_last_turn(teacher: Path, options: Distill, tmp_path: Path) -> None:
    """A prompt ends where the chat template would let the model begin; what came before belongs to it."""
    from calib.data.load import load_corpus
    from compressor.on_policy.completions import rewarded_prompts

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% endif %}{% endfor %}"
    )
    turns = [("user", "1+1"), ("assistant", "02"), ("user", "2+3"), ("assistant", "05")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    corpus = load_corpus(tmp_path / "chat.jsonl", tokenizer, vocab=14, length=20, by_document=True)
    made = rewarded_prompts(corpus, tokenizer, "exact")
    (asked,) = made.about
    assert asked.text == "1+1=022+3=" and asked.answer == "05"
