"""The information plane of a language model against the library's own forward pass, and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput, embedded
from calib.data.corpus import Corpus
from calib.data.load import embedded_corpus
from calib.model.checkpoint import read_tokenizer
from calib.model.task import Task
from calib.stats.information import cauchy_schwarz_information, gaussian_gram, median_distance
from cli.main import parewell
from compressor import Evaluate, Quantize, evaluate, quantize
from compressor.engine.information_plane import positions_compared
from tests import tasks


def gram(x: Tensor) -> Tensor:
    return gaussian_gram(x, median_distance(x))


def test_every_block_is_what_the_library_computes() -> None:
    found = evaluate(embedded.MODEL, Evaluate(rows=3, length=40, information_plane=True)).information
    assert found is not None and found.keys() == {"model"}
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()
    config = model.config
    corpus = embedded_corpus(
        "held-out", embedded.MODEL, read_tokenizer(embedded.MODEL), vocab=config.vocab_size, length=40
    )[:3]
    assert corpus.mask.all()  # so all 3 * 39 positions have a next token
    states: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: states.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=corpus.ids)
        embeddings = model.model.embed_tokens(corpus.ids)
    read, following = gram(embeddings[:, :-1].flatten(0, 1)), gram(embeddings[:, 1:].flatten(0, 1))
    for i, state in enumerate(states):
        own = gram(state[:, :-1].flatten(0, 1))
        assert found["model"]["read"][i] == pytest.approx(cauchy_schwarz_information(own, read), rel=1e-4)
        assert found["model"]["next"][i] == pytest.approx(cauchy_schwarz_information(own, following), rel=1e-4)
    # A block's state is nearer to what was read than to what comes.
    assert all(a > b > 0 for a, b in zip(found["model"]["read"], found["model"]["next"], strict=True))


def test_beside_a_reference_and_as_a_table(tmp_path: Path) -> None:
    quantize(embedded.MODEL, tmp_path / "out", Quantize(scheme="w8a16-channel", rounding="rtn", samples=4, length=32))
    asked = [str(tmp_path / "out"), "--reference", str(embedded.MODEL), "--rows", "3", "--length", "40"]
    done = CliRunner().invoke(parewell, ["evaluate", *asked, "--information-plane", "--json"])
    planes = json.loads(done.stdout)["information"]
    for which in ("read", "next"):
        assert planes["model"][which] == pytest.approx(planes["reference"][which], rel=0.05)
        assert planes["model"][which] != planes["reference"][which]
    table = CliRunner().invoke(parewell, ["evaluate", *asked, "--information-plane"]).stdout
    assert "CS-QMI" in table and f"{planes['reference']['read'][0]:.4f}" in table
    assert "information" not in json.loads(CliRunner().invoke(parewell, ["evaluate", *asked, "--json"]).stdout)


def test_models_that_predict_no_next_token(tmp_path: Path) -> None:
    tasks.save("bert", Task.MASKED_LM, tmp_path)
    options = Evaluate(data=tasks.rows_file(tmp_path), length=16, by_document=True, information_plane=True)
    with pytest.raises(BadInput, match=r"information-plane: is about causal language models"):
        evaluate(tmp_path, options)


def test_too_few_positions_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.engine.evaluate.compare", lambda *_, **__: pytest.fail("computed"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Once upon a", "response": " time"}\n')
    options = Evaluate(data=tmp_path / "rows.jsonl", by_document=True, answers_only=True, information_plane=True)
    with pytest.raises(BadInput, match="positions with a token after them"):
        evaluate(embedded.MODEL, options)


def test_a_plane_beside_tasks_alone_is_refused() -> None:
    asked = ["evaluate", str(embedded.MODEL), "--tasks", "arc_easy", "--information-plane"]
    done = CliRunner().invoke(parewell, asked)
    assert isinstance(done.exception, BadInput) and "information-plane: is about text" in str(done.exception)


def test_positions_are_those_whose_next_token_is_one_of_the_text() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    answers = torch.tensor([[False, False, True, True], [False, False, False, False]])
    corpus = Corpus(torch.zeros(2, 4, dtype=torch.int64), mask, "rows", answers=answers)
    assert positions_compared(corpus, answers_only=False).tolist() == [[0, 0], [0, 1], [1, 0]]
    with pytest.raises(BadInput, match="rows: has 1 positions with a token after them"):
        positions_compared(corpus, answers_only=True)
