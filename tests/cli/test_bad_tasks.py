"""Bad input with masked language models, encoder-decoders and embedding models: one line, status 2, nothing written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calib.model.task import Task
from cli.main import run_cli
from tests import tasks
from tests.cli.conftest import Refusal

SMALL = ["--samples", "4", "--held-out", "2", "--length", "16", "--scheme", "w4a16-g16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    tasks.save("bert", Task.MASKED_LM, root / "masked")
    tasks.save("bert", Task.EMBEDDING, root / "embedding")
    tasks.save("t5", Task.SEQ_TO_SEQ_LM, root / "seq2seq")
    return root


def changed(folder: Path, file: str, **more: Any) -> None:
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**raw, **more}))


@pytest.fixture
def refused(models: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Run a command in a folder with copies of the models -> the line that it refuses with."""
    monkeypatch.chdir(tmp_path)
    for folder in models.iterdir():
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name / file.name).write_bytes(file.read_bytes())
    tasks.rows_file(tmp_path)

    return refusal


def test_models_that_lack_what_their_task_needs(refused: Refusal, tmp_path: Path) -> None:
    quantized = ("out", *SMALL, "--data", "rows.jsonl")
    changed(tmp_path / "masked", "tokenizer_config.json", mask_token=None)
    assert "names no mask_token" in refused("quantize", "masked", *quantized)
    changed(tmp_path / "seq2seq", "config.json", decoder_start_token_id=None)
    assert "has no decoder_start_token_id" in refused("quantize", "seq2seq", *quantized)
    changed(tmp_path / "embedding", "config.json", architectures=["BertForSequenceClassification"])
    assert "class BertForSequenceClassification are not taken here" in refused("quantize", "embedding", *quantized)


def test_rows_that_will_not_do(refused: Refusal, tmp_path: Path) -> None:
    ids = torch.randint(5, 90, (8, 16))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    asked = ("quantize", "seq2seq", "out", *SMALL, "--data")
    assert "needs 'labels'" in refused(*asked, "ids.safetensors")
    save_file({"input_ids": ids, "labels": ids[:4].clone()}, tmp_path / "few.safetensors")
    assert "'labels' must have as many rows" in refused(*asked, "few.safetensors")
    save_file({"input_ids": ids, "labels": ids.clone().fill_(-5)}, tmp_path / "below.safetensors")
    assert "'labels' has -5; give token ids, or -100 for none" in refused(*asked, "below.safetensors")
    turns = [{"role": role, "content": "w1 w2"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = {"chat_template": "{% for m in messages %}{{ m.content }} w9 {% endfor %}"}
    changed(tmp_path / "seq2seq", "tokenizer_config.json", **tokenizer)
    assert "the 1. row that was read has 2 answers" in refused(*asked, "chat.jsonl")


def test_options_that_an_embedding_model_has_no_use_for(refused: Refusal) -> None:
    asked = ("quantize", "embedding", "out", *SMALL, "--data", "rows.jsonl")
    assert "target-bits: goes by the KL" in refused(*asked, "--target-bits", "4")
    assert "halves: goes by the KL" in refused(*asked, "--halves")
    assert "tell-apart: goes by the KL" in refused(*asked, "--tell-apart", "52%")
    assert "tune-steps: of bert there is no tuning" in refused(*asked, "--tune-steps", "5")
    assert "give --reference MODEL" in refused("evaluate", "embedding", "--data", "rows.jsonl")
    for model in ("embedding", "masked", "seq2seq"):
        assert "answers-only: tells answers from prompts" in refused(
            "evaluate", model, "--reference", model, "--data", "rows.jsonl", "--answers-only"
        )
    assert "is no embedding model" in refused("evaluate", "embedding", "--reference", "masked", "--data", "rows.jsonl")


def test_jobs_that_take_causal_language_models_alone(refused: Refusal) -> None:
    distilled = ("out", "--layers", "1", "--data", "rows.jsonl")
    assert "does not go on with a prompt" in refused("generate", "masked", "w1 w2")
    assert "(BertForMaskedLM); add --task masked-lm" in refused("distill", "masked", *distilled)
    assert "sequence-to-sequence models are not taken here" in refused("export", "seq2seq", "out", "--to", "onnx")
    assert "embedding models are not taken here" in refused("export", "embedding", "out", "--to", "gguf")


def test_figures_of_embeddings_are_printed(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model beside itself, as a table: words among the numbers."""
    model, file = str(models / "embedding"), str(tasks.rows_file(tmp_path))
    monkeypatch.setattr(sys, "argv", ["parewell", "evaluate", model, "--reference", model, "--data", file])
    run_cli()
    printed = capsys.readouterr().out
    assert "1.0000" in printed
    assert "mean" in printed
