"""Chains: what one job leaves another takes, the recipe tells all of it, and it can be made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from calib import BadInput
from calib.jobs.options import RENAMED
from calib.jobs.recipe import read_recipe
from cli.main import parewell
from cli.replay import replay_recipe
from compressor import Distill, Evaluate, Export, Quantize, distill, evaluate, export, load, quantize
from tests.unlearn.conftest import Site, words, words_text  # noqa: F401
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn


@pytest.fixture(scope="module")
def chain(words: Site, words_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    """A model that forgot, a student cut out of it, that student in four bits, and trained on there."""
    folder = tmp_path_factory.mktemp("chain")
    places = [folder / name for name in ("forgot", "cut", "rounded", "trained")]
    unlearn(words.model, places[0], wanted(words, "npo", forget=None, forget_where="question~ada|bob", seed=3))
    small = {"data": words_text, "samples": 4, "held_out": 1, "length": 32}
    distill(places[0], places[1], Distill(layers=1, steps=3, batch=2, **small))  # type: ignore[arg-type]
    options = Quantize(scheme="w4a16-channel", steps=2, block_steps=0, tune_steps=1, batch=2, **small)  # type: ignore[arg-type]
    quantize(places[1], places[2], options, allow_recovery=True)
    distill(places[0], places[3], Distill(student=places[2], steps=3, batch=2, **small), allow_recovery=True)  # type: ignore[arg-type]
    return [words.model, *places]


def test_the_recipe_has_every_step_in_order(chain: list[Path]) -> None:
    assert [step["job"] for step in read_recipe(chain[-1])] == ["unlearn", "distill", "quantize", "distill"]
    shown = CliRunner().invoke(parewell, ["show", str(chain[-1])]).stdout
    for line in (
        "1. unlearned from",
        "2. distilled from",
        "3. quantized from",
        "4. distilled from",
        "student: rounded",
    ):
        assert line in shown
    assert "forgotten: before (probability" in shown and "method npo" in shown and "kl" in shown


def test_a_chain_made_again_has_the_same_bytes(chain: list[Path], tmp_path: Path) -> None:
    found = CliRunner().invoke(parewell, ["replay", str(chain[-1]), str(tmp_path / "again"), "--json"])
    assert found.exit_code == 0, found.stdout
    said = json.loads(found.stdout)
    assert said["agrees"] and {"model.safetensors", "config.json", "parewell.json"} <= said["files"].keys()
    assert (tmp_path / "again/model.safetensors").read_bytes() == (chain[-1] / "model.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again"], "what lay in between is gone"


def test_a_recipe_with_the_names_of_before_is_made_again_as_it_was(chain: list[Path], tmp_path: Path) -> None:
    """Options had other names once, `w4a16` meant one scale per output channel, and blocks were not tuned."""
    old = Path(shutil.copytree(chain[-1], tmp_path / "old"))
    steps = read_recipe(old)
    for step in steps:
        options = step["options"]
        for before, now in RENAMED[step["job"]].items():
            options[before] = options.pop(now)
        if "untie" in options:
            options["untie"] = {"untie": True, "keep": False, "auto": None}[options["untie"]]
        if "eight_bit" in options:
            options["eight_bit"] = options["eight_bit"] == "adamw8bit"
        for later in ("group_size", "block_steps"):
            options.pop(later, None)
        for named in (step, options):
            if named.get("scheme") == "w4a16-channel":
                named["scheme"] = "w4a16"
    assert sum(step["options"].get("scheme") == "w4a16" for step in steps) == 1
    (old / "parewell.json").write_text(json.dumps({"recipe": steps}))
    found = CliRunner().invoke(parewell, ["replay", str(old), str(tmp_path / "again"), "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)["agrees"], found.stdout
    assert (tmp_path / "again/model.safetensors").read_bytes() == (chain[-1] / "model.safetensors").read_bytes()
    load(old)  # and its codes are read as what they are
    shown = [CliRunner().invoke(parewell, ["show", str(folder)]).stdout for folder in (old, chain[-1])]
    words_of = [sorted(text.replace(",", " ").split()) for text in shown]  # what was added later comes last
    assert words_of[0] == sorted([*words_of[1], "tied", "light"])  # the rule of before
    assert "damp " not in shown[0]


def test_what_does_not_agree_is_named(chain: list[Path], tmp_path: Path) -> None:
    shutil.copytree(chain[1], tmp_path / "out")
    steps = read_recipe(chain[1])
    steps[0]["options"]["seed"] = 4
    (tmp_path / "out/parewell.json").write_text(json.dumps({"recipe": steps}))
    found = CliRunner().invoke(parewell, ["replay", str(tmp_path / "out"), str(tmp_path / "again")])
    assert found.exit_code == 1
    assert "model.safetensors: differs" in found.stdout and "is not" in found.stdout.splitlines()[-1]
    assert "config.json: the same" in found.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"job": "merge"}, "merge is no job that is replayed"),
        ({"options": {"nonsense": 1}}, "option 'nonsense' is of another version"),
        ({"options": {"train": "a", "forget_lines": "1", "epochs": "many"}}, "epochs is 'many'; it must be a number"),
        ({"model": {"files": {}, "name": "", "sha256": ""}}, "does not say where its first model lay; give --model"),
        ({"model": {"given": "gone", "files": {}, "name": "", "sha256": ""}}, "gone: no such folder"),
    ],
)
def test_what_cannot_be_replayed(chain: list[Path], tmp_path: Path, change: dict[str, object], said: str) -> None:
    shutil.copytree(chain[1], tmp_path / "out")
    steps = read_recipe(chain[1])
    (tmp_path / "out/parewell.json").write_text(json.dumps({"recipe": [{**steps[0], **change}]}))
    with pytest.raises(BadInput, match=said):
        replay_recipe(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_export_ends_a_chain(chain: list[Path], words_text: Path, tmp_path: Path) -> None:  # noqa: F811
    text = shutil.copy(words_text, tmp_path / "rows.txt")
    export(chain[3], tmp_path / "out", Export(held_out=2, data=text, length=16))
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees
    text.unlink()
    with pytest.raises(BadInput, match=r"data was .*rows.txt, which is not there; bring it back"):
        replay_recipe(tmp_path / "out", tmp_path / "x")


def test_another_model_or_place_is_refused(chain: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give a new folder"):
        replay_recipe(chain[1], chain[2])
    shutil.copytree(chain[0], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(BadInput, match=r"is not what .* was made from: config.json was"):
        replay_recipe(chain[1], tmp_path / "again", str(tmp_path / "model"))
    moved = replay_recipe(chain[1], tmp_path / "again", str(shutil.copytree(chain[0], tmp_path / "moved")))
    assert moved.agrees, "where the model lay does not matter"


def test_every_step_is_taken_by_what_comes_after(
    chain: list[Path],
    words_text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Evaluated; teaching, quantized or not; what cannot be done again is refused with what to do instead."""
    for folder in chain:
        assert evaluate(folder, Evaluate(data=words_text, length=32, rows=2, reference=str(chain[0]))).kl is not None
    small = {"data": words_text, "samples": 4, "held_out": 1, "length": 32, "steps": 2, "batch": 2}
    report = distill(chain[3], tmp_path / "taught", Distill(student=chain[2], **small))  # type: ignore[arg-type]
    assert report["parameters"]["teacher"] == report["parameters"]["student"], "both have one table"
    assert report["quality_by_stage"]["before"]["kl"] > 0, "the teacher speaks as it was rounded"
    for more, said in (
        ({"layers": 1}, "is quantized; nothing is cut out of that"),
        ({"student": chain[2], "teacher": "top-k"}, "answers while the student learns; leave out --teacher"),
        ({"student": chain[2], "teacher_bits": "int8"}, "is quantized already; leave out --teacher-bits"),
    ):
        with pytest.raises(BadInput, match=said):
            distill(chain[3], tmp_path / "out", Distill(**small | more))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"is quantized already .*; give the model it was made from"):
        quantize(chain[3], tmp_path / "out", Quantize(), allow_recovery=True)
