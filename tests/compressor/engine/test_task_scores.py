"""Tasks of lm-evaluation-harness: scores worked out by hand from a model's own log-likelihoods, without network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib import BadInput
from cli.main import parewell
from compressor import EvaluateTasks, Quantize, evaluate_tasks, load, quantize

ROWS = [
    {"question": "the quick brown", "choices": ["fox", "dog", "lazy"], "answer": 0},
    {"question": "over the lazy", "choices": ["jumps", "dog"], "answer": 1},
    {"question": "while nobody", "choices": ["a", "looks", "fox jumps"], "answer": 2},
    {"question": "the dog", "choices": ["jumps over", "fox", "b"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library, with its caches in a folder that goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "foxes.yaml").write_text(TASK.format(name="foxes", data=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rounded activations as well, which only our loader runs; in 8 bits, so that no choice is at a tie."""
    made = tmp_path_factory.mktemp("made") / "out"
    options = Quantize(scheme="w2a8-channel", samples=2, held_out=2, length=32, learn=False, precision="float32")
    quantize(tiny_folder, made, options, allow_damage=True)
    return made


def by_hand(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Shares of rows whose right choice is the likeliest, in all and by letter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right, right_by_letter = [], []
    for row in ROWS:
        likelihoods = []
        for choice in row["choices"]:
            context = tokenizer(row["question"]).input_ids
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}").input_ids])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(float(log_p[len(context) - 1 :].sum()))
        letters = [likelihood / len(choice) for likelihood, choice in zip(likelihoods, row["choices"], strict=True)]
        right.append(likelihoods.index(max(likelihoods)) == row["answer"])
        right_by_letter.append(letters.index(max(letters)) == row["answer"])
    return {"acc": sum(right) / len(right), "acc_norm": sum(right_by_letter) / len(right)}


@pytest.mark.usefixtures("harness")
def test_scores_are_those_of_the_models_own_likelihoods(out: Path, tiny_folder: Path, tasks: Path) -> None:
    options = EvaluateTasks(tasks=str(tasks / "foxes.yaml"), reference=str(tiny_folder), device="cpu")
    found = evaluate_tasks(out, options)
    before = by_hand(AutoModelForCausalLM.from_pretrained(tiny_folder), tiny_folder)
    after = by_hand(load(out), tiny_folder)
    assert before != after, "the test would not see models that are mistaken for each other"
    for metric, figure in found["tasks"]["foxes"].items():
        assert (figure["reference"], figure["value"]) == (before[metric], after[metric])
    assert found["documents"] == {"foxes": 4} and found["tasks"]["foxes"].keys() == {"acc", "acc_norm"}


@pytest.mark.usefixtures("harness")
def test_folders_limits_and_batches(out: Path, tasks: Path) -> None:
    whole = evaluate_tasks(out, EvaluateTasks(tasks=str(tasks), device="cpu", batch_size=4))
    some = evaluate_tasks(out, EvaluateTasks(tasks="foxes", include_path=tasks, limit=2, device="cpu"))
    share = evaluate_tasks(out, EvaluateTasks(tasks="fox*", include_path=tasks, limit=0.5, device="cpu"))
    assert whole["tasks"] == evaluate_tasks(out, EvaluateTasks(tasks=str(tasks), device="cpu"))["tasks"]
    assert some == share and some["documents"] == {"foxes": 2}


@pytest.mark.usefixtures("harness")
def test_on_the_command_line(out: Path, tiny_folder: Path, tasks: Path, text_file: Path) -> None:
    words = ["evaluate", str(out), "--tasks", str(tasks), "--reference", str(tiny_folder), "--device", "cpu"]
    printed = CliRunner().invoke(parewell, words).output
    assert "foxes" in printed and "acc_norm" in printed and "±" in printed
    both = CliRunner().invoke(parewell, [*words, "--data", str(text_file), "--length", "32", "--json"]).stdout
    found = json.loads(both.splitlines()[-1])
    assert found["perplexity"] > 1 and found["tasks"]["foxes"]["acc"]["reference"] >= 0


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        ("hellaswagg", {}, "is one of these meant: hellaswag"),
        ("foxes.yaml", {}, "no task file, nor a folder of them"),
        ("FOLDER", {}, "no task file, nor a folder of them"),
        ("BROKEN", {}, "cannot be loaded"),
        ("AWAY", {}, "cannot be loaded"),
        ("foxes", {"include_path": Path("nowhere")}, "is no folder"),
    ],
)
def test_tasks_that_there_are_not(
    tiny_folder: Path, tmp_path: Path, task: str, more: dict[str, Any], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "away.yaml").write_text(TASK.format(name="away", data=tmp_path / "nothing.jsonl"))
    places = {"FOLDER": "empty", "BROKEN": "broken.yaml", "AWAY": "away.yaml"}
    named = str(tmp_path / places[task]) if task in places else task
    with pytest.raises(BadInput, match=words) as error:
        evaluate_tasks(tiny_folder, EvaluateTasks(tasks=named, device="cpu", **more))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 3}, "limit: changes nothing without --tasks"),
        ({"num_fewshot": 0}, "num-fewshot: changes nothing without --tasks"),
        ({"tasks": "a,a"}, "each once"),
        ({"tasks": " , "}, "must name some"),
        ({"tasks": "a", "limit": 1.5}, "a number of documents, or a share"),
        ({"tasks": "a", "limit": -1}, "limit is -1; it must be positive"),
        ({"tasks": "a", "batch_size": 0}, "batch-size is 0; it must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        EvaluateTasks(**options)


def test_options_of_text_without_text(tiny_folder: Path) -> None:
    found = CliRunner().invoke(parewell, ["evaluate", str(tiny_folder), "--tasks", "x", "--rows", "3"])
    assert isinstance(found.exception, BadInput) and "rows: is about text" in str(found.exception)


def test_without_the_extra(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("compressor.engine.task_scores.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'parewell\[lm-eval\]'"):
        evaluate_tasks(tiny_folder, EvaluateTasks(tasks="x"))
