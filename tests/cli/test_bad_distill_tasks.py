"""Bad input to `parewell distill --task seq2seq` and `--task masked-lm`: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, BartConfig

from calib.model.task import Task
from tests import tasks
from tests.cli.conftest import Refusal


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """t5, bart and bert, with rows of prompts and of text."""
    folder = tmp_path_factory.mktemp("models")
    for kind, task in (("t5", Task.SEQ_TO_SEQ_LM), ("bart", Task.SEQ_TO_SEQ_LM), ("bert", Task.MASKED_LM)):
        tasks.save(kind, task, folder / kind)
    for name, pairs in (("pairs", True), ("text", False)):
        tasks.rows_file(folder, pairs=pairs).rename(folder / f"{name}.jsonl")
    return folder


@pytest.fixture
def refused(models: Path, tmp_path: Path, refusal: Refusal) -> Refusal:
    """Run `parewell distill TEACHER OUT --task TASK ...` and return the one line it refuses with."""

    def run(task: str, *arguments: object, teacher: Path | str | None = None) -> str:
        kind, rows = {"seq2seq": ("t5", "pairs"), "masked-lm": ("bert", "text")}.get(task, ("t5", "pairs"))
        given = models / (teacher or kind)
        data = [] if "--data" in arguments else ["--data", models / f"{rows}.jsonl"]
        small = ["--samples", 8, "--held-out", 4, "--steps", 2]
        return refusal("distill", given, tmp_path / "out", "--task", task, *small, *data, *arguments)

    return run


@pytest.mark.parametrize(
    ("task", "arguments", "word"),
    [
        ("causal-lm", ["--layers", "3,3"], "layers 3,3: is of an encoder and a decoder; add --task seq2seq"),
        ("masked-lm", ["--layers", "1,1"], "layers 1,1: is of an encoder and a decoder; add --task seq2seq"),
        ("sequence-classification", ["--layers", "1,1"], "is of an encoder and a decoder"),
        ("seq2seq", ["--layers", "1,2,3"], "it must be a whole number, or two such as 3,3"),
        ("seq2seq", ["--layers", "1,x"], "it must be a whole number, or two such as 3,3"),
        ("seq2seq", ["--layers", "0,2"], "layers is 0; it must be at least 1"),
        ("seq2seq", ["--layers", "2,9"], "layers: the decoder has 6, 9 were asked for"),
        ("seq2seq", ["--layers", "9,2"], "layers: the encoder has 4, 9 were asked for"),
        ("seq2seq", [], "no student: give --student DIR"),
        ("causal-lm", ["--layers", 1], "add --task seq2seq"),
        *(
            (task, ["--layers", 1, *arguments], f"{arguments[0][2:]}: is not for --task {task}; leave it out")
            for task in ("seq2seq", "masked-lm")
            for arguments in (
                ["--heads", 2], ["--ffn", 16], ["--hidden", 16], ["--student-scheme", "w4a16-channel"],
                ["--on-policy", 0.5], ["--teacher", "top-k"], ["--teacher-rows", 4], ["--answers-only"],
                ["--lora", 2, "--merge"], ["--memory-budget", 1],
            )
        ),
        ("seq2seq", ["--layers", 1, "--by-document"], "by-document: is not for --task seq2seq"),
        ("seq2seq", ["--layers", 1, "--teacher-bits", "nf4"], "teacher-bits"),
        ("seq2seq", ["--layers", 1, "--shard"], "shard: what is sharded is a causal LM"),
        ("seq2seq", ["--layers", 1, "--on-policy", 1, "--reward", "exact"], "reward: is for what language"),
        ("seq2seq", ["--layers", 1, "--teacher", "together"], "teacher together: is for classifiers"),
        ("seq2seq", ["--factory", "a:b", "--layers", 1], "a factory's model takes tensors"),
        ("seq2seq", ["--layers", 1, "--loss", "ce+ofa-exits"], "loss ofa-exits: is not for --task seq2seq"),
        ("seq2seq", ["--layers", 1, "--loss", "ce+attention"], "loss attention: is not for --task seq2seq"),
        ("masked-lm", ["--layers", 1, "--loss", "ce+bico"], "loss bico: is not for --task masked-lm"),
        ("masked-lm", ["--layers", 1, "--loss", "ce+spans"], "loss spans: is not for --task masked-lm"),
        ("seq2seq", ["--layers", 1, "--loss", "ce+attention-relations"], "is for --task masked-lm; leave it out"),
        ("causal-lm", ["--layers", 1, "--loss", "ce+attention-relations"], "is for --task masked-lm; leave it out"),
        *(
            ("masked-lm", ["--layers", 1, "--length", 16, "--by-document", "--loss", loss], word)
            for loss, word in (
                ("ce+attention-relations(2,9)", "layer 9 of 4 was asked for"),
                ("ce+attention-relations(5)", "5 heads do not divide a width of 64"),
                ("ce+attention-relations(0)", "heads is 0; it must be from 1 to 512"),
                ("attention-relations(1.5)", "heads is 1.5; it must be a whole number"),
            )
        ),
        ("masked-lm", ["--layers", 1, "--loss", "ce+attention-relations", "--balance", "gradient"], "use recap"),
        ("seq2seq", ["--layers", 1, "--loss", "k3"], "add --on-policy 1"),
        ("seq2seq", ["--layers", 1, "--loss", "mse"], "it is for classifiers"),
        ("seq2seq", ["--layers", 1, "--loss", "sinkhorn"], "blind to which row got which answer"),
        ("seq2seq", ["--layers", 1, "--length", 4000], "positions"),
        ("masked-lm", ["--layers", 9, "--length", 16], "layers: the encoder has 4, 9 were asked for"),
    ],
)  # fmt: skip
def test_options_that_will_not_do(task: str, arguments: list[object], word: str, refused: Refusal) -> None:
    teacher = "bart" if 4000 in arguments else None
    assert word in refused(task, *arguments, teacher=teacher)


def test_models_of_other_tasks(refused: Refusal, tiny_folder: Path, models: Path) -> None:
    for task, teacher, word in (
        ("seq2seq", tiny_folder, "causal language models are not taken here"),
        ("masked-lm", tiny_folder, "causal language models are not taken here"),
        ("masked-lm", models / "t5", "sequence-to-sequence models are not taken here"),
        ("seq2seq", models / "bert", "masked language models are not taken here"),
    ):
        assert word in refused(task, "--layers", 1, teacher=teacher)
    assert "masked language models are not taken here" in refused("seq2seq", "--student", models / "bert")


def test_rows_without_prompts_or_responses(refused: Refusal, models: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for record, word in (
        ({"text": "w1 w2 w3 w4"}, "an encoder-decoder learns from prompts and their answers"),
        ({"prompt": "w1 w2"}, "given one prompt and one answer a row"),
        ({"prompt": "w1 w2", "response": ""}, "rows.jsonl"),
        ({"nothing": 1}, "rows.jsonl"),
    ):
        rows.write_text(json.dumps(record) + "\n" + (json.dumps(record) + "\n") * 20)
        assert word in refused("seq2seq", "--layers", 1, "--data", rows), record
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.ones(20, 6, dtype=torch.int64)}, ids)
    assert "needs 'labels'" in refused("seq2seq", "--layers", 1, "--data", ids)
    save_file({"input_ids": torch.ones(20, 6, dtype=torch.int64),
               "labels": torch.full((20, 6), -100, dtype=torch.int64)}, ids)  # fmt: skip
    assert "20 rows have no label" in refused("seq2seq", "--layers", 1, "--data", ids).replace("8 rows", "20 rows")
    for gap in (slice(2, 3), slice(0, 2)):  # columns after it were taken for padding, and left out
        labels = torch.ones(20, 6, dtype=torch.int64)
        labels[:, gap] = -100
        save_file({"input_ids": torch.ones(20, 6, dtype=torch.int64), "labels": labels}, ids)
        assert "must have -100 on the right only" in refused("seq2seq", "--layers", 1, "--data", ids)


def test_prompts_of_no_tokens(refused: Refusal, models: Path, tmp_path: Path) -> None:
    """Of a tokenizer that puts nothing around texts, a blank prompt leaves an encoder nothing to attend to."""
    bare = Path(shutil.copytree(models / "t5", tmp_path / "bare"))
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": " ", "response": "w1 w2"}\n' * 20)
    assert "have a prompt of no tokens" in refused("seq2seq", "--layers", 1, "--data", rows, teacher=bare)


def test_students_and_teachers_that_do_not_go_together(refused: Refusal, models: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models / "t5", tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer" in refused("seq2seq", "--student", other)
    shutil.copy(models / "t5/tokenizer.json", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 5}))
    assert "its decoder starts with token 5, the teacher's with 0" in refused("seq2seq", "--student", other)
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "is quantized already (gptq)" in refused("seq2seq", "--student", other)
    assert "is quantized already (gptq)" in refused("seq2seq", "--layers", 1, teacher=other)
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(other / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert "contains NaN or Inf" in refused("seq2seq", "--layers", 1, teacher=other)
    for file in other.glob("token*"):
        file.unlink()
    assert "tokenizer" in refused("seq2seq", "--layers", 1, teacher=other)


def test_losses_that_compare_states_of_other_widths(refused: Refusal, models: Path, tmp_path: Path) -> None:
    config = BartConfig.from_pretrained(models / "bart", d_model=32)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "narrow")
    for file in (models / "bart").glob("token*"):
        shutil.copy(file, tmp_path / "narrow")
    given = ("--student", tmp_path / "narrow", "--loss")
    for loss in ("hidden", "sinkhorn-hidden"):
        assert f"loss {loss}: the student" in refused("seq2seq", *given, f"ce+{loss}", teacher="bart")


def test_masked_models_without_a_mask(refused: Refusal, models: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models / "bert", tmp_path / "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    config.pop("mask_token")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    assert "names no mask_token" in refused("masked-lm", "--layers", 1, teacher=other)
