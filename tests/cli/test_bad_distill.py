"""Bad input to `parewell distill`: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import embedded
from compressor import Distill, distill
from tests import tiny
from tests.cli.conftest import Refusal


@pytest.fixture
def refused(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    refusal: Refusal,
) -> Refusal:
    """Run `parewell distill TEACHER OUT ...` and return the one line it refuses with."""

    def run(*arguments: object, teacher: Path = tiny_folder, status: int = 2) -> str:
        small = ["--samples", 4, "--held-out", 2, "--length", 16, "--steps", 2]
        data = [] if "--data" in arguments else ["--data", text_file]
        return refusal("distill", teacher, tmp_path / "out", *small, *data, *arguments, status=status)

    return run


def test_a_recipe_that_is_none_is_seen_before_anything_is_trained(
    tmp_path: Path, refused: Refusal, tiny_folder: Path
) -> None:
    teacher = Path(shutil.copytree(tiny_folder, tmp_path / "teacher"))
    for content in ("{}", '{"recipe": []}', '{"recipe": [{"job": "unlearn"}]}', "["):
        (teacher / "parewell.json").write_text(content)
        assert "parewell.json" in refused("--layers", 1, teacher=teacher)


def test_tokenizers_that_differ(tmp_path: Path, refused: Refusal, tiny_folder: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_folder, student)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    a, b = sorted(words, key=words.get)[5:7]
    words[a], words[b] = words[b], words[a]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer" in refused("--student", student)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--layers", 9], "the teacher has 2, 9 were asked for"),
        (["--layers", 0], "layers is 0; it must be at least 1"),
        (["--heads", 3], "ask for a multiple of 2"),
        (["--ffn", 4000], "the teacher has 40"),
        (["--hidden", 4000], "the teacher has 24"),
        ([], "no student: give --student DIR, a shape such as --layers 6"),
        (["--layers", 1, "--loss", "kl"], "loss 'kl' is unknown; is forward-kl meant? there are ce, align"),
        (["--layers", 1, "--loss", "sinkhorn"], "blind to which row got which answer"),
        (["--layers", 1, "--loss", "0*ce+forward-kl"], "it must be positive"),
        (["--layers", 1, "--temperature", 0], "temperature is 0.0; it must lie between 0.001 and 1000"),
        (["--layers", 1, "--temperature", "nan"], "temperature is nan; it must be a number"),
        (["--layers", 1, "--lr", -1], "lr is -1.0"),
        (["--layers", 1, "--on-policy", 2], "on-policy is 2.0; it must lie between 0 and 1"),
        (["--layers", 1, "--answers-only"], "has no prompts"),
        (["--layers", 1, "--teacher", "top-k", "--temperature", 2], "was said at 1"),
        (["--layers", 1, "--cache", "here"], "an online teacher keeps nothing"),
        (["--layers", 1, "--merge"], "merge: changes nothing without --lora"),
        (["--hidden", 16, "--loss", "ce+hidden"], "add --project"),
        (["--layers", 1, "--loss", "ce+hidden", "--balance", "gradient"], "use recap"),
        (["--layers", 1, "--loss", "ce+cka", "--teacher", "top-k"], "cannot be had from a teacher kept as top-k"),
        (
            ["--layers", 1, "--loss", "ce+spans"],
            'has no spans; give JSON lines such as {"text": ..., "spans": [[0, 12]]}',
        ),
        (["--layers", 1, "--loss", "ce+ofa-exits"], "loss ofa-exits: a student of one block"),
        (["--layers", 1, "--loss", "uskd"], "it is for classifiers"),
        (["--layers", 1, "--project"], "project: no loss compares hidden states"),
        (["--layers", 1, "--balance", "recap"], "balance: there is one loss"),
        (["--layers", 1, "--loss", "ce", "--teacher", "top-k"], "listens to no teacher"),
        (["--layers", 1, "--loss", "ce", "--temperature", 2], "cross-entropy has none"),
        (["--layers", 1, "--seed", 2**64], "seed is 18446744073709551616; it must be below 2^31"),
        (["--layers", 1, "--temperature", 1e-30], "it must lie between 0.001 and 1000"),
        (["--layers", 1, "--lr", 1e38], "lr is 1e+38"),
        (["--layers", 1, "--steps", 10**9], "more than a job may take"),
        (["--layers", 1, "--lora", 2], "have nothing to go with; add --merge"),
        (["--hidden", 16, "--loss", "ce+sinkhorn-hidden"], "loss sinkhorn-hidden: the student is 16 wide"),
        (["--layers", 1, "--loss", "ce+sinkhorn(-1)"], "eps is -1"),
        (["--layers", 1, "--shard"], "start several with torchrun"),
        (["--student-scheme", "w4"], "scheme 'w4' is unknown"),
        (["--student-scheme", "w4a16-g7"], "group size 7 does not divide"),
        (["--student-scheme", "w4a4-channel", "--lora", 2], "is trained whole; leave out --lora"),
        (["--layers", 1, "--samples", 100000], "were asked for"),
    ],
)
def test_options_that_will_not_do(arguments: list[object], word: str, refused: Refusal) -> None:
    assert word in refused(*arguments)


REWARDED = ("--layers", 1, "--on-policy", 1, "--reward", "exact", "--length", 40)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (
            ["--layers", 1, "--loss", "kdrl"],
            "loss kdrl: goes by rewards; add --reward, such as exact, and --on-policy 1",
        ),
        (["--layers", 1, "--loss", "f-dpg(jss)"], "divergence 'jss' is unknown; choose from forward-kl, reverse-kl"),
        (["--layers", 1, "--reward", "exact"], "reward: is of what the student writes; add --on-policy 1"),
        (["--layers", 1, "--group", 4], "group: changes nothing without --reward"),
        ([*REWARDED, "--loss", "grpo", "--group", 1], "group 1: grpo compares each answer with others to its prompt"),
        ([*REWARDED, "--loss", "kdrl", "--beta", 0], "beta 0: kdrl becomes grpo, with no teacher; give --loss grpo"),
        ([*REWARDED, "--loss", "f-dpg(js)", "--beta", 0], "beta 0: the target becomes the teacher on its best answers"),
        ([*REWARDED, "--loss", "grpo", "--beta", 0.5], "beta: is of loss kdrl or f-dpg; leave it out"),
        ([*REWARDED, "--loss", "grpo", "--kl-mask", "group"], "kl-mask: is of loss kdrl; leave it out"),
        ([*REWARDED, "--loss", "kdrl", "--target", "verified"], "target: is of loss f-dpg; leave it out"),
        (
            [*REWARDED, "--loss", "kdrl", "--kl-by-difficulty", "--kl-mask", "response"],
            "kl-by-difficulty: pulls no wrong",
        ),
        ([*REWARDED, "--loss", "f-dpg", "--target", "verified", "--beta", 2], "target verified: has no beta"),
        ([*REWARDED, "--loss", "f-dpg", "--target-reward", 0.5, "--beta", 2], "target-reward: chooses beta"),
        ([*REWARDED, "--loss", "grpo+kdrl"], "loss: grpo and kdrl both decide what an answer is worth; take one"),
        (
            [*REWARDED, "--loss", "grpo", "--temperature", 2],
            "temperature: grpo is of answers written at 1; leave it out",
        ),
        ([*REWARDED, "--loss", "grpo+ce", "--balance", "recap"], "balance: grpo is no loss that falls"),
        ([*REWARDED, "--answers-only"], "every row is a prompt that the student answers"),
        ([*REWARDED, "--teacher-rows", 3], "every row is a prompt that the student answers"),
        (["--layers", 1, "--loss", "ce+bico(2)"], "share is 2; it must be from 0.01 to 0.9"),
        (["--layers", 1, "--loss", "ce+bico", "--on-policy", 1], "loss bico: reads given rows in both directions"),
        (["--layers", 1, "--correct", 2], "correct: is for --on-policy 1 and losses of distributions"),
        ([*REWARDED, "--loss", "kdrl", "--correct", 2], "correct: is for --on-policy 1 and losses of distributions"),
        ([*REWARDED[:4], "--reward", "right"], "reward 'right' is unknown; give exact, contains, regex:FIELD"),
        ([*REWARDED, "--teacher", "top-k"], "the teacher must answer what the student says"),
    ],
)
def test_rewards_that_will_not_do(arguments: list[object], word: str, refused: Refusal) -> None:
    assert word in refused(*arguments)


@pytest.mark.parametrize(
    ("reward", "record", "word"),
    [
        ("exact", {"prompt": "the fox"}, "has no answer, which reward exact compares with"),
        ("regex:form", {"prompt": "the fox", "completion": "runs"}, "has no field 'form' of text"),
        ("regex:form", {"prompt": "a", "completion": "b", "form": "("}, "'form' is no regular expression"),
        ("exact", {"prompt": "the fox jumps over the dog", "completion": "yes"}, "rows are longer than 16 tokens"),
        ("exact", {"text": "the fox jumps"}, "has no prompt"),
        ("no_module:judge", {"prompt": "the fox"}, "reward no_module:judge: cannot be imported"),
        ("failing_reward:judge", {"prompt": "the fox", "completion": "runs"}, "ValueError: no such thing"),
    ],
)
def test_rows_that_a_reward_cannot_judge(
    reward: str, record: dict[str, str], word: str, refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_reward.py").write_text(
        "def judge(prompt, written, row):\n    raise ValueError('no such thing')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(record)}\n" * 8)
    given = ["--layers", 1, "--on-policy", 1, "--reward", reward, "--data", tmp_path / "rows.jsonl"]
    assert word in refused(*given)


def test_a_student_with_a_shape(tiny_folder: Path, refused: Refusal) -> None:
    assert "leave out --layers" in refused("--student", tiny_folder, "--layers", 1)


def test_all_tokens_masked(tmp_path: Path, refused: Refusal) -> None:
    """Prompts so long that no answer is left in the rows."""
    file = tmp_path / "prompts.jsonl"
    record = {"prompt": "the quick brown fox jumps over the lazy dog " * 40, "response": "yes"}
    file.write_text(f"{json.dumps(record)}\n" * 8)
    assert "all tokens are masked" in refused("--layers", 1, "--data", file, "--by-document", "--answers-only")


def test_labels_out_of_range(tmp_path: Path, refused: Refusal) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((9, 16), tiny.VOCAB)}, file)
    assert "is beyond the model's vocabulary" in refused("--layers", 1, "--data", file)


def test_out_that_is_the_student_or_leads_nowhere(tmp_path: Path, refused: Refusal, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "out")
    assert "lies inside the model folder" in refused("--student", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert "leads nowhere" in refused("--layers", 1)


def test_a_cache_that_would_not_stay(tmp_path: Path, refused: Refusal, tiny_folder: Path) -> None:
    kept = ["--layers", 1, "--teacher", "top-k", "--cache"]
    for place in ("out", "out/cache", ".out.journal/cache", ".out.partial"):
        assert "what becomes of OUT" in refused(*kept, tmp_path / place)
    assert "lies inside the model folder" in refused(*kept, tiny_folder / "cache")


def test_a_student_of_another_width(tmp_path: Path, refused: Refusal) -> None:
    config = tiny.config_of("llama", hidden_size=48)
    student = tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / "student")
    assert "the student is 48 wide, the teacher 24" in refused("--student", student, "--loss", "ce+hidden")


def test_classification_files(tmp_path: Path, refused: Refusal, bert: Path) -> None:
    task = ["--task", "sequence-classification", "--layers", 1, "--data"]
    for content, word in (
        ("sentence\nw1 good\n", "or no label (label, labels)"),
        ("sentence\tlabel\n" + "w1 good\tmaybe\n" * 9, "label 'maybe'"),
        ("sentence\tlabel\n" + "w1 good\t7\n" * 9, "label '7'"),
        ("sentence\tlabel\n" + f"w1 good\t{'9' * 5000}\n" * 9, "is none of the model's"),
        ("sentence\tlabel\n" + "w1\tyes\n" * 3, "4 were asked for"),
        ("sentence\tquestion\ttext\tlabel\na\tb\tc\tyes\n", "one or two texts and a label are read"),
    ):
        file = tmp_path / "data.tsv"
        file.write_text(content)
        assert word in refused(*task, file, teacher=bert), word


def test_classifiers_that_will_not_do(tmp_path: Path, refused: Refusal, bert: Path) -> None:
    """Found out before anything is written, and called by what is wrong with them."""
    file = tmp_path / "data.tsv"
    file.write_text("sentence\tlabel\n" + "w1 good\tyes\nbad w2\tno\n" * 9)
    task = ["--task", "sequence-classification", "--layers", 1, "--data", file]
    config, tensors = json.loads((bert / "config.json").read_text()), load_file(bert / "model.safetensors")
    body = "bert.encoder.layer.1.output.dense.weight"
    broken: dict[str, tuple[dict[str, object], dict[str, torch.Tensor], str]] = {
        "act": ({"hidden_act": "nosuch"}, tensors, "cannot be opened as a model"),
        "wide": ({"hidden_size": 64}, tensors, "cannot be opened as a model"),
        "layers": ({"num_hidden_layers": "3"}, tensors, "num_hidden_layers"),
        "type": ({"model_type": "nosuch"}, tensors, "cannot be opened as a classifier"),
        "nan": ({}, tensors | {body: torch.full_like(tensors[body], torch.nan)}, "holds NaN or Inf"),
        "less": ({}, {name: t for name, t in tensors.items() if name != body}, f"lacks '{body}'"),
    }
    for name, (changes, left, word) in broken.items():
        shutil.copytree(bert, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        save_file(left, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        assert word in refused(*task, teacher=tmp_path / name), name
    shutil.copytree(bert, tmp_path / "mute")
    for tokenizer in (tmp_path / "mute").glob("token*"):
        tokenizer.unlink()
    assert "has no tokenizer that pads" in refused(*task, teacher=tmp_path / "mute")


def test_a_cache_of_another_teacher(tmp_path: Path, refused: Refusal, tiny_folder: Path, text_file: Path) -> None:
    options = Distill(layers=1, data=text_file, samples=4, held_out=2, length=16, steps=2, teacher="top-k", top_k=5)
    distill(tiny_folder, tmp_path / "first", replace(options, cache=tmp_path / "cache"))
    kept = ["--teacher", "top-k", "--top-k", 5, "--cache", tmp_path / "cache", "--layers", 1]
    assert "keeps other words of a teacher: text" in refused(*kept, "--seed", 1)
    other = tiny.save(tiny.model_of(tiny.config_of("llama"), seed=5, dtype=torch.float32), tmp_path / "other")
    assert "keeps other words of a teacher: teacher" in refused(*kept, teacher=other)


def test_a_folder_that_keeps_no_words(tmp_path: Path, refused: Refusal) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.txt").touch()
    assert "keeps no words of a teacher" in refused("--layers", 1, "--teacher", "top-k", "--cache", cache)


def test_packages_that_are_not_there(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["compressor.distillation.distill"], "find_spec", lambda name: None)
    assert "pip install 'parewell[lora]'" in refused("--layers", 1, "--lora", 2, "--merge")
    assert "pip install 'parewell[eight-bit]'" in refused("--layers", 1, "--optimizer", "adamw8bit")


def test_a_quantized_teacher(tmp_path: Path, refused: Refusal, tiny_folder: Path) -> None:
    teacher = tmp_path / "quantized"
    shutil.copytree(tiny_folder, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "is quantized; nothing is cut out of that" in refused("--layers", 1, teacher=teacher)
    assert "was quantized by another tool" in refused("--student", teacher)


def test_a_loss_that_becomes_nan_keeps_the_last_good_state(tmp_path: Path, refused: Refusal) -> None:
    line = refused("--layers", 1, "--lr", 1e30, "--steps", 9, "--warmup", 0, teacher=embedded.MODEL, status=1)
    assert "step " in line and "not finite" in line and "lower the learning rate" in line and "--no-resume" in line
    assert (tmp_path / ".out.journal/distil.page").exists() and not (tmp_path / "out").exists()
