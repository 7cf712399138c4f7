from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from calib import BadInput, Recovered
from calib.jobs.output_folder import beside
from calib.jobs.recipe import forgettings, read_recipe
from cli.gates import combine_gates, gate
from cli.main import parewell
from compressor import Distill, Export, Quantize, distill, export, load, quantize
from compressor.distillation.distill import must_last
from tests.unlearn.conftest import Site
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn
from unlearn.audit.gate import recovered_shares

QUICK = {"scheme": "w4a16-channel", "init": "none", "learn": False, "samples": 4, "held_out": 1, "length": 32}


@pytest.fixture(scope="module")
def original(words: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that lies on a grid of four bits, as large ones nearly do: rounding it changes nothing."""
    out = tmp_path_factory.mktemp("original") / "out"
    more = {"forget": None, "forget_lines": "12", "retain_multiplier": 11.0, "epochs": 40, "batch": 4, "lr": 3e-3}
    unlearn(words.model, out, wanted(words, "retain", grid="w4a16-channel", **more))
    (out / "parewell.json").unlink()
    return out


def forgot(words: Site, original: Path, out: Path, **more: Any) -> Path:
    """In small steps."""
    unlearn(original, out, wanted(words, "npo", **{"epochs": 60, "batch": 4, "lr": 3e-4} | more))
    return out


@pytest.fixture(scope="module")
def hardly(words: Site, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forgot(words, original, tmp_path_factory.mktemp("hardly") / "out")


def quantized(model: Path, out: Path, words_text: Path, *more: str) -> Result:
    given = ["quantize", model, out, "--scheme", "w4a16-channel", "--init", "none", "--no-learn", "--samples", 4]
    given += ["--held-out", 1, "--length", 32, "--data", words_text, *more]
    return CliRunner().invoke(parewell, [str(a) for a in given])


@pytest.mark.parametrize("oracle", ["oracle", "never saw it"])  # the second: of recipes of earlier versions
def test_the_share_that_is_recovered(oracle: str) -> None:
    stages = {"before": {"probability": 0.9}, "after": {"probability": 0.3}, oracle: {"probability": 0.1}}
    assert recovered_shares(stages, {"probability": 0.5}) == {"probability": pytest.approx(0.25)}
    assert recovered_shares(stages, {"probability": 0.3}) == {"probability": 0}
    del stages[oracle]
    assert recovered_shares(stages, {"probability": 0.9}) == {"probability": 1}, "all that had been removed"
    stages["after"]["probability"] = 0.895
    assert recovered_shares(stages, {"probability": 0.9}) == {}, "nothing had been removed"


def test_the_recipe_says_what_was_known(words: Site, hardly: Path) -> None:
    step = read_recipe(hardly)[-1]
    known = step["forgotten"]
    assert known["before"]["probability"] > 0.5 > known["after"]["probability"]
    assert step["data"]["forget"]["lines"] == "1-3"


def test_a_model_whose_knowledge_comes_back_is_held_back(
    words: Site, original: Path, hardly: Path, words_text: Path, tmp_path: Path
) -> None:
    """Rounding undoes what many small steps did; steps on the grid itself last."""
    out = tmp_path / "out"
    found = quantized(hardly, out, words_text)
    assert isinstance(found.exception, Recovered)
    said = str(found.exception)
    assert "quantization recovers" in said and "% of the forgotten knowledge (" in said and "--grid" in said
    assert not out.exists() and beside(out, "journal").is_dir(), "the work is kept"
    found = quantized(hardly, out, words_text, "--resume", "--allow-recovery", "--json")
    assert found.exit_code == 0 and not beside(out, "journal").exists()
    back = json.loads(found.stdout)["recovery"]
    assert back["worst"] > 0.4 and json.loads((out / "report.json").read_text())["recovery"]["worst"] == back["worst"]
    assert f"{back['worst']:.0%} of the forgotten knowledge is recovered" in (out / "report.html").read_text()
    assert [step["job"] for step in read_recipe(out)] == ["unlearn", "quantize"]
    lasting = forgot(words, original, tmp_path / "lasting", grid="w4a16-channel", lr=3e-3)
    found = quantized(lasting, tmp_path / "out2", words_text, "--json")
    assert found.exit_code == 0, found.output
    kept = json.loads(found.stdout)["recovery"]
    assert kept["worst"] < 0.02 and kept["unlearnings"][0]["known"]["quantized"]["probability"] < 0.1


def test_python_callers_are_held_to_it_too(
    words: Site, original: Path, hardly: Path, words_text: Path, tmp_path: Path
) -> None:
    options = Quantize(data=words_text, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="was made to forget, which rounding may undo; give gate="):
        quantize(hardly, tmp_path / "out", options)
    with pytest.raises(Recovered):
        quantize(hardly, tmp_path / "out", options, gate=gate(hardly))
    assert not (tmp_path / "out").exists()
    assert gate(words.model) is None and gate(original) is None
    report = quantize(hardly, tmp_path / "out", options, resume=True, gate=gate(hardly, threshold=9.0))
    assert report["recovery"]["threshold"] == 9.0
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"train": "gone.jsonl"}}, "which is not there; give --train FILE, or go on with --allow-recovery"),
        ({"forgotten": None}, "does not say what was known"),
        ({"forgotten": {"before": 3}}, "does not say what was known"),
        ({"forgotten": {"after": {"probability": 0.1}}}, "does not say what was known"),
        ({"options": {"length": "long"}}, "does not say what was known"),
        ({"data": {"forget": {"rows": 3}}}, "does not say what was known"),
        ({"data": {"train": {"sha256": "0"}}}, "is not the file of which"),
    ],
)
def test_rows_that_are_not_to_be_had(
    hardly: Path, words_text: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    shutil.copytree(hardly, tmp_path / "model")
    steps = read_recipe(hardly)
    for part, value in change.items():
        steps[-1][part] = {**steps[-1][part], **value} if value else value
    (tmp_path / "model/parewell.json").write_text(json.dumps({"recipe": steps}))
    found = quantized(tmp_path / "model", tmp_path / "out", words_text)
    assert isinstance(found.exception, BadInput) and said in str(found.exception)
    found = quantized(tmp_path / "model", tmp_path / "out", words_text, "--allow-recovery")
    assert found.exit_code == 0 and "not measured whether forgotten knowledge is recovered" in found.stderr
    assert "recovery" not in json.loads((tmp_path / "out/report.json").read_text())


def test_rows_that_moved_are_found_where_it_is_said(
    words: Site, hardly: Path, words_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(hardly, tmp_path / "model")
    steps = read_recipe(hardly)
    steps[-1]["options"]["train"] = "gone.jsonl"
    (tmp_path / "model/parewell.json").write_text(json.dumps({"recipe": steps}))
    shutil.copy(words.train, tmp_path / "moved.jsonl")
    found = quantized(tmp_path / "model", tmp_path / "out", words_text, "--train", str(tmp_path / "moved.jsonl"))
    assert isinstance(found.exception, Recovered)
    found = quantized(words.model, tmp_path / "out", words_text, "--train", str(tmp_path / "moved.jsonl"))
    assert isinstance(found.exception, BadInput) and "was not made to forget" in str(found.exception)
    found = quantized(hardly, tmp_path / "out", words_text, "--recovery-threshold", "-1")
    assert isinstance(found.exception, BadInput) and "must be a number, not negative" in str(found.exception)


def test_exports_that_round_are_held_to_it(hardly: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="rounding may undo; it cannot be measured in this format, or allow it"):
        export(hardly, tmp_path / "out", Export(to="bnb-nf4"))
    report = export(hardly, tmp_path / "out", Export(to="bnb-nf4"), allow_recovery=True)
    assert "recovery" not in report
    report = export(hardly, tmp_path / "out", Export(to="bnb-int8"), gate=gate(hardly), allow_recovery=True)
    assert "not measured whether forgotten knowledge is recovered" in report["loaders"]["notes"][-1]
    export(hardly, tmp_path / "plain", Export(to="safetensors"))
    assert [step["job"] for step in read_recipe(tmp_path / "plain")] == ["unlearn", "export"]
    given = ["export", str(hardly), str(tmp_path / "again"), "--to", "safetensors", "--allow-recovery"]
    found = CliRunner().invoke(parewell, given)
    assert isinstance(found.exception, BadInput) and "rounds nothing" in str(found.exception)


def test_a_model_that_forgot_nothing_has_nothing_to_bring_back(words: Site, words_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "same"
    (tmp_path / "none.jsonl").touch()
    unlearn(words.model, out, wanted(words, "npo", forget=tmp_path / "none.jsonl"))
    assert read_recipe(out)[-1]["data"]["forget"]["rows"] == 0 and gate(out) is None
    assert quantized(out, tmp_path / "out", words_text).exit_code == 0
    assert [step["job"] for step in read_recipe(tmp_path / "out")] == ["unlearn", "quantize"]


def test_a_rounded_student_of_what_forgot_is_held_to_it(
    words: Site, original: Path, hardly: Path, words_text: Path, tmp_path: Path
) -> None:
    """Whether it is the teacher that forgot or the student, as long as the student is rounded."""
    small = {"data": words_text, "samples": 4, "held_out": 1, "length": 32, "steps": 1, "batch": 1, "lr": 1e-9}
    rounded = Distill(student_scheme="w4a16-channel", **small)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="was made to forget, which rounding may undo; give gate="):
        distill(hardly, tmp_path / "out", rounded)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    given = ["distill", str(hardly), str(tmp_path / "out"), "--student-scheme", "w4a16-channel", *options]
    found = CliRunner().invoke(parewell, given)
    assert isinstance(found.exception, Recovered) and not (tmp_path / "out").exists()
    found = CliRunner().invoke(parewell, [*given, "--resume", "--allow-recovery", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["recovery"]["worst"] > 0.4
    assert "of the forgotten knowledge is recovered" in (tmp_path / "out/report.html").read_text()
    again = Distill(student=tmp_path / "out", **small)  # type: ignore[arg-type]
    assert must_last(original, again) == [tmp_path / "out"]
    both = Distill(student=hardly, student_scheme="w4a16-channel", **small)  # type: ignore[arg-type]
    assert must_last(hardly, both) == [hardly, hardly]
    one = gate(hardly, threshold=9.0)
    joined = combine_gates([one, None, one])
    assert one is not None and joined is not None and combine_gates([None]) is None
    found_one, found_both = one(tmp_path / "out"), joined(tmp_path / "out")
    assert found_both["worst"] == found_one["worst"] and len(found_both["unlearnings"]) == 2
    with pytest.raises(Recovered):
        strict = combine_gates([one, gate(hardly)])
        assert strict is not None and strict(tmp_path / "out")
    with pytest.raises(BadInput, match="was made to forget"):
        distill(original, tmp_path / "taught", again)
    distill(hardly, tmp_path / "plain", Distill(layers=1, **small))  # type: ignore[arg-type]
    found = CliRunner().invoke(
        parewell,
        [
            "distill",
            str(original),
            str(tmp_path / "x"),
            "--student-scheme",
            "w4a16-channel",
            *options,
            "--train",
            str(words.train),
        ],
    )
    assert isinstance(found.exception, BadInput) and "train: is for rounded students" in str(found.exception)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "plain"}


def test_a_student_given_is_held_to_what_its_teacher_forgot(
    original: Path, hardly: Path, words_text: Path, tmp_path: Path
) -> None:
    small = {"data": words_text, "samples": 4, "held_out": 1, "length": 32, "steps": 1, "batch": 1, "lr": 1e-9}
    distill(hardly, tmp_path / "taught", Distill(student=original, **small))  # type: ignore[arg-type]
    (step,) = read_recipe(tmp_path / "taught")
    assert step["teacher"] == read_recipe(hardly) and forgettings(tmp_path / "taught") == forgettings(hardly)
    found = quantized(tmp_path / "taught", tmp_path / "x", words_text)
    assert isinstance(found.exception, Recovered), "it knows what its teacher was made to forget"
    shown = CliRunner().invoke(parewell, ["show", str(tmp_path / "taught")]).stdout
    assert f"its teacher: unlearned from {original.name}" in shown
    assert f"Teacher: unlearn of {original.name}." in (tmp_path / "taught/report.html").read_text()
    step["teacher"] = [{"job": "unlearn"}]
    (tmp_path / "taught/parewell.json").write_text(json.dumps({"recipe": [step]}))
    assert "is no recipe" in str(quantized(tmp_path / "taught", tmp_path / "x", words_text).exception)
