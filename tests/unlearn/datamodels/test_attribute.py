"""Attribution of a model that is walked block by block, against the same of the model in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.config import read_config
from calib.model.per_example_gradients import projections
from calib.model.weights import Weights
from tests import tiny
from tests.processes import command, torchrun
from tests.unlearn.conftest import NAMES, Site
from unlearn.data.dataset import read_data
from unlearn.datamodels import attribute as module
from unlearn.datamodels.attribute import attribute, blockwise_scores, listed
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.model.model import open_model
from unlearn.options.attribution import Attribute


def options_of(site: Site, **more: object) -> Attribute:
    return Attribute(train=site.train, query=site.forget, width=5, **more)  # type: ignore[arg-type]


def in_memory(folder: Path, site: Site, options: Attribute, chunk: int) -> Tensor:
    """With the whole model and its graph, chunks of as many tokens."""
    trainable = open_model(folder, "causal-lm", device=torch.device("cpu"))
    train, query = (read_data(file, trainable).examples for file in (site.train, site.forget))
    projected = projections(trainable.linears, options.width, options.seed)
    seen = Seen(trainable.forward, trainable.state, trainable.linears, projected, trainable.forward, chunk)
    each = [seen.gradients(train[some], options.seed + i) for i, some in enumerate(seen.chunks(train))]
    own, drawn = (torch.cat(parts) for parts in zip(*each, strict=True))
    asked = torch.cat([seen.of_outputs(query[some]) for some in seen.chunks(query)])
    return Attribution.of(own, second_moment(drawn, seen.blocks), options.damping).scores(asked)


def walked(folder: Path, site: Site, options: Attribute, scratch: Path, budget: int = 10**9) -> Tensor:
    scratch.mkdir(exist_ok=True)
    stream = BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))
    trainable = open_model(folder, "causal-lm", device=torch.device("cpu"))
    train, query = (read_data(file, trainable).examples for file in (site.train, site.forget))
    return blockwise_scores(stream, train, query, options, RunContext(Journal(scratch), budget))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "phi3"])
def test_scores_are_those_of_the_model_in_memory(
    model_type: str, words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are drawn alike, layers curved together alike; on disk or not, one walk or several."""
    model = tiny.model_of(tiny.config_of(model_type, num_hidden_layers=3, layer_types=None), dtype=torch.float32)
    folder = tiny.save(model, tmp_path / "model")
    monkeypatch.setattr("unlearn.datamodels.influence.CURVATURE_BLOCK", 130)  # five linears, across blocks
    options = options_of(words, micro_batch_tokens=64)
    right = in_memory(folder, words, options, 64)
    assert right.abs().max() > 1e-3
    found = walked(folder, words, options, tmp_path / "one")
    assert float((found - right).norm() / right.norm()) < 2e-4
    monkeypatch.setattr(module, "WALK_TOKENS", 64)
    again = walked(folder, words, options, tmp_path / "several", budget=0)
    assert torch.allclose(again, found, rtol=1e-9, atol=1e-9), "float64 sums in another order"
    assert len(list((tmp_path / "several").glob("train-*"))) > len(list((tmp_path / "one").glob("train-*")))
    others = walked(folder, words, replace(options, seed=1), tmp_path / "others")
    assert not torch.allclose(others, found)


def test_a_row_raises_its_own_answer_most(words: Site, tmp_path: Path) -> None:
    """Queries are three of the training rows, of a model that has yet to learn them."""
    folder = tiny.save(tiny.model_of(tiny.config_of("qwen2"), dtype=torch.float32), tmp_path / "model")
    found = attribute(folder, tmp_path / "out.jsonl", options_of(words, top=3))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == found and [line["query"] for line in found] == [1, 2, 3]
    for i, line in enumerate(found):
        best, least = line["raises"], line["lowers"]
        assert best[0]["row"] == i + 1 and NAMES[i] in best[0]["text"]
        assert best[0]["score"] > best[1]["score"] > least[1]["score"] > least[0]["score"] and len(best) == 3
    assert not list(tmp_path.glob(".*"))


def test_windows_of_a_row_are_one_row(words: Site) -> None:
    trainable = open_model(words.model, "causal-lm", device=torch.device("cpu"))
    data = read_data(words.train, trainable)
    assert len(data) == 12
    twice = replace(data, numbers=[number // 2 for number in data.numbers])
    scores = torch.arange(144, dtype=torch.float64).view(12, 12).sin()
    line = listed(scores, twice, twice, 99)[0]
    assert line["query"] == 0 and sorted(row["row"] for row in line["raises"]) == list(range(7))
    assert {r["row"]: r["score"] for r in line["raises"]}[3] == pytest.approx(float(scores[5:7, :1].sum()))


def test_stopped_and_continued_it_gives_the_same_bytes(
    words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WALK_TOKENS", 64)
    options = options_of(words, micro_batch_tokens=64)
    attribute(words.model, tmp_path / "right", options)
    written = list[str]()
    write = Journal.write_own

    def some(self: Journal, page: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        write(self, page, tensors, notes)
        written.append(page)

    with mock.patch.object(Journal, "write_own", some), pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(module, "stop_if_asked", lambda: stop_after(written, 5))
        attribute(words.model, tmp_path / "out", options)
    monkeypatch.undo()
    monkeypatch.setattr(module, "WALK_TOKENS", 64)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="--resume"):
        attribute(words.model, tmp_path / "out", options)
    with pytest.raises(BadInput, match=r"options\.width was 5 and is now 6"):
        attribute(words.model, tmp_path / "out", replace(options, width=6), resume=True)
    with mock.patch.object(module, "_walk", side_effect=module._walk) as walk:
        attribute(words.model, tmp_path / "out", replace(options, memory_budget=0.001), resume=True)
    assert walk.call_count == 12 - 2 + 3, "two walks of three pages each were finished"
    assert (tmp_path / "out").read_bytes() == (tmp_path / "right").read_bytes()


def test_two_processes_give_the_bytes_of_one(words: Site, tmp_path: Path) -> None:
    job = ["--train", words.train, "--query", words.forget, "--micro-batch-tokens", 64, "--device", "cpu"]
    one = command("attribute", words.model, tmp_path / "one", *job)
    assert one.returncode == 0, one.stderr
    two = torchrun("-m", "cli.main", "attribute", words.model, tmp_path / "two", *job)
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"one", "two"}
    refused = torchrun("-m", "cli.main", "attribute", words.model, tmp_path / "two", *job)
    assert refused.returncode != 0 and refused.stderr.count("parewell:") == 1 and "is there already" in refused.stderr


def stop_after(written: list[str], pages: int) -> None:
    if len(written) >= pages:
        raise KeyboardInterrupt


def test_what_will_not_do(words: Site, net: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more, message in (
        ({"train": None}, "train and query: both are needed"),
        ({"top": 0}, "top is 0; it must be at least 1"),
        ({"damping": 0.0}, "damping is 0.0; it must be positive"),
        ({"width": 0}, "width is 0"),
        ({"memory_budget": -1.0}, "memory-budget is -1.0"),
    ):
        with pytest.raises(BadInput, match=message):
            Attribute(**{"train": words.train, "query": words.forget} | more)  # type: ignore[arg-type]
    (tmp_path / "there").write_text("mine")
    (tmp_path / "empty.jsonl").write_text("")
    for place, options, message in (
        (tmp_path / "there", options_of(words), "is there already"),
        (tmp_path / "no" / "out", options_of(words), "no folder that may be written to"),
        (out, options_of(replace(words, train=tmp_path / "empty.jsonl")), "is empty; give some rows"),
        (out, options_of(words, length=1000), "the model has 64 positions"),
    ):
        with pytest.raises(BadInput, match=message):
            attribute(words.model, place, options)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2000"}')
    with pytest.raises(BadInput, match="model_type 'gpt2000' is not known to transformers"):
        attribute(tmp_path / "gpt", out, options_of(words))
    assert (tmp_path / "there").read_text() == "mine" and not out.exists() and not list(tmp_path.glob(".*"))
